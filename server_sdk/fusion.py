"""Decision-level fusion: the streams' probabilities, weighted by how sure each stream is of the sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from server_sdk.errors import ServerError

__all__ = ["BASE_WEIGHTS", "fuse"]

BASE_WEIGHTS: Mapping[str, float] = MappingProxyType({"recovered": 0.5, "fused": 0.3, "attacked": 0.2})
"""The paper's base weights."""


def fuse(probabilities: Mapping[str, Tensor], base_weights: Mapping[str, float] = BASE_WEIGHTS) -> Tensor:
    """Adaptive decision fusion (Khowaja et al., arXiv 2201.04569).

    With s_i the largest probability that stream i gives the sample, the stream's weight is ``w_i * s_i / D``
    with ``D = sum_j w_j * s_j`` over the streams present, so that a sample's weights sum to 1.

    Args:
        probabilities: stream -> (N, K), rows that sum to 1. A single stream is returned as it is.
        base_weights: stream -> w, finite and positive, for every stream present; others are ignored.

    Returns:
        (N, K) probabilities.

    Raises:
        ServerError: no stream, shapes that differ, a stream without a usable base weight.
    """
    if not probabilities:
        raise ServerError("there is no stream to fuse: give the probabilities of at least one")
    shapes = {tuple(scores.shape) for scores in probabilities.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise ServerError(f"the probabilities have the shapes {sorted(shapes)}: give all of them as (N, K)")
    if len(probabilities) == 1:
        return next(iter(probabilities.values()))
    weights = []
    for name, scores in probabilities.items():
        weight = base_weights.get(name, math.nan)
        if not (math.isfinite(weight) and weight > 0):
            raise ServerError(f"stream '{name}' has the base weight {weight}: give it a positive one")
        weights.append(weight * scores.amax(dim=1, keepdim=True))
    total = torch.stack(weights).sum(dim=0)
    return torch.stack(
        [weight / total * scores for weight, scores in zip(weights, probabilities.values(), strict=True)]
    ).sum(dim=0)
