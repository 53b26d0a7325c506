"""Divide labelled samples among devices so that each sees another mix of labels, as hospitals see other patients.

For every label the devices' shares are one draw of a symmetric Dirichlet distribution (Yurochkin et al., arXiv
1905.12022; "distribution-based label imbalance" in Li et al., arXiv 2102.02079). A small ``alpha`` gives most of a
label to one device; unequal sizes are a consequence.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import BatchError

__all__ = ["dirichlet_parts", "skew"]

_DRAWS = 1000


def dirichlet_parts(
    labels: NDArray[np.int64],
    devices: int,
    *,
    alpha: float,
    seed: int,
    least: int = 60,
    least_of_each: int = 1,
) -> list[NDArray[np.int64]]:
    """Draw a division until every device has enough samples.

    Args:
        labels: int64 (N,).
        devices: number of parts, at least 1.
        alpha: concentration, above 0: 0.3 is a strong skew, 100 hardly any.
        seed: the same seed gives the same division.
        least: samples that each part has at least.
        least_of_each: samples of each label that every part gets before the rest is drawn; a data file for a device
            must hold every class.

    Returns:
        For each device the positions of its samples, int64 and shuffled; every position is in exactly one part.

    Raises:
        BatchError: an ``alpha`` or a number out of its range, a label that is too rare, or no draw that gives every
            device ``least`` samples.
    """
    if devices < 1 or not (np.isfinite(alpha) and alpha > 0) or least < 0 or least_of_each < 0:
        raise BatchError(
            f"{devices} devices, alpha {alpha}, least {least}, least_of_each {least_of_each}: at least one device, "
            "an alpha above 0 and no negative number are needed"
        )
    names, counts = np.unique(labels, return_counts=True)
    rare = counts < devices * least_of_each
    if rare.any():
        raise BatchError(
            f"label {names[rare][0]} has {counts[rare][0]} samples for {devices} devices of {least_of_each} each: "
            "use fewer devices"
        )
    generator = np.random.default_rng(seed)
    for _ in range(_DRAWS):
        parts = _draw(labels, names, devices, alpha, least_of_each, generator)
        if min(map(len, parts)) >= least:
            return [generator.permutation(part) for part in parts]
    raise BatchError(
        f"{_DRAWS} draws with alpha {alpha} gave no division of {len(labels)} samples in which each of {devices} "
        f"devices has {least}: use a larger alpha, fewer devices or a smaller least"
    )


def skew(labels: NDArray[np.int64], parts: list[NDArray[np.int64]]) -> float:
    """How far the parts' label distributions are from that of all samples: 0 the same, towards 1 disjoint.

    Args:
        labels: int64 (N,).
        parts: positions of each part's samples, none of them empty.

    Returns:
        The total variation distance, averaged over the parts.
    """
    names = np.unique(labels)
    overall = np.array([(labels == name).mean() for name in names])
    own = np.array([[(labels[part] == name).mean() for name in names] for part in parts])
    return float(np.abs(own - overall).sum(axis=1).mean() / 2)


def _draw(
    labels: NDArray[np.int64],
    names: NDArray[np.int64],
    devices: int,
    alpha: float,
    least_of_each: int,
    generator: np.random.Generator,
) -> list[NDArray[np.int64]]:
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(devices)]
    for name in names:
        positions = generator.permutation(np.flatnonzero(labels == name))
        certain, rest = np.split(positions, [devices * least_of_each])
        shares = generator.dirichlet(np.full(devices, alpha))
        borders = np.round(np.cumsum(shares)[:-1] * len(rest)).astype(np.int64)
        for part, first, further in zip(parts, np.split(certain, devices), np.split(rest, borders), strict=True):
            part += [first, further]
    return [np.concatenate(part) for part in parts]
