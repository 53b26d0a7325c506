"""Activations in 1, 2, 4 or 8 bits a value: docs/wire.md, section 6, "Few bits".

A value becomes the number (code) of the nearest of 2^bits levels that divide a range evenly. Each sample is packed on
its own into whole bytes, so that a sample can be read alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.codec import from_typed_array, to_typed_array
from edge_sdk.errors import ConfigError, WireError
from edge_sdk.limits import DEFAULT_LIMITS, Limits

__all__ = ["BITS", "PACKED_KEYS", "Codes", "Packing", "pack", "read_packed", "to_packed_entry"]

Array = npt.NDArray[np.float32]
Rows = npt.NDArray[np.uint8]

BITS = (1, 2, 4, 8)
"""Bits of a value that there are."""

PACKED_KEYS = frozenset({"data", "bits", "shape", "low", "high"})
"""Keys of a tensor whose values are packed."""


@dataclass(frozen=True)
class Packing:
    """How a device packs its activations.

    Attributes:
        bits: of a value: 1, 2, 4 or 8.
        low, high: the range of the codes, exactly float32, ``low`` below ``high``; values beyond it are clipped. Both
            None: from the smallest to the largest value of each message.

    Raises:
        ConfigError: a value out of its range.
    """

    bits: int
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"bits={self.bits!r}: choose one of {', '.join(map(str, BITS))}")
        if (self.low is None) != (self.high is None):
            raise ConfigError("give low and high of the range, or neither: then each message has its own")
        if self.low is not None and self.high is not None:
            try:
                Codes(self.bits, (1,), self.low, self.high)
            except WireError as exc:
                raise ConfigError(f"range {self.low!r} to {self.high!r}: {exc}") from exc

    def apply(self, activations: Array) -> Array:
        """What a receiver makes of these activations, (N, \\*cut) to (N, \\*cut).

        Raises:
            WireError: as ``pack``.
        """
        rows, codes = pack(activations, self)
        return codes.expand(rows)


@dataclass(frozen=True)
class Codes:
    """What packed bytes mean.

    Attributes:
        bits: of a value.
        shape: of one sample.
        low, high: values of the lowest and of the highest code.

    Raises:
        WireError: reason ``schema`` (no such bits or range) or ``nonfinite`` (levels beyond float32).
    """

    bits: int
    shape: tuple[int, ...]
    low: float
    high: float

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise WireError("schema", f"bits of a value must be one of {BITS}")
        for value in (self.low, self.high):
            if type(value) is not float or not _is_float32(value):
                raise WireError("schema", "low and high must be finite floats, exactly float32")
        if not self.low < self.high:
            raise WireError("schema", "low must be below high")
        if not np.isfinite(self.levels).all():
            raise WireError("nonfinite", "the range of the codes is beyond float32: give a smaller one")

    @property
    def values(self) -> int:
        """Values of one sample."""
        return math.prod(self.shape)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample."""
        return -(-self.values * self.bits // 8)

    @cached_property
    def levels(self) -> Array:
        """float32 (2^bits): low + code x (high - low) / (2^bits - 1), each operation rounded to float32."""
        last = 2**self.bits - 1
        low, high = np.float32(self.low), np.float32(self.high)
        with np.errstate(over="ignore", invalid="ignore"):
            levels: Array = low + np.arange(last + 1, dtype=np.float32) * (high - low) / np.float32(last)
        return levels

    @property
    def unused(self) -> int:
        """The bits of a sample's last byte that hold no value, as a mask."""
        return (1 << (8 * self.sample_bytes - self.values * self.bits)) - 1

    @cached_property
    def _bytes(self) -> Array:
        """float32 (256, 8 / bits): the values in each byte that there is."""
        codes = (np.arange(256)[:, None] >> _shifts(self.bits)) & (2**self.bits - 1)
        values: Array = self.levels[codes]
        return values

    def expand(self, rows: Rows) -> Array:
        """The values of packed samples.

        Args:
            rows: uint8 (N, sample_bytes).

        Returns:
            float32 (N, \\*shape).
        """
        values: Array = np.take(self._bytes, rows, axis=0).reshape(len(rows), -1)[:, : self.values]
        return values.reshape(len(rows), *self.shape)


def pack(activations: Array, packing: Packing) -> tuple[Rows, Codes]:
    """Pack a batch; equal batches give equal bytes.

    Args:
        activations: float32 (N, \\*shape), finite, not empty.

    Returns:
        uint8 (N, sample_bytes), and what they mean. A value is clipped to the range and rounded to the nearest level,
        ties to the even code; bits without a value are 0.

    Raises:
        WireError: reason ``nonfinite``: the batch's own range is beyond float32.
    """
    low, high = packing.low, packing.high
    if low is None or high is None:
        low, high = _range_of(activations)
    codes = Codes(packing.bits, activations.shape[1:], low, high)
    last, per_byte = 2**codes.bits - 1, 8 // codes.bits
    samples = activations.reshape(len(activations), -1).astype(np.float64)
    samples -= low
    samples *= last / (high - low)
    np.rint(samples, out=samples).clip(0, last, out=samples)
    nearest = np.zeros((len(samples), codes.sample_bytes * per_byte), np.uint8)
    nearest[:, : codes.values] = samples
    rows = np.zeros((len(samples), codes.sample_bytes), np.uint8)
    for place, shift in enumerate(_shifts(codes.bits)):
        rows |= nearest[:, place::per_byte] << shift
    return rows, codes


def to_packed_entry(name: str, activations: Array, packing: Packing) -> dict[str, object]:
    """A tensor's entry in a message's body.

    Raises:
        WireError: as ``pack``.
    """
    rows, codes = pack(activations, packing)
    return {
        "data": to_typed_array(name, rows),
        "bits": codes.bits,
        "shape": list(codes.shape),
        "low": codes.low,
        "high": codes.high,
    }


def read_packed(name: str, entry: Mapping[str, Any], limits: Limits = DEFAULT_LIMITS) -> tuple[Rows, Codes]:
    """Read a tensor's entry; nothing is expanded yet.

    Args:
        name: what errors call it.
        entry: a decoded map with ``bits``.
        limits: ``max_dims`` and ``max_elements`` hold for the expanded tensor, bits without a value included.

    Returns:
        uint8 (N, sample_bytes), sharing memory with the decoded bytes, and what they mean.

    Raises:
        WireError: reasons ``schema``, ``dtype``, ``shape``, ``limit``, ``nonfinite``.
    """
    if entry.keys() != PACKED_KEYS:
        raise WireError("schema", f"packed tensor {name!r} must have exactly the keys {', '.join(sorted(PACKED_KEYS))}")
    bits, dims = entry["bits"], entry["shape"]
    if type(bits) is not int or bits not in BITS:
        raise WireError("schema", f"packed tensor {name!r}: bits must be one of {BITS}")
    if not isinstance(dims, list):
        raise WireError("schema", f"packed tensor {name!r}: shape must list the dimensions of one sample")
    if not 1 <= len(dims) < limits.max_dims:
        raise WireError("limit", f"packed tensor {name!r} has {len(dims) + 1} dimensions: 2 to {limits.max_dims}")
    values = 1
    for dim in dims:
        if type(dim) is not int or dim < 1:
            raise WireError("shape", f"packed tensor {name!r} has a dimension that is no positive integer")
        values *= dim
        if values > limits.max_elements:
            raise WireError("limit", f"packed tensor {name!r} is above max_elements={limits.max_elements}")
    codes = Codes(bits, tuple(dims), entry["low"], entry["high"])
    rows = from_typed_array(name, entry["data"], limits)
    if rows.dtype != np.uint8:
        raise WireError("dtype", f"packed tensor {name!r} is {rows.dtype}: its data must be uint8")
    if rows.ndim != 2 or rows.shape[1] != codes.sample_bytes:
        raise WireError("shape", f"packed tensor {name!r}: its data must be (N, {codes.sample_bytes})")
    if rows.size * (8 // bits) > limits.max_elements:
        raise WireError("limit", f"packed tensor {name!r} is above max_elements={limits.max_elements}")
    if codes.unused and (rows[:, -1] & codes.unused).any():
        raise WireError("schema", f"packed tensor {name!r}: bits behind a sample's last value must be 0")
    return rows, codes


def _shifts(bits: int) -> Rows:
    return np.arange(8 - bits, -1, -bits, dtype=np.uint8)


def _is_float32(value: float) -> bool:
    with np.errstate(over="ignore"):
        return math.isfinite(value) and float(np.float32(value)) == value


def _range_of(activations: Array) -> tuple[float, float]:
    """Smallest and largest value; of a constant the value and a neighbour, so that it stays as it is."""
    low, high = activations.min(), activations.max()
    if low == high:
        with np.errstate(over="ignore"):
            low = np.nextafter(high, np.float32(-np.inf))
        if not np.isfinite(low):
            low, high = high, np.nextafter(high, np.float32(np.inf))
    return float(low), float(high)
