"""Who has which samples in an audit: the device trains, the foe has others, the victims are held out from both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_sdk.batch import Samples
from edge_sdk.dataset import Dataset
from server_sdk.errors import ServerError

__all__ = ["Division", "divide"]

_LEAST = 2


@dataclass(frozen=True)
class Division:
    """Parts that share no sample.

    Attributes:
        train: what the device trains on.
        auxiliary: what the foe has, drawn from the same population: a strong foe.
        victims: the test samples, which are attacked and on which accuracy is measured; in an order drawn by the seed,
            for a slow attack takes the first of them, and files are sorted by class or patient.
    """

    train: Samples
    auxiliary: Samples
    victims: Samples


def divide(dataset: Dataset, *, foe: float, seed: int) -> Division:
    """Give the foe a share of each class of the training samples, or of their groups; the rest trains.

    Args:
        foe: the foe's share, above 0 and below 1. Where samples have groups, the foe gets whole groups, as many as come
            closest to it.
        seed: of the draw.

    Raises:
        ServerError: a share out of range, or a class with too few samples for both.
    """
    if not 0 < foe < 1:
        raise ServerError(f"the foe's share is {foe:g}: choose one above 0 and below 1")
    generator = np.random.default_rng(seed)
    if dataset.train.groups is not None:
        return _by_group(dataset, dataset.train.groups, foe, generator)
    mine, theirs = [], []
    for label in range(dataset.classes):
        index = generator.permutation(np.flatnonzero(dataset.train.y == label))
        share = round(foe * len(index))
        if not _LEAST <= share <= len(index) - _LEAST:
            raise ServerError(f"class {label} has {len(index)} training samples: too few for a device and a foe")
        theirs.append(index[:share])
        mine.append(index[share:])
    train, auxiliary = (np.sort(np.concatenate(parts)) for parts in (mine, theirs))
    return Division(dataset.train.take(train), dataset.train.take(auxiliary), _shuffled(dataset.test, generator))


def _by_group(dataset: Dataset, groups: npt.NDArray[np.int64], foe: float, generator: np.random.Generator) -> Division:
    names = generator.permutation(np.unique(groups))
    taken = np.cumsum([(groups == name).sum() for name in names])
    count = int(np.abs(taken - foe * len(groups)).argmin()) + 1
    given = np.isin(groups, names[:count])
    mine, theirs = dataset.train.take(np.flatnonzero(~given)), dataset.train.take(np.flatnonzero(given))
    for who, samples, share in (("device", mine, len(names) - count), ("foe", theirs, count)):
        counts = np.bincount(samples.y, minlength=dataset.classes)
        if counts.min() < _LEAST:
            raise ServerError(
                f"the {who}'s {share} groups have {counts.min()} samples of class {counts.argmin()}: "
                "choose another share or seed"
            )
    return Division(mine, theirs, _shuffled(dataset.test, generator))


def _shuffled(samples: Samples, generator: np.random.Generator) -> Samples:
    return samples.take(generator.permutation(len(samples)))
