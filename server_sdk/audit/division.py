"""Who has which samples in an audit: the device trains, the foe has others, the victims are held out from both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_sdk.batch import Dataset, Samples
from server_sdk.errors import ServerError

__all__ = ["Division", "divide"]

_LEAST = 2


@dataclass(frozen=True)
class Division:
    """Parts that share no sample.

    Attributes:
        train: what the device trains on.
        auxiliary: what the foe has, drawn from the same population: a strong foe.
        victims: the test samples, which are attacked and on which accuracy is measured.
    """

    train: Samples
    auxiliary: Samples
    victims: Samples


def divide(dataset: Dataset, *, foe: float, seed: int) -> Division:
    """Give the foe a share of each class of the training samples; the rest trains.

    Args:
        foe: the foe's share, above 0 and below 1.
        seed: of the draw.

    Raises:
        ServerError: a share out of range, or a class with too few samples for both.
    """
    if not 0 < foe < 1:
        raise ServerError(f"the foe's share is {foe:g}: choose one above 0 and below 1")
    generator = np.random.default_rng(seed)
    mine, theirs = [], []
    for label in range(dataset.classes):
        index = generator.permutation(np.flatnonzero(dataset.train.y == label))
        share = round(foe * len(index))
        if not _LEAST <= share <= len(index) - _LEAST:
            raise ServerError(f"class {label} has {len(index)} training samples: too few for a device and a foe")
        theirs.append(index[:share])
        mine.append(index[share:])
    train, auxiliary = (np.sort(np.concatenate(parts)) for parts in (mine, theirs))
    return Division(dataset.train.take(train), dataset.train.take(auxiliary), dataset.test)
