"""The adaptive learned decoder, the judge of every defence here.

The foe trains a network from activations back to inputs, on samples of its own that went through the very pipeline that
it attacks: perturbation, front, noise and codec included. What the defence does at random it learns to average away.
Sources: Dosovitskiy and Brox, "Inverting Visual Representations with Convolutional Networks", arXiv 1506.02753; for
split inference He, Zhang and Lee, "Model Inversion Attacks Against Collaborative Inference", ACSAC 2019 (query-based).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from server_sdk.audit.attacks.attack import Knowledge, Progress
from server_sdk.audit.metrics import likeness
from server_sdk.errors import ServerError

__all__ = ["LearnedDecoder"]

Array = npt.NDArray[np.float32]
_PART = 512
_LEAST_TO_HOLD_OUT = 40
_LEAST_TO_JUDGE = 20
_WEIGHT_DECAY = 1e-2


@dataclass(frozen=True)
class LearnedDecoder:
    """A decoder network, trained anew for each attack.

    A tenth of the foe's samples is held out, and the weights that rebuild these best by the measure that the foe is
    judged by are kept (by their error where fewer than 20 are held out): a decoder that has learned its samples by
    heart, or the noise on them, or that goes for the smallest error and so for a blur, would make a defence look good.

    Attributes:
        kind: ``convolution`` (needs activations with spatial axes) or ``mlp``.
        epochs: passes over the auxiliary samples, more where they would come to less than ``least_steps``.
        width: channels of the convolutions; an MLP has 16 times as many hidden units.
        learning_rate: of AdamW, with a cosine to zero.
        least_steps: of the training.
        device: where it trains, ``cpu`` or ``cuda``.
        victims: how many of the victims are attacked, the first of them; None: all.
    """

    kind: Literal["convolution", "mlp"] = "convolution"
    epochs: int = 20
    width: int = 48
    learning_rate: float = 2e-3
    device: str = "cpu"
    victims: int | None = None
    least_steps: int = 800

    @property
    def name(self) -> str:
        """``decoder_convolution`` or ``decoder_mlp``."""
        return f"decoder_{self.kind}"

    @property
    def sends(self) -> int:
        """One: each sample is seen once."""
        return 1

    def fits(self, shape: tuple[int, ...], *, twin: bool = False) -> bool:
        """Convolutions need spatial axes, an MLP takes anything. See ``Attack.fits``."""
        return self.kind == "mlp" or len(shape) > 1

    def rebuild(self, knowledge: Knowledge, seen: Array, *, seed: int, progress: Progress | None = None) -> Array:
        """Train on the foe's samples, then decode the victims'. See ``Attack.rebuild``."""
        shape, target = knowledge.seen.shape[1:], knowledge.x.shape[1:]
        if seen.shape[1:] != shape:
            raise ServerError(f"the foe knows activations of {shape}, the victims' are of {seen.shape[1:]}")
        if not self.fits(shape):
            raise ServerError(f"activations of {shape} have no spatial axes: use the mlp decoder")
        device = torch.device(self.device)
        mean, scale = _standard(knowledge.seen)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            decoder = self._network(shape, target).to(device)
            codes = torch.from_numpy((knowledge.seen - mean) / scale).to(device)
            wanted = torch.from_numpy(np.ascontiguousarray(knowledge.x)).to(device)
            self._train(decoder, codes, wanted, progress)
        decoder.eval()
        with torch.inference_mode():
            parts = [
                decoder(torch.from_numpy((seen[start : start + _PART] - mean) / scale).to(device)).cpu().numpy()
                for start in range(0, len(seen), _PART)
            ]
        result: Array = np.concatenate(parts)
        return result

    def _network(self, shape: tuple[int, ...], target: tuple[int, ...]) -> nn.Module:
        if self.kind == "mlp":
            hidden = 16 * self.width
            return nn.Sequential(
                nn.Flatten(),
                nn.Linear(math.prod(shape), hidden),
                nn.BatchNorm1d(hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.BatchNorm1d(hidden),
                nn.ReLU(),
                nn.Linear(hidden, math.prod(target)),
                nn.Sigmoid(),
                nn.Unflatten(1, target),
            )
        return _ConvolutionDecoder(shape, target, self.width)

    def _train(self, decoder: nn.Module, codes: Tensor, wanted: Tensor, progress: Progress | None) -> None:
        order = torch.randperm(len(codes)).to(codes.device)
        held = len(codes) // 10 if len(codes) >= _LEAST_TO_HOLD_OUT else 0
        aside, order = order[:held], order[held:]
        batch = max(1, min(128, len(order) // 4))
        epochs = max(self.epochs, math.ceil(self.least_steps / math.ceil(len(order) / batch)))
        steps = epochs * math.ceil(len(order) / batch)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=self.learning_rate, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        best, kept = -math.inf, copy.deepcopy(decoder.state_dict())
        for epoch in range(epochs):
            total = 0.0
            decoder.train()
            order = order[torch.randperm(len(order)).to(order.device)]
            for chosen in torch.tensor_split(order, tuple(range(batch, len(order), batch))):
                if len(chosen) > 1 or len(order) == 1:
                    loss = nn.functional.mse_loss(decoder(codes[chosen]), wanted[chosen])
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    optimizer.step()
                    total += float(loss.detach()) * len(chosen)
                schedule.step()
            if held:
                shown = _shown(decoder, codes[aside], wanted[aside])
                if shown > best:
                    best, kept = shown, copy.deepcopy(decoder.state_dict())
            if progress is not None:
                progress(epoch + 1, epochs, total / len(order))
        if held:
            decoder.load_state_dict(kept)


def _shown(decoder: nn.Module, codes: Tensor, wanted: Tensor) -> float:
    """What the decoder shows of these samples: SSIM of images, correlation of signals; of few, where these are chance,
    minus the error.
    """
    decoder.eval()
    with torch.inference_mode():
        made = torch.cat([decoder(part) for part in torch.split(codes, _PART)]).cpu().numpy()
    found = likeness(made, wanted.cpu().numpy())
    if len(codes) < _LEAST_TO_JUDGE:
        return -found.mse
    return found.correlation if found.ssim is None else found.ssim


class _ConvolutionDecoder(nn.Module):
    """Two residual blocks on the activations' grid, then sub-pixel upsampling to the input's."""

    def __init__(self, shape: tuple[int, ...], target: tuple[int, ...], width: int) -> None:
        super().__init__()
        channels, *grid = shape
        self.axes = len(grid)
        self.target = target[1:]
        convolution = nn.Conv1d if self.axes == 1 else nn.Conv2d
        normalisation = nn.BatchNorm1d if self.axes == 1 else nn.BatchNorm2d
        # Each cell of the grid gives a block; what is beyond the input is cut off.
        self.factors = [math.ceil(full / cells) for full, cells in zip(self.target, grid, strict=True)]

        def block(fan_in: int) -> nn.Sequential:
            return nn.Sequential(
                convolution(fan_in, width, 3, padding=1, bias=False),
                normalisation(width),
                nn.ReLU(),
                convolution(width, width, 3, padding=1, bias=False),
                normalisation(width),
            )

        self.skip = convolution(channels, width, 1)
        self.first, self.second = block(channels), block(width)
        self.out = convolution(width, target[0] * math.prod(self.factors), 3, padding=1)

    def forward(self, activations: Tensor) -> Tensor:
        hidden = torch.relu(self.skip(activations) + self.first(activations))
        hidden = torch.relu(hidden + self.second(hidden))
        blocks = self.out(hidden)
        samples, _, *grid = blocks.shape
        apart = blocks.reshape(samples, -1, *self.factors, *grid)
        order = [0, 1]
        for axis in range(self.axes):
            order += [2 + self.axes + axis, 2 + axis]
        full = apart.permute(order).reshape(samples, -1, *(n * f for n, f in zip(grid, self.factors, strict=True)))
        for axis, extent in enumerate(self.target):
            full = full.narrow(2 + axis, 0, extent)
        return torch.sigmoid(full)


def _standard(seen: Array) -> tuple[Array, Array]:
    """Mean and spread of each channel, or of each value where there are no spatial axes."""
    axes = (0, *range(2, seen.ndim))
    mean = seen.mean(axis=axes, keepdims=True)[0]
    scale = seen.std(axis=axes, keepdims=True)[0]
    return mean, np.where(scale > 1e-6, scale, np.float32(1.0)).astype(np.float32)
