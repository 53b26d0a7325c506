"""White-box optimisation: search the input whose activations are those that were seen.

Source: He, Zhang and Lee, "Model Inversion Attacks Against Collaborative Inference", ACSAC 2019: regularised maximum
likelihood estimation (rMLE), squared distance of the activations plus total variation of the input. It needs no
training but a search for each sample, and is no judge on its own: it misses what the learned decoder finds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server_sdk.audit.attacks.attack import Knowledge, Progress
from server_sdk.errors import ServerError

__all__ = ["WhiteBox"]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class WhiteBox:
    """rMLE with Adam, all victims side by side.

    Attributes:
        steps: of the search.
        rate: of Adam, in units of the input's range.
        variation: weight of the total variation.
        victims: how many of the victims are attacked, the first of them.
    """

    steps: int = 400
    rate: float = 0.03
    variation: float = 0.01
    victims: int | None = 64

    @property
    def name(self) -> str:
        """``white_box``."""
        return "white_box"

    @property
    def sends(self) -> int:
        """One: each sample is seen once."""
        return 1

    def fits(self, shape: tuple[int, ...], *, twin: bool) -> bool:
        """Any activations that have a gradient can be searched for."""
        return twin

    def rebuild(self, knowledge: Knowledge, seen: Array, *, seed: int, progress: Progress | None = None) -> Array:
        """Search from the mean of the foe's samples. See ``Attack.rebuild``."""
        if knowledge.twin is None:
            raise ServerError("the white-box attack needs a differentiable twin of the victim: give Knowledge one")
        generator = torch.Generator().manual_seed(seed)
        wanted = torch.from_numpy(np.ascontiguousarray(seen))
        spread = torch.from_numpy(knowledge.seen).var(dim=0).mean().clamp_min(1e-8)
        begin = torch.from_numpy(knowledge.x.mean(axis=0)).expand(len(seen), *knowledge.x.shape[1:]).clone()
        guess = (begin + 0.01 * torch.randn(begin.shape, generator=generator)).clamp(0, 1).requires_grad_()
        optimizer = torch.optim.Adam([guess], lr=self.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for step in range(self.steps):
            distance = (knowledge.twin.send(guess) - wanted).square().flatten(1).mean(dim=1) / spread
            loss = (distance + self.variation * _variation(guess)).sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                guess.clamp_(0, 1)
            if progress is not None and (step + 1) % 20 == 0:
                progress(step + 1, self.steps, float(distance.detach().mean()))
        result: Array = guess.detach().numpy()
        return result


def _variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours along each spatial axis: (N, C, *S) -> (N,)."""
    parts = [x.diff(dim=axis).abs().flatten(1).mean(dim=1) for axis in range(2, x.ndim)]
    return torch.stack(parts).sum(dim=0)
