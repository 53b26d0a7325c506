"""What every attack is given, and what it must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from server_sdk.errors import ServerError

__all__ = ["Attack", "Differentiable", "Knowledge", "Progress"]

Array = npt.NDArray[np.float32]
Progress = Callable[[int, int, float], None]


class Differentiable(Protocol):
    """A victim whose activations have a gradient."""

    def send(self, x: Tensor) -> Tensor:
        """Inputs (N, *input_shape) in [0, 1] to activations (N, *shape)."""


@dataclass(frozen=True)
class Knowledge:
    """What a foe has beside the victims' activations.

    The foe knows the whole pipeline: it ran the victim's own graphs, defence on, over samples of its own.

    Attributes:
        x: float32 (M, *input_shape) in [0, 1], disjoint from training and from the victims.
        seen: float32 (M, *shape): what crossed the wire for each of them; for a floor the decision alone.
        twin: the pipeline again, differentiable, or None.
    """

    x: Array = field(repr=False)
    seen: Array = field(repr=False)
    twin: Differentiable | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self.x) != len(self.seen) or not len(self.x):
            raise ServerError(f"{len(self.x)} auxiliary samples and what is seen of {len(self.seen)}: give both")


class Attack(Protocol):
    """Rebuilds inputs from what crosses the wire."""

    @property
    def name(self) -> str:
        """Short and stable, for tables."""

    @property
    def victims(self) -> int | None:
        """How many victims are attacked, the first of them; None: all."""

    @property
    def sends(self) -> int:
        """Over how many sends of each sample, under as many versions of the front, the foe takes the mean."""

    def fits(self, shape: tuple[int, ...], *, twin: bool) -> bool:
        """Whether activations of this shape (of one sample) can be attacked so, with or without a twin."""

    def rebuild(self, knowledge: Knowledge, seen: Array, *, seed: int, progress: Progress | None = None) -> Array:
        """Attack.

        Args:
            knowledge: of the foe.
            seen: float32 (N, *shape), of the victims.
            seed: of everything that is drawn; the caller's random state is left alone.
            progress: called with (done, of how many, loss).

        Returns:
            float32 (N, *input_shape) in [0, 1].

        Raises:
            ServerError: shapes that do not fit each other.
        """
