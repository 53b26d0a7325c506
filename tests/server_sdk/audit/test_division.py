from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from edge_sdk.batch import Samples
from edge_sdk.dataset import Dataset
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


@pytest.mark.parametrize("by_group", [False, True])
def test_the_first_victims_are_of_all_test_samples_however_the_file_sorts_them(
    dataset: Dataset, by_group: bool
) -> None:
    order = np.argsort(dataset.test.y, kind="stable")
    dataset = replace(dataset, test=dataset.test.take(order))
    if by_group:
        dataset = grouped(dataset, np.arange(90) // 9)
    first, again, other = (divide(dataset, foe=0.4, seed=seed).victims for seed in (0, 0, 1))
    assert set(first.y[:15]) == {0, 1, 2}
    assert np.array_equal(first.x, again.x) and not np.array_equal(first.x, other.x)
    rows = [{(x.tobytes(), int(y)) for x, y in zip(part.x, part.y, strict=True)} for part in (first, dataset.test)]
    assert rows[0] == rows[1], "each keeps its class"


def test_the_seed_decides(dataset: Dataset) -> None:
    first, again, other = (divide(dataset, foe=0.5, seed=seed).auxiliary.x for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("foe", [0.0, 1.0, 0.99, -1, float("nan")])
def test_a_share_that_leaves_one_side_without_samples(dataset: Dataset, foe: float) -> None:
    with pytest.raises(ServerError, match=r"share|too few"):
        divide(dataset, foe=foe, seed=0)


def grouped(dataset: Dataset, groups: np.ndarray) -> Dataset:
    return replace(dataset, train=replace(dataset.train, groups=groups))


@pytest.mark.parametrize("foe", [0.2, 0.5, 0.8])
def test_groups_stay_together_and_come_as_close_to_the_share_as_they_can(dataset: Dataset, foe: float) -> None:
    groups = np.random.default_rng(0).integers(100, 110, 90)
    division = divide(grouped(dataset, groups), foe=foe, seed=0)
    mine, theirs = division.train.groups, division.auxiliary.groups
    assert mine is not None and theirs is not None and not set(mine) & set(theirs)
    assert len(mine) + len(theirs) == 90
    largest = np.bincount(groups).max()
    assert abs(len(theirs) - foe * 90) <= largest / 2, "one group more or less would be no closer"


def test_the_seed_decides_which_groups(dataset: Dataset) -> None:
    whole = grouped(dataset, np.arange(90) // 6)
    first, again, other = (divide(whole, foe=0.4, seed=seed).auxiliary.groups for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("groups", [np.zeros(90, np.int64), np.arange(90) % 3])
def test_groups_that_leave_one_side_without_a_class(dataset: Dataset, groups: np.ndarray) -> None:
    with pytest.raises(ServerError, match=r"groups have [01] samples of class \d: choose another share or seed"):
        divide(grouped(dataset, groups), foe=0.4, seed=0)
