"""Sensor arrays become the float32 batch that the front takes, or a clear error; data files become shards.

A data file is an ``.npz`` with ``x_train``, ``y_train``, ``x_test``, ``y_test`` (or MedMNIST's ``train_images``,
``train_labels``, ``test_images``, ``test_labels``). Samples are images (N, H, W), (N, H, W, C) or (N, C, H, W) with
C 1 or 3, or signals (N, C, T) where the caller says so; integer samples are scaled from their type's range, float
samples must lie in [0, 1].
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import BatchError

__all__ = ["Dataset", "Samples", "as_batch", "as_labels", "batches", "load_dataset", "save_dataset", "shuffled"]

_NAMES = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)
_MAX_CLASSES = 1000


@dataclass(frozen=True)
class Samples:
    """Samples with their labels.

    Attributes:
        x: (N, C, H, W), uint8 or float32 in [0, 1]; integer samples stay small until a batch is made.
        y: int64 (N), labels 0 to K-1.
    """

    x: npt.NDArray[Any]
    y: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: npt.NDArray[np.int64]) -> Samples:
        """The samples at these positions."""
        return Samples(self.x[index], self.y[index])


@dataclass(frozen=True)
class Dataset:
    """A data file that was read and checked.

    Attributes:
        train: samples to train on.
        test: held-out samples.
        classes: number of classes K.
        notes: what was done to the samples on reading, one sentence each (padding of odd sizes).
    """

    train: Samples
    test: Samples
    classes: int
    notes: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of one sample."""
        return tuple(int(size) for size in self.train.x.shape[1:])


def as_batch(x: npt.ArrayLike, input_shape: tuple[int, ...], *, max_batch: int) -> npt.NDArray[np.float32]:
    """Check one batch of sensor data.

    Args:
        x: (N, *input_shape), 1 <= N <= max_batch; floats in [0, 1], or unsigned integers scaled by their type's range.
        input_shape: shape of one sample in the bundle.
        max_batch: largest batch of the bundle.

    Returns:
        Contiguous float32 (N, *input_shape) in [0, 1].

    Raises:
        BatchError: another shape or type, NaN or infinity, values outside [0, 1], an empty or too large batch.
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
    if array.dtype.kind != "f":
        raise BatchError(f"samples are unsigned integers or floats, these are {array.dtype}: convert them first")
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
        shift: move each image by up to this many pixels along each axis (augmentation), repeating its border.
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


def load_dataset(path: str | Path, *, classes: int | None = None) -> Dataset:
    """Read a data file.

    Odd heights and widths are padded with zeros at the bottom and the right to even ones; ``notes`` says so.

    Args:
        path: the file.
        classes: K of the bundle that the samples are for; a device need not have samples of each class. None: the
            training labels say it.

    Raises:
        BatchError: no file, wrong keys or shapes, NaN, values outside [0, 1], labels out of range; without
            ``classes`` a single class or a gap between labels.
    """
    path = Path(path)
    arrays = _read(path)
    train, test = (_samples(path, arrays[i], arrays[i + 1], part) for i, part in ((0, "train"), (2, "test")))
    if train.x.shape[1:] != test.x.shape[1:]:
        raise BatchError(
            f"{path}: training samples are {train.x.shape[1:]}, test samples {test.x.shape[1:]}: they must agree"
        )
    classes = _classes(path, train.y) if classes is None else classes
    for part, labels in (("training", train.y), ("test", test.y)):
        if labels.min() < 0 or labels.max() >= classes:
            raise BatchError(
                f"{path}: {part} labels go from {labels.min()} to {labels.max()}, "
                f"but there are {classes} classes, 0 to {classes - 1}: relabel them"
            )
    dataset = Dataset(train, test, classes)
    height, width = dataset.input_shape[1:]
    if height % 2 or width % 2:
        padding = ((0, 0), (0, 0), (0, height % 2), (0, width % 2))
        grown = [replace(part, x=np.pad(part.x, padding)) for part in (train, test)]
        note = f"images of {height}x{width} were padded with zeros to {height + height % 2}x{width + width % 2}"
        dataset = Dataset(grown[0], grown[1], classes, (note,))
    return dataset


def _classes(path: Path, labels: npt.NDArray[np.int64]) -> int:
    """How many classes training labels without gaps stand for."""
    present = np.unique(labels)
    classes = len(present)
    if classes < 2:
        raise BatchError(
            f"{path} has a single class ({present[0]}) in its training labels: a classifier needs at least two"
        )
    if classes > _MAX_CLASSES or present[0] != 0 or present[-1] != classes - 1:
        raise BatchError(
            f"{path}: training labels must be 0 to K-1 without gaps and K at most {_MAX_CLASSES}, "
            f"these are {classes} classes from {present[0]} to {present[-1]}: relabel them"
        )
    return classes


def save_dataset(path: str | Path, train: Samples, test: Samples) -> None:
    """Write a data file that ``load_dataset`` reads.

    Raises:
        BatchError: the disk refuses.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, x_train=train.x, y_train=train.y, x_test=test.x, y_test=test.y)
    except OSError as exc:
        raise BatchError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def _read(path: Path) -> list[npt.NDArray[Any]]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise BatchError(f"{path} is a single array: save x_train, y_train, x_test, y_test with numpy.savez")
        with loaded as archive:
            for names in _NAMES:
                if all(name in archive.files for name in names):
                    return [archive[name] for name in names]
            found = ", ".join(sorted(archive.files)[:12]) or "nothing"
            raise BatchError(
                f"{path} holds {found}: it needs x_train, y_train, x_test, y_test (or MedMNIST's train_images, ...)"
            )
    except FileNotFoundError as exc:
        raise BatchError(f"there is no data file at {path}") from exc
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as exc:
        raise BatchError(f"{path} is not a readable .npz file of plain arrays: save it again with numpy.savez") from exc
    except MemoryError as exc:
        raise BatchError(f"{path} does not fit into memory: use fewer samples") from exc


def _samples(path: Path, x: npt.NDArray[Any], y: npt.NDArray[Any], part: str) -> Samples:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if x.ndim not in (3, 4) or y.ndim != 1 or len(x) != len(y) or len(y) == 0:
        raise BatchError(
            f"{path}: {part} samples of shape {x.shape} with labels of shape {y.shape}: "
            "needed are images (N, H, W), (N, H, W, C) or (N, C, H, W) with N labels"
        )
    if y.dtype.kind == "f" and np.isfinite(y).all() and (y == np.round(y)).all():
        y = y.astype(np.int64)
    if y.dtype.kind not in "iu":
        raise BatchError(f"{path}: {part} labels are {y.dtype} (or NaN): they must be integers 0 to K-1")
    if x.ndim == 3:
        x = x[:, None]
    elif x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.shape[1] not in (1, 3) or min(x.shape[2:]) < 8:
        raise BatchError(
            f"{path}: {part} images of shape {x.shape[1:]}: needed are 1 or 3 channels and at least 8x8 pixels"
        )
    if x.dtype.kind not in "u":
        if x.dtype.kind not in "fi":
            raise BatchError(f"{path}: {part} samples are {x.dtype}: needed are unsigned integers, or floats in [0, 1]")
        if not np.isfinite(x).all():
            raise BatchError(f"{path}: {part} samples hold NaN or infinite values: drop or repair them")
        if x.min() < 0 or x.max() > 1:
            raise BatchError(
                f"{path}: {part} samples lie in [{x.min():.4g}, {x.max():.4g}]: "
                "floats must lie in [0, 1], divide them by their range"
            )
        x = x.astype(np.float32)
    return Samples(np.ascontiguousarray(x), y.astype(np.int64))
