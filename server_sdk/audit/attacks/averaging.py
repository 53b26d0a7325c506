"""Averaging over repeated sends: noise that is drawn anew with each send can be averaged away.

A device draws its noise anew with each version of its front alone, never for the same sample under the same front; so
the foe waits for as many versions, of which the last ones of a training hardly differ in anything but their noise.
Source: Dwork and Roth, "The Algorithmic Foundations of Differential Privacy", section 3.5 (composition), 2014.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from server_sdk.audit.attacks.attack import Attack, Knowledge, Progress
from server_sdk.audit.attacks.decoder import LearnedDecoder

__all__ = ["Averaging"]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Averaging:
    """Another attack, on the mean of many sends of each sample.

    Attributes:
        attack: what is done with the means.
        sends: of each sample, each under another version of the front with the same weights.
    """

    attack: Attack = field(default_factory=LearnedDecoder)
    sends: int = 16

    @property
    def name(self) -> str:
        """``averaging_<attack>``."""
        return f"averaging_{self.attack.name}"

    @property
    def victims(self) -> int | None:
        """As the attack has them."""
        return self.attack.victims

    def fits(self, shape: tuple[int, ...], *, twin: bool) -> bool:
        """Whether the attack on the means does."""
        return self.attack.fits(shape, twin=twin)

    def rebuild(self, knowledge: Knowledge, seen: Array, *, seed: int, progress: Progress | None = None) -> Array:
        """Attack the means; ``knowledge.seen`` and ``seen`` are such. See ``Attack.rebuild``."""
        return self.attack.rebuild(knowledge, seen, seed=seed, progress=progress)
