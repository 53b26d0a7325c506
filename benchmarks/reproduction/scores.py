"""How well decisions are, and which weights of the decision fusion fit a validation part best."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch import Tensor

from server_sdk.fusion import BASE_WEIGHTS, fuse
from server_sdk.streams import STREAMS

__all__ = ["fit_weights", "follow", "relative", "score"]

_GRID = 20
_ALMOST_NONE = 1e-6  # `fuse` takes positive weights only


def score(probabilities: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, balanced accuracy and, of two classes, the area under the ROC curve, in percent.

    Args:
        probabilities: float (N, K).
        y: int64 (N,), with both classes where K is 2.
    """
    classes = probabilities.argmax(dim=1)
    found = {
        "accuracy": float((classes == y).double().mean()),
        "balanced": float(balanced_accuracy_score(y.numpy(), classes.numpy())),
    }
    if probabilities.shape[1] == 2:
        found["auc"] = float(roc_auc_score(y.numpy(), probabilities[:, 1].numpy()))
    return {name: 100.0 * value for name, value in found.items()}


def follow(classes: Tensor, guided: Tensor, y: Tensor) -> dict[str, float | None]:
    """How far decisions are the guide's, in percent.

    Args:
        classes: decisions, int64 (N,).
        guided: the guide's, int64 (N,).
        y: labels, int64 (N,).

    Returns:
        ``guide`` (its accuracy), ``agreement`` with it, ``follow_when_wrong`` (how many of its mistakes are repeated;
        None where it makes none).
    """
    wrong = guided != y
    repeated = (classes == guided)[wrong]
    return {
        "guide": 100.0 * float((~wrong).double().mean()),
        "agreement": 100.0 * float((classes == guided).double().mean()),
        "follow_when_wrong": 100.0 * float(repeated.double().mean()) if len(repeated) else None,
    }


def fit_weights(probabilities: Mapping[str, Tensor], y: Tensor, grid: int = _GRID) -> dict[str, float]:
    """Base weights of `fuse` with the best accuracy on these samples, from a grid on the simplex.

    Among equals the weights nearest to the paper's are taken, so that a small validation part that cannot tell
    weights apart leaves them where they were.

    Args:
        probabilities: stream -> (N, K), of validation samples under the attack.
        y: int64 (N,).
        grid: the weights are multiples of 1/grid; 0 is written as 1e-6.
    """
    best: tuple[float, float] | None = None
    chosen: dict[str, float] = {}
    for first, second in product(range(grid + 1), repeat=2):
        if first + second > grid:
            continue
        shares = (first / grid, second / grid, (grid - first - second) / grid)
        weights = {name: max(share, _ALMOST_NONE) for name, share in zip(STREAMS, shares, strict=True)}
        right = float((fuse(probabilities, weights).argmax(dim=1) == y).double().mean())
        distance = sum((weights[name] - BASE_WEIGHTS[name]) ** 2 for name in STREAMS)
        if best is None or (right, -distance) > best:
            best, chosen = (right, -distance), weights
    return chosen


def relative(found: Tensor, wanted: Tensor) -> float:
    """Distance in units of the norm of what was wanted."""
    return float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted))
