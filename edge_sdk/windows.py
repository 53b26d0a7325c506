"""A stream of sensor samples becomes windows of T samples that overlap, each checked before anything is computed of it.

A window that must not be used keeps its place and says why (``fault``): it is counted and never sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge_sdk.batch import Range
from edge_sdk.errors import ConfigError

__all__ = ["FAULTS", "Reading", "Window", "Windower", "Windowing", "scaled"]

FAULTS = {
    "not-finite": "it holds NaN or infinite values",
    "range": "it holds values that the sensor cannot measure",
    "rate": "its samples did not come at the configured rate",
    "shape": "it does not have the shape or type that the bundle takes",
}
"""Why a window is refused: each code with its sentence."""


class Reading(NamedTuple):
    """One sample of a sensor with the time at which it was taken.

    Attributes:
        at_s: seconds, of any clock that counts up.
        values: one number for each channel, or a number where there is one channel.
    """

    at_s: float
    values: Any


@dataclass(frozen=True)
class Windowing:
    """How samples become windows.

    Attributes:
        length: T, samples of a window, at least 2.
        hop: samples from the start of a window to that of the next, at least 1; ``length`` (None) for no overlap, more
            than ``length`` leaves samples out.
        channels: C, values of one sample.
        hz: samples in a second, against which the times of ``Reading`` are held; None: not checked.
        tolerance: how far the rate of a window may be from ``hz``, as a share of it.
        valid: lowest and highest value that the sensor can measure, in its own units (the limits of its converter); a
            window with a value beyond them is refused. Not the bundle's ``input_range``, which is narrower, and beyond
            which values are clipped as they were when the bundle was trained. None: not checked.

    Raises:
        ConfigError: a value out of its range.
    """

    length: int
    hop: int | None = None
    channels: int = 1
    hz: float | None = None
    tolerance: float = 0.1
    valid: Range | None = None

    def __post_init__(self) -> None:
        if self.length < 2 or self.channels < 1 or (self.hop is not None and self.hop < 1):
            raise ConfigError(
                f"windows of {self.length} samples, {self.channels} channels and hop {self.hop}: "
                "give at least 2, 1 and 1"
            )
        if self.hz is not None and not 0 < self.hz < math.inf:
            raise ConfigError(f"hz is {self.hz}: give the sensor's samples in a second")
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"tolerance is {self.tolerance}: give a share of hz between 0 and 1")
        if self.valid is not None and not -math.inf < self.valid[0] < self.valid[1] < math.inf:
            raise ConfigError(f"valid is {self.valid}: give two finite numbers, the lower one first")

    @property
    def step(self) -> int:
        """Samples from the start of a window to that of the next."""
        return self.length if self.hop is None else self.hop


@dataclass(frozen=True)
class Window:
    """One input of the front.

    Attributes:
        number: counted from 0 in its stream.
        x: of shape input_shape: floats in [0, 1] or integers, as ``as_batch`` takes them; never shown in a text.
        at_s: time of its first sample, or None where the source has no times.
        fault: a key of ``FAULTS``, or empty: only such a window may be sent.
    """

    number: int
    x: npt.NDArray[Any] = field(repr=False)
    at_s: float | None = None
    fault: str = ""


def scaled(x: npt.NDArray[np.float64], input_range: Range | None) -> npt.NDArray[np.float32]:
    """Sensor values as the bundle takes them: its range becomes [0, 1], what lies beyond is clipped.

    Without a range the values pass as they are, and must lie in [0, 1] already. NaN stays NaN.
    """
    if input_range is None:
        return x.astype(np.float32)
    low, high = input_range
    return np.clip((x - low) / (high - low), 0.0, 1.0).astype(np.float32)


class Windower:
    """Takes samples one by one and gives a window when one is complete; keeps ``length`` samples and no more.

    Args:
        windowing: length, hop, channels and what is checked.
        input_range: of the bundle, see ``scaled``.
    """

    def __init__(self, windowing: Windowing, input_range: Range | None = None) -> None:
        self._windowing = windowing
        self._input_range = input_range
        self._values = np.zeros((windowing.channels, windowing.length), np.float64)
        self._times = np.full(windowing.length, np.nan)
        self._filled = 0  # samples of the next window that are there; negative: samples to leave out first
        self._number = 0

    def forget(self) -> None:
        """The sensor was silent: what came before the gap is part of no further window."""
        self._filled = min(self._filled, 0)

    def add(self, sample: Any) -> Window | None:
        """Take one sample: a ``Reading``, C numbers, or one number; the window that it completes.

        A sample that is none (another number of channels, a text) counts as NaN, so that the others keep their time.
        """
        at_s, values = (sample.at_s, sample.values) if isinstance(sample, Reading) else (None, sample)
        if self._filled >= 0:
            self._values[:, self._filled] = self._column(values)
            self._times[self._filled] = np.nan if at_s is None else at_s
        self._filled += 1
        length, step = self._windowing.length, self._windowing.step
        if self._filled < length:
            return None
        x = scaled(self._values, self._input_range)
        started = float(self._times[0])
        window = Window(self._number, x, None if math.isnan(started) else started, self._fault(x))
        self._number += 1
        self._filled = length - step
        if self._filled > 0:
            self._values[:, : self._filled] = self._values[:, step:]
            self._times[: self._filled] = self._times[step:]
        return window

    def _column(self, values: Any) -> npt.NDArray[np.float64]:
        try:
            column = np.asarray(values, np.float64).reshape(-1)
        except (TypeError, ValueError, OverflowError):
            column = np.empty(0)
        return column if len(column) == self._windowing.channels else np.full(self._windowing.channels, np.nan)

    def _fault(self, x: npt.NDArray[np.float32]) -> str:
        if not np.isfinite(self._values).all():
            return "not-finite"
        valid = self._windowing.valid
        if valid is not None and not ((self._values >= valid[0]) & (self._values <= valid[1])).all():
            return "range"
        if not ((x >= 0) & (x <= 1)).all():
            return "range"
        return "" if self._steady() else "rate"

    def _steady(self) -> bool:
        """Whether the times fit the rate: on the whole, and with no gap inside that half of the rate would not have."""
        hz = self._windowing.hz
        if hz is None or np.isnan(self._times).all():
            return True
        pauses = np.diff(self._times)
        span_s = float(self._times[-1] - self._times[0])
        if not (pauses >= 0).all() or span_s <= 0:  # also where some samples have a time and some do not
            return False
        seen_hz = len(pauses) / span_s
        return abs(seen_hz - hz) <= self._windowing.tolerance * hz and bool(pauses.max() <= self._longest_s(hz))

    def _longest_s(self, hz: float) -> float:
        """A gap may be as long as the tolerance of a whole window, at least two samples: sensors deliver in bursts."""
        return max(2.0, self._windowing.tolerance * self._windowing.length) / hz
