"""Data files become checked samples, and samples a data file.

A data file is an ``.npz`` with ``x_train``, ``y_train``, ``x_test``, ``y_test`` (or MedMNIST's ``train_images``,
``train_labels``, ``test_images``, ``test_labels``) and, where they are needed, three more keys:

- ``kind``: ``"signal"`` or ``"image"``; without it samples are images, unless the caller says otherwise, since
  (N, 8, 256) may be either. Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3; signals (N, T) or
  (N, C, T) with C up to 64.
- ``input_range``: two numbers, the sensor values that become 0 and 1.
- ``group_train``: an integer for each training sample, its patient or record: whoever divides the samples keeps a group
  together.

Float samples must lie in [0, 1]. Unsigned integers are scaled from their type's range. Signed integers are a sensor's
own units: one affine map takes ``input_range`` to [0, 1], and what lies outside is clipped. ``psgl-export build``
copies the range into the bundle, and from there on the bundle's counts, so that guide, devices and audit map alike.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.batch import Range, Samples
from edge_sdk.errors import BatchError

__all__ = ["Dataset", "load_dataset", "save_dataset"]

_NAMES = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)
_EXTRAS = ("kind", "input_range", "group_train")
_MAX_CLASSES = 1000
_MAX_LEADS = 64
_LEAST_SIZE = 8
_KINDS = ("image", "signal")
Extras = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Dataset:
    """A data file that was read and checked.

    Attributes:
        train: samples to train on.
        test: held-out samples.
        classes: number of classes K.
        notes: what was done to the samples on reading, one sentence each (padding of odd sizes).
        input_range: the sensor values that become 0 and 1, if the file names them.
    """

    train: Samples
    test: Samples
    classes: int
    notes: tuple[str, ...] = ()
    input_range: Range | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) or (C, T) of one sample."""
        return tuple(int(size) for size in self.train.x.shape[1:])


def load_dataset(path: str | Path, *, classes: int | None = None, signal: bool | None = None) -> Dataset:
    """Read a data file.

    Odd heights and widths are padded with zeros at the bottom and the right to even ones, signals of odd length by
    repeating their last value; ``notes`` says so.

    Args:
        path: the file.
        classes: K of the bundle that the samples are for; a device need not have samples of each class. None: the
            training labels say it.
        signal: whether the samples are signals; None: the file's ``kind`` says it.

    Raises:
        BatchError: no file, wrong keys or shapes, NaN, floats outside [0, 1], a range that is none, labels out of
            range; without ``classes`` a single class or a gap between labels.
    """
    path = Path(path)
    arrays, extras = _read(path)
    kind, input_range = _kind(path, extras), _range(path, extras)
    shaped = _signals if (kind == "signal" if signal is None else signal) else _images
    train, test = (_samples(path, arrays[i], arrays[i + 1], part, shaped) for i, part in ((0, "train"), (2, "test")))
    train = replace(train, groups=_groups(path, extras, len(train)))
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
    sizes = train.x.shape[2:]
    if not any(size % 2 for size in sizes):
        return Dataset(train, test, classes, (), input_range)
    padding = ((0, 0), (0, 0), *((0, size % 2) for size in sizes))
    was, now = ("x".join(str(size + size % 2 * more) for size in sizes) for more in (0, 1))
    if len(sizes) == 1:
        train, test = (replace(part, x=np.pad(part.x, padding, mode="edge")) for part in (train, test))
        note = f"signals of length {was} were padded with their last value to {now}"
    else:
        train, test = (replace(part, x=np.pad(part.x, padding)) for part in (train, test))
        note = f"images of {was} were padded with zeros to {now}"
    return Dataset(train, test, classes, (note,), input_range)


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


