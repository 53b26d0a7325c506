"""How good the server's decisions are where classes are unequal: balanced accuracy and AUC, beside plain accuracy."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torchmetrics.functional.classification import binary_auroc

from server_sdk.errors import ServerError

__all__ = ["Scores", "score"]


@dataclass(frozen=True)
class Scores:
    """Of one set of decisions.

    Attributes:
        accuracy: share of right decisions.
        balanced_accuracy: mean over the classes that occur of the share of their samples that is decided right.
        auc: area under the ROC curve: with two classes of class 1's probability, with more the mean over the classes
            that occur of each against the rest; None where a single class occurs.
    """

    accuracy: float
    balanced_accuracy: float
    auc: float | None


def score(probabilities: npt.NDArray[np.float32], y: npt.NDArray[np.int64]) -> Scores:
    """Score decisions.

    Args:
        probabilities: float32 (N, K) in [0, 1], N at least 1.
        y: int64 (N,), true classes in 0 to K-1.

    Raises:
        ServerError: shapes that do not fit each other.
    """
    if probabilities.ndim != 2 or y.shape != (len(probabilities),) or not len(y):
        raise ServerError(f"decisions of shape {probabilities.shape} for labels of shape {y.shape}")
    right = probabilities.argmax(axis=1) == y
    present = np.unique(y)
    balanced = np.mean([right[y == label].mean() for label in present])
    asked = [1] if probabilities.shape[1] == 2 else present
    auc = None if len(present) < 2 else float(np.mean([_auc(probabilities[:, k], y == k) for k in asked]))
    return Scores(float(right.mean()), float(balanced), auc)


def _auc(probability: npt.NDArray[np.float32], is_it: npt.NDArray[np.bool_]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        curve = binary_auroc(torch.from_numpy(np.clip(probability, 0, 1)), torch.from_numpy(is_it.astype(np.int64)))
    return float(curve)
