from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edge_sdk.batch import Dataset, Samples
from server_sdk.audit.division import divide
from server_sdk.errors import ServerError


@pytest.fixture
def dataset(samples: Callable[[int, int], Samples]) -> Dataset:
    return Dataset(samples(90, 1), samples(30, 2), 3)


def test_parts_share_no_sample_and_keep_the_classes(dataset: Dataset) -> None:
    division = divide(dataset, foe=0.4, seed=0)
    rows = [{part.x[i].tobytes() for i in range(len(part))} for part in (division.train, division.auxiliary)]
    assert not rows[0] & rows[1]
    assert np.bincount(division.auxiliary.y).tolist() == [12, 12, 12]
    assert len(division.train) == 54
    assert division.victims is dataset.test


def test_the_seed_decides(dataset: Dataset) -> None:
    first, again, other = (divide(dataset, foe=0.5, seed=seed).auxiliary.x for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("foe", [0.0, 1.0, 0.99, -1, float("nan")])
def test_a_share_that_leaves_one_side_without_samples(dataset: Dataset, foe: float) -> None:
    with pytest.raises(ServerError, match=r"share|too few"):
        divide(dataset, foe=foe, seed=0)
