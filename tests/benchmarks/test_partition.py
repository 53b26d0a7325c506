"""The Dirichlet division: nothing lost, nothing twice, repeatable, skewed, and nobody left with too little."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.partition import dirichlet_parts, skew
from edge_sdk.errors import BatchError

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 320))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("devices", "alpha"), [(1, 0.3), (3, 0.3), (3, 100.0), (7, 1.0)])
def test_every_sample_is_in_exactly_one_part(devices: int, alpha: float, seed: int) -> None:
    parts = dirichlet_parts(LABELS, devices, alpha=alpha, seed=seed)
    assert len(parts) == devices
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(LABELS)))
    assert all(part.dtype == np.int64 for part in parts)


def test_the_seed_and_nothing_else_says_who_gets_what() -> None:
    first = dirichlet_parts(LABELS, 3, alpha=0.3, seed=5)
    np.random.default_rng(1).random(100)
    again = dirichlet_parts(LABELS, 3, alpha=0.3, seed=5)
    other = dirichlet_parts(LABELS, 3, alpha=0.3, seed=6)
    assert [part.tolist() for part in first] == [part.tolist() for part in again]
    assert [sorted(part.tolist()) for part in first] != [sorted(part.tolist()) for part in other]


def test_parts_are_shuffled_and_not_sorted_by_label() -> None:
    part = max(dirichlet_parts(LABELS, 3, alpha=0.3, seed=0), key=len)
    changes = np.count_nonzero(np.diff(LABELS[part]))
    assert changes > len(part) / 2


def test_who_comes_first_in_the_data_does_not_always_go_to_the_first_device() -> None:
    labels = np.repeat(np.arange(10), 320)
    first = dirichlet_parts(labels, 3, alpha=100.0, seed=0)[0]
    within = first % 320
    assert 130 < within.mean() < 190


def test_a_small_alpha_skews_and_a_large_one_does_not() -> None:
    strong = [skew(LABELS, dirichlet_parts(LABELS, 3, alpha=0.3, seed=seed)) for seed in range(8)]
    weak = [skew(LABELS, dirichlet_parts(LABELS, 3, alpha=100.0, seed=seed)) for seed in range(8)]
    assert min(strong) > 0.25
    assert max(weak) < 0.08


def test_the_sizes_differ_where_labels_are_skewed() -> None:
    sizes = [len(part) for part in dirichlet_parts(LABELS, 3, alpha=0.3, seed=3)]
    assert max(sizes) > 2 * min(sizes)


def test_every_device_is_treated_alike() -> None:
    sizes = np.array([[len(p) for p in dirichlet_parts(LABELS, 3, alpha=0.3, seed=seed)] for seed in range(200)])
    shares = sizes.mean(axis=0) / len(LABELS)
    assert np.abs(shares - 1 / 3).max() < 0.03


@pytest.mark.parametrize("least", [60, 300, 700])
def test_every_part_has_its_minimum(least: int) -> None:
    for seed in range(10):
        assert min(len(part) for part in dirichlet_parts(LABELS, 3, alpha=0.3, seed=seed, least=least)) >= least


@pytest.mark.parametrize("each", [1, 5])
def test_every_part_has_every_label(each: int) -> None:
    for seed in range(5):
        for part in dirichlet_parts(LABELS, 3, alpha=0.05, seed=seed, least_of_each=each):
            assert np.bincount(LABELS[part], minlength=10).min() >= each


def test_what_is_left_after_the_guarantee_is_drawn_from_the_same_shares() -> None:
    sizes = [len(part) for part in dirichlet_parts(LABELS, 3, alpha=1000.0, seed=0, least_of_each=80)]
    assert max(sizes) < 1.05 * min(sizes)


def test_without_that_guarantee_a_strong_skew_leaves_labels_out() -> None:
    parts = dirichlet_parts(LABELS, 3, alpha=0.05, seed=0, least_of_each=0)
    assert min(np.bincount(LABELS[part], minlength=10).min() for part in parts) == 0
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(LABELS)))


def test_labels_need_not_be_numbered_without_gaps() -> None:
    labels = np.array([4, 9] * 50)
    parts = dirichlet_parts(labels, 2, alpha=1.0, seed=0, least=10)
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    assert all(set(labels[part]) == {4, 9} for part in parts)


def test_a_rare_label_is_named() -> None:
    labels = np.array([0] * 50 + [1] * 2)
    with pytest.raises(BatchError, match="label 1 has 2 samples for 3 devices of 1 each: use fewer devices"):
        dirichlet_parts(labels, 3, alpha=1.0, seed=0, least=1)
    assert len(dirichlet_parts(labels, 2, alpha=1.0, seed=0, least=1)) == 2


def test_a_minimum_that_no_draw_can_meet_is_refused() -> None:
    with pytest.raises(BatchError, match="each of 3 devices has 30"):
        dirichlet_parts(np.array([0, 1] * 40), 3, alpha=0.3, seed=0, least=30)


@pytest.mark.parametrize(
    ("devices", "alpha", "least", "each"),
    [
        (0, 0.3, 1, 1),
        (2, 0.0, 1, 1),
        (2, -1.0, 1, 1),
        (2, np.nan, 1, 1),
        (2, np.inf, 1, 1),
        (2, 1.0, -1, 1),
        (2, 1.0, 1, -1),
    ],
)
def test_numbers_out_of_their_range_are_refused(devices: int, alpha: float, least: int, each: int) -> None:
    with pytest.raises(BatchError, match="at least one device"):
        dirichlet_parts(LABELS, devices, alpha=alpha, seed=0, least=least, least_of_each=each)


def test_skew_is_the_total_variation_distance() -> None:
    labels = np.array([0, 0, 1, 1])
    assert skew(labels, [np.array([0, 2]), np.array([1, 3])]) == 0.0
    assert skew(labels, [np.array([0, 1]), np.array([2, 3])]) == 0.5
    assert skew(labels, [np.array([0]), np.array([1, 2, 3])]) == pytest.approx((1 / 2 + 1 / 6) / 2)
