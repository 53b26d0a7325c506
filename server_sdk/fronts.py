"""What becomes of the devices' fronts: each keeps its own, all share a mean, one goes from hand to hand, or none moves.

own      every device trains the front that it has
shared   every n rounds all give their fronts, and each goes on with the mean (federated averaging of the front,
         as in splitfed learning, arXiv 2004.12088)
relay    one device trains at a time and hands its front to the next (split learning, arXiv 1812.00564)
frozen   fronts stay as exported; every sample crosses the wire once and the server trains from its log
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["FRONTS", "WEIGHTS", "mean_front", "next_holder", "share_of"]

FRONTS = ("own", "shared", "relay", "frozen")
WEIGHTS = ("equal", "samples")
"""How unequal data counts: each device the same, or each by the number of its training samples."""

Front = Mapping[str, NDArray[np.float32]]


def share_of(counts: Sequence[int | None], weights: str) -> list[float]:
    """The weight of each device, with mean 1.

    Args:
        counts: training samples of each device, None where it did not say.
        weights: ``equal`` or ``samples``; a device that did not say counts as the mean of the others.
    """
    known = [count for count in counts if count]
    if weights == "equal" or not known:
        return [1.0] * len(counts)
    usual = sum(known) / len(known)
    raw = [float(count or usual) for count in counts]
    mean = sum(raw) / len(raw)
    return [value / mean for value in raw]


def mean_front(fronts: Sequence[Front], shares: Sequence[float]) -> dict[str, NDArray[np.float32]]:
    """The weighted mean of fronts with the same tensors, summed in float64 in the order given.

    Args:
        fronts: parameters, BatchNorm statistics and optimizer state of each device; at least one.
        shares: weight of each, positive.
    """
    total = sum(shares)
    names = fronts[0].keys()
    return {
        name: np.asarray(
            sum(share / total * front[name].astype(np.float64) for front, share in zip(fronts, shares, strict=True)),
            np.float64,
        ).astype(np.float32)
        for name in names
    }


def next_holder(asking: Collection[str], last: str) -> str:
    """Whose turn comes after ``last``: the next name in order among those who ask, then the first again."""
    names = sorted(asking)
    return next((name for name in names if name > last), names[0])
