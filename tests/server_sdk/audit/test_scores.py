"""Balanced accuracy and AUC against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from server_sdk.audit.scores import score
from server_sdk.errors import ServerError


def draw(classes: int, count: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Decisions somewhat better than chance, the first class as frequent as all others, some probabilities equal."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, classes, count) * generator.integers(0, 2, count)
    logits = generator.normal(size=(count, classes)).round(1)
    logits[np.arange(count), y] += 1.0
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return probabilities.astype(np.float32), y


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_they_are_scikit_learns(classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is in the extra 'demo'")
    probabilities, y = draw(classes)
    found = score(probabilities, y)
    decided = probabilities.argmax(axis=1)
    assert found.accuracy == pytest.approx(metrics.accuracy_score(y, decided))
    assert found.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(y, decided))
    if classes == 2:
        expected = metrics.roc_auc_score(y, probabilities[:, 1])
    else:
        expected = np.mean([metrics.roc_auc_score(y == k, probabilities[:, k]) for k in range(classes)])
    assert found.auc == pytest.approx(expected, abs=1e-5)


def test_classes_that_do_not_occur_do_not_count() -> None:
    probabilities, y = draw(3)
    wider = np.concatenate([probabilities, np.zeros((len(y), 2), np.float32)], axis=1)
    assert score(wider, y) == score(probabilities, y)
    alone = score(probabilities[y == 0], y[y == 0])
    assert alone.auc is None and alone.balanced_accuracy == alone.accuracy


def test_a_server_that_names_one_class_alone() -> None:
    y = np.array([0] * 9 + [1])
    found = score(np.tile(np.array([0.9, 0.1], np.float32), (10, 1)), y)
    assert (found.accuracy, found.balanced_accuracy, found.auc) == (0.9, 0.5, 0.5)


def test_what_does_not_fit_is_refused() -> None:
    for probabilities, y in ((np.zeros((2, 3)), np.zeros(3, int)), (np.zeros((0, 2)), np.zeros(0, int))):
        with pytest.raises(ServerError, match="decisions of shape"):
            score(probabilities.astype(np.float32), y)