def save_dataset(path: str | Path, train: Samples, test: Samples, *, input_range: Range | None = None) -> None:
    """Write a data file that ``load_dataset`` reads: (N, C, T) as signals, (N, C, H, W) as images.

    Raises:
        BatchError: the disk refuses.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {"x_train": train.x, "y_train": train.y, "x_test": test.x, "y_test": test.y}
        arrays["kind"] = np.array(_KINDS[train.x.ndim == 3])
        if input_range is not None:
            arrays["input_range"] = np.array(input_range, np.float64)
        if train.groups is not None:
            arrays["group_train"] = train.groups
        np.savez(path, **arrays)
    except OSError as exc:
        raise BatchError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def _read(path: Path) -> tuple[list[npt.NDArray[Any]], Extras]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise BatchError(f"{path} is a single array: save x_train, y_train, x_test, y_test with numpy.savez")
        with loaded as archive:
            for names in _NAMES:
                if all(name in archive.files for name in names):
                    extras = {name: archive[name] for name in _EXTRAS if name in archive.files}
                    return [archive[name] for name in names], extras
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


def _kind(path: Path, extras: Extras) -> str:
    given = extras.get("kind", np.array("image"))
    if given.shape != () or str(given) not in _KINDS:
        raise BatchError(f"{path}: its kind is {str(given)[:40]!r}: write 'signal' or 'image'")
    return str(given)


def _range(path: Path, extras: Extras) -> Range | None:
    if "input_range" not in extras:
        return None
    given = extras["input_range"]
    if given.shape != (2,) or given.dtype.kind not in "iuf" or not np.isfinite(given).all() or given[0] >= given[1]:
        raise BatchError(
            f"{path}: its input_range is {str(given)[:40]}: write the sensor values that become 0 and 1, lower first"
        )
    return float(given[0]), float(given[1])


def _groups(path: Path, extras: Extras, count: int) -> npt.NDArray[np.int64] | None:
    given = extras.get("group_train")
    if given is None:
        return None
    if given.shape != (count,) or given.dtype.kind not in "iu":
        raise BatchError(
            f"{path}: its group_train is {given.dtype} of shape {given.shape}: "
            f"write one integer for each of the {count} training samples"
        )
    return given.astype(np.int64)


def _samples(
    path: Path,
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    part: str,
    shaped: Callable[[Path, npt.NDArray[Any], str], npt.NDArray[Any]],
) -> Samples:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if x.ndim == 0 or y.ndim != 1 or len(x) != len(y) or len(y) == 0:
        raise BatchError(
            f"{path}: {part} samples of shape {x.shape} with labels of shape {y.shape}: "
            "needed are N samples with N labels, at least one"
        )
    if y.dtype.kind == "f" and np.isfinite(y).all() and (y == np.round(y)).all():
        y = y.astype(np.int64)
    if y.dtype.kind not in "iu":
        raise BatchError(f"{path}: {part} labels are {y.dtype} (or NaN): they must be integers 0 to K-1")
    x = shaped(path, x, part)
    if x.dtype.kind not in "iuf":
        raise BatchError(f"{path}: {part} samples are {x.dtype}: needed are integers, or floats in [0, 1]")
    if x.dtype.kind == "f":
        if not np.isfinite(x).all():
            raise BatchError(f"{path}: {part} samples hold NaN or infinite values: drop or repair them")
        if x.min() < 0 or x.max() > 1:
            raise BatchError(
                f"{path}: {part} samples lie in [{x.min():.4g}, {x.max():.4g}]: floats must lie in [0, 1], "
                "divide them by their range, or keep the sensor's own units as signed integers"
            )
        x = x.astype(np.float32)
    return Samples(np.ascontiguousarray(x), y.astype(np.int64))


def _images(path: Path, x: npt.NDArray[Any], part: str) -> npt.NDArray[Any]:
    """(N, C, H, W), C 1 or 3."""
    if x.ndim not in (3, 4):
        raise BatchError(
            f"{path}: {part} samples of shape {x.shape}: needed are images (N, H, W), (N, H, W, C) or (N, C, H, W); "
            "for signals save kind='signal' in the file"
        )
    if x.ndim == 3:
        x = x[:, None]
    elif x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.shape[1] not in (1, 3) or min(x.shape[2:]) < _LEAST_SIZE:
        raise BatchError(
            f"{path}: {part} images of shape {x.shape[1:]}: needed are 1 or 3 channels and at least 8x8 pixels"
        )
    return x


def _signals(path: Path, x: npt.NDArray[Any], part: str) -> npt.NDArray[Any]:
    """(N, C, T), C 1 to 64."""
    if x.ndim == 2:
        x = x[:, None]
    if x.ndim != 3 or not 1 <= x.shape[1] <= _MAX_LEADS or x.shape[2] < _LEAST_SIZE:
        raise BatchError(
            f"{path}: {part} signals of shape {x.shape}: needed are (N, T) or (N, C, T) with 1 to {_MAX_LEADS} "
            f"channels and at least {_LEAST_SIZE} steps"
        )
    return x
