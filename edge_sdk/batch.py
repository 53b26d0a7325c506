"""Sensor arrays become the float32 batch that the front takes, or a clear error; samples become batches in an order.

Float samples must lie in [0, 1]. Unsigned integers are scaled from their type's range. Signed integers are a sensor's
own units: one affine map takes the bundle's ``input_range`` to [0, 1], and what lies outside is clipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import BatchError

__all__ = ["Range", "Samples", "as_batch", "as_labels", "batches", "shuffled"]

_REMEDY = "export the bundle with --input-range LOW HIGH, the sensor values that become 0 and 1"
Range = tuple[float, float]


@dataclass(frozen=True)
class Samples:
    """Samples with their labels.

    Attributes:
        x: (N, C, H, W) or, signals, (N, C, T): float32 in [0, 1], or integers, which stay small until a batch is made.
        y: int64 (N), labels 0 to K-1.
        groups: int64 (N), the patient or record of each, or None where each sample is its own.
    """

    x: npt.NDArray[Any]
    y: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: npt.NDArray[np.int64]) -> Samples:
        """The samples at these positions."""
        groups = None if self.groups is None else self.groups[index]
        return Samples(self.x[index], self.y[index], groups)


def as_batch(
    x: npt.ArrayLike, input_shape: tuple[int, ...], *, max_batch: int, input_range: Range | None = None
) -> npt.NDArray[np.float32]:
    """Check one batch of sensor data.

    Args:
        x: (N, *input_shape), 1 <= N <= max_batch; floats in [0, 1], unsigned integers scaled by their type's range, or
            signed integers in the sensor's units.
        input_shape: shape of one sample in the bundle.
        max_batch: largest batch of the bundle.
        input_range: of the bundle: the sensor values that become 0 and 1; what lies beyond is clipped. Concerns signed
            integers alone, which need it.

    Returns:
        Contiguous float32 (N, *input_shape) in [0, 1].

    Raises:
        BatchError: another shape or type, NaN or infinity, floats outside [0, 1], signed integers without a range, an
            empty or too large batch.
    """
    array = np.asarray(x)
    expected = "x".join(map(str, input_shape))
    if array.ndim != len(input_shape) + 1 or array.shape[1:] != input_shape:
        got = "x".join(map(str, array.shape)) or "a scalar"
        raise BatchError(
            f"the bundle takes batches of shape Nx{expected}, this one is {got}: reshape it or use its bundle"
        )
    if not 1 <= len(array) <= max_batch:
        raise BatchError(f"a batch has 1 to {max_batch} samples, this one has {len(array)}: split it")
    if array.dtype.kind == "u":
        return np.ascontiguousarray(array, dtype=np.float32) / np.float32(np.iinfo(array.dtype).max)
    if array.dtype.kind == "i":
        if input_range is None:
            raise BatchError(f"samples are {array.dtype}, a sensor's own units, and the bundle has no range: {_REMEDY}")
        low, high = input_range
        scaled = np.clip((array.astype(np.float64) - low) / (high - low), 0.0, 1.0)
        return np.ascontiguousarray(scaled, dtype=np.float32)
    if array.dtype.kind != "f":
        raise BatchError(f"samples are integers or floats, these are {array.dtype}: convert them first")
    batch = np.ascontiguousarray(array, dtype=np.float32)
    # The comparison is false for NaN, so this one pass finds NaN, infinity and range errors.
    if not ((batch >= 0) & (batch <= 1)).all():
        if not np.isfinite(batch).all():
            raise BatchError("the batch holds NaN or infinite values: check the sensor or drop these samples")
        raise BatchError(
            f"samples lie in [0, 1], these in [{batch.min():.4g}, {batch.max():.4g}]: "
            "scale them as the bundle's training data"
        )
    return batch


def as_labels(y: npt.ArrayLike, count: int, classes: int) -> npt.NDArray[np.int64]:
    """Check the labels of one batch.

    Returns:
        int64 (count,) in 0 to classes-1.

    Raises:
        BatchError: another length or type, or labels out of range.
    """
    labels = np.asarray(y)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise BatchError(f"{count} samples need {count} integer labels, got {labels.dtype} of shape {labels.shape}")
    if count and not (labels.min() >= 0 and labels.max() < classes):
        raise BatchError(f"labels are 0 to {classes - 1}, got {labels.min()} to {labels.max()}: relabel them")
    return labels.astype(np.int64)


def batches(
    samples: Samples, batch_size: int, *, seed: int, device: str, shift: int = 0, skip: int = 0
) -> Iterator[Samples]:
    """Endless full batches in an order that depends on the seed and the device alone.

    Every pass over the samples draws a new permutation; a batch may span two passes.

    Args:
        samples: what to draw from.
        batch_size: N of every batch.
        seed: of order and shifts, together with the device's name.
        device: the device's name.
        shift: move each image by up to this many pixels along each axis, each signal by as many steps in time
            (augmentation), repeating its border.
        skip: leave out the first of these batches, to go on where a device stopped.
    """
    generator = _generator(seed, device)
    axes = samples.x.ndim - 2
    order = np.empty(0, dtype=np.int64)
    for number in count():
        while len(order) < batch_size:
            order = np.concatenate([order, generator.permutation(len(samples))])
        index, order = order[:batch_size], order[batch_size:]
        offsets = generator.integers(0, 2 * shift + 1, (batch_size, axes)) if shift else None
        if number >= skip:
            batch = samples.take(index)
            yield batch if offsets is None else replace(batch, x=_shifted(batch.x, shift, offsets))


def shuffled(samples: Samples, *, seed: int, device: str) -> Samples:
    """Every sample once, in an order that depends on the seed and the device alone."""
    return samples.take(_generator(seed, device).permutation(len(samples)))


def _generator(seed: int, device: str) -> np.random.Generator:
    return np.random.default_rng([seed, *device.encode()])


def _shifted(x: npt.NDArray[Any], by: int, offsets: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    axes = x.shape[2:]
    grown = np.pad(x, ((0, 0), (0, 0), *((by, by) for _ in axes)), mode="edge")
    cut = [tuple(slice(start, start + size) for start, size in zip(row, axes, strict=True)) for row in offsets]
    return np.stack([image[(slice(None), *window)] for image, window in zip(grown, cut, strict=True)])
