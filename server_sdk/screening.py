"""What becomes of activations that are far too large: refused, or clipped to a norm that the operator chose.

The same bits in give the same bits out, sample by sample: neither the rest of the batch nor the number of threads
matters, so that a replayed step trains as it did before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ConfigError, WireError

__all__ = ["MAX_ACTIVATION", "Screen"]

MAX_ACTIVATION = 1e6
"""Largest magnitude of an activation that is no sign of a front that has diverged."""

_LEAST_NORM, _LARGEST = 1e-6, 1e12  # in between, sums of squares fit float32
_MARGIN = 0.98  # more than the relative error of such a sum
_INSIDE = 1 - 2.0**-22  # a clipped sample stays within the norm when its elements are rounded to float32

_FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Screen:
    """The policy of a run for activations of huge magnitude.

    Clipping scales a whole sample to the norm, as gradient clipping does (Pascanu et al. 2013, algorithm 1); the
    gradient of the step is that of the clipped activations.

    Attributes:
        max_norm: largest L2 norm of one sample, 1e-6 to 1e12; None for no limit of the norm.
        when_large: what becomes of a sample above ``max_norm``: ``refuse`` the step, or ``clip`` the sample.
        max_activation: a step with an element beyond this magnitude is always refused, above 0 to 1e12.

    Raises:
        ConfigError: a value out of its range.
    """

    max_norm: float | None = None
    when_large: Literal["refuse", "clip"] = "refuse"
    max_activation: float = MAX_ACTIVATION

    def __post_init__(self) -> None:
        if self.when_large not in ("refuse", "clip"):
            raise ConfigError(f"when_large={self.when_large!r}: use refuse or clip")
        if self.max_norm is not None and not _LEAST_NORM <= self.max_norm <= _LARGEST:
            raise ConfigError(f"max_norm={self.max_norm!r}: choose {_LEAST_NORM:g} to {_LARGEST:g}, or none")
        if not 0 < self.max_activation <= _LARGEST:
            raise ConfigError(f"max_activation={self.max_activation!r}: choose a positive number up to {_LARGEST:g}")

    def check(self, activations: _FloatArray) -> tuple[_FloatArray, int]:
        """Apply the policy to the activations of one step.

        Args:
            activations: float32 (N, *cut), never written to.

        Returns:
            The activations, the very object where nothing is clipped, and the number of samples that were clipped.

        Raises:
            WireError: reason ``nonfinite`` (NaN or infinity) or ``range`` (beyond ``max_activation``, or beyond
                ``max_norm`` where that refuses).
        """
        if not activations.size:
            return activations, 0
        largest = max(float(activations.max()), -float(activations.min()))
        if not math.isfinite(largest):
            raise WireError("nonfinite", "the activations hold NaN or infinity: start the front from the bundle again")
        if largest > self.max_activation:
            raise WireError(
                "range",
                f"activations beyond {self.max_activation:g}: the front has diverged, start it from the bundle again",
            )
        samples = activations.reshape(len(activations), -1)
        if self.max_norm is None or largest * math.sqrt(samples.shape[1]) <= self.max_norm:
            return activations, 0
        rough = np.square(samples).sum(axis=1)
        suspects = np.flatnonzero(rough > _MARGIN * self.max_norm**2)
        exact = samples[suspects].astype(np.float64)
        norms = np.sqrt(np.square(exact).sum(axis=1))
        above = norms > self.max_norm
        count = int(above.sum())
        if not count:
            return activations, 0
        if self.when_large == "refuse":
            raise WireError(
                "range",
                f"{count} of {len(samples)} samples are beyond the norm {self.max_norm:g}: the front has diverged, "
                "start it from the bundle again",
            )
        clipped = np.array(activations, dtype=np.float32, order="C")
        factors = _INSIDE * self.max_norm / norms[above]
        clipped.reshape(samples.shape)[suspects[above]] = exact[above] * factors[:, None]
        return clipped, count
