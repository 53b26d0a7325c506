"""Sensor arrays: what is taken, what is refused with which words, and in which order batches come."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_sdk.batch import Samples, as_batch, as_labels, batches, shuffled
from edge_sdk.errors import BatchError

SHAPE = (1, 4, 4)


def test_integers_are_scaled_by_their_range() -> None:
    batch = as_batch(np.full((2, 1, 4, 4), 255, np.uint8), SHAPE, max_batch=4)
    assert batch.dtype == np.float32 and (batch == 1.0).all()
    assert (as_batch(np.full((1, 1, 4, 4), 65535, np.uint16), SHAPE, max_batch=4) == 1.0).all()


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((2, 4, 4)), "Nx1x4x4, this one is 2x4x4"),
        (np.zeros((0, 1, 4, 4)), "this one has 0"),
        (np.zeros((5, 1, 4, 4)), "1 to 4 samples"),
        (np.full((1, 1, 4, 4), np.nan), "NaN"),
        (np.full((1, 1, 4, 4), np.inf), "infinite"),
        (np.full((1, 1, 4, 4), 1.5), "scale them"),
        (np.full((1, 1, 4, 4), -0.1), "scale them"),
        (np.zeros((1, 1, 4, 4), np.int16), "int16, a sensor's own units.*--input-range LOW HIGH"),
        (np.zeros((1, 1, 4, 4), bool), "bool"),
        (np.array([["a"]]), "Nx1x4x4"),
        (3.0, "a scalar"),
    ],
)
def test_a_wrong_batch_is_refused_with_the_remedy(x: Any, words: str) -> None:
    with pytest.raises(BatchError, match=words):
        as_batch(x, SHAPE, max_batch=4)


def test_sensor_units_are_mapped_by_the_range_and_clipped() -> None:
    x = np.array([[[-2048, -100, 0, 150, 400, 401, 2047, 32767]]], np.int16)
    batch = as_batch(x, (1, 8), max_batch=4, input_range=(-100, 400))
    assert batch.dtype == np.float32 and batch.flags["C_CONTIGUOUS"]
    assert np.allclose(batch[0, 0], [0, 0, 0.2, 0.5, 1, 1, 1, 1])
    others = np.array([[[0, 51, 255, 0, 0, 0, 0, 0]]], np.uint8)
    assert np.allclose(as_batch(others, (1, 8), max_batch=4, input_range=(-100, 400))[0, 0, :3], [0, 0.2, 1])


@given(hnp.arrays(np.float32, (2, 1, 4, 4), elements=st.floats(-2, 2, width=32) | st.just(np.float32("nan"))))
def test_what_passes_lies_in_the_range(x: np.ndarray[Any, Any]) -> None:
    try:
        batch = as_batch(x, SHAPE, max_batch=4)
    except BatchError:
        assert not ((x >= 0) & (x <= 1)).all()
    else:
        assert ((batch >= 0) & (batch <= 1)).all()


@pytest.mark.parametrize("y", [[0, 3], [-1, 0], [0.0, 1.0], [0], [[0], [1]]])
def test_wrong_labels_are_refused(y: Any) -> None:
    with pytest.raises(BatchError):
        as_labels(y, 2, 3)


def test_batches_depend_on_seed_and_device_alone_and_cover_everything() -> None:
    samples = Samples(np.arange(10), np.arange(10))

    def draw(seed: int, device: str, count: int = 5) -> list[list[int]]:
        order = batches(samples, 4, seed=seed, device=device)
        return [next(order).y.tolist() for _ in range(count)]

    assert draw(1, "a") == draw(1, "a")
    assert draw(1, "a") != draw(1, "b") and draw(1, "a") != draw(2, "a")
    assert sorted(itertools.chain(*draw(1, "a"))) == sorted(2 * list(range(10))), (
        "two whole passes in five batches of four"
    )


def test_shifts_move_whole_images_and_repeat_their_border() -> None:
    images = np.zeros((40, 1, 8, 8), np.uint8)
    images[:, :, 3, 4] = 9
    moved = next(batches(Samples(images, np.arange(40)), 40, seed=0, device="a", shift=2)).x
    places = {tuple(np.argwhere(image[0] == 9)[0]) for image in moved}
    assert len(places) > 10 and all(abs(r - 3) <= 2 and abs(c - 4) <= 2 for r, c in places)
    bordered = np.arange(8, dtype=np.uint8)[None, None, None].repeat(8, 2)
    again = next(batches(Samples(bordered, np.zeros(1, int)), 1, seed=3, device="a", shift=3)).x
    assert set(np.unique(again)) <= set(range(8)) and again.shape == bordered.shape


def test_shifts_move_signals_in_time_with_all_their_channels() -> None:
    beats = np.zeros((40, 3, 32), np.int16)
    beats[:, :, 16] = 900
    moved = next(batches(Samples(beats, np.arange(40)), 40, seed=0, device="a", shift=4)).x
    peaks = moved.argmax(axis=2)
    assert moved.shape == beats.shape and (peaks == peaks[:, :1]).all()
    assert set(np.unique(peaks)) == set(range(12, 21))


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("skip", [1, 5, 17])
def test_batches_go_on_where_a_device_stopped(skip: int, shift: int) -> None:
    samples = Samples(np.random.default_rng(0).integers(0, 256, (23, 1, 8, 8), dtype=np.uint8), np.arange(23) % 3)
    whole = list(itertools.islice(batches(samples, 5, seed=3, device="d", shift=shift), skip + 4))
    rest = list(itertools.islice(batches(samples, 5, seed=3, device="d", shift=shift, skip=skip), 4))
    for ours, theirs in zip(rest, whole[skip:], strict=True):
        assert np.array_equal(ours.x, theirs.x) and np.array_equal(ours.y, theirs.y)


def test_shuffled_gives_each_sample_once_in_the_devices_own_order() -> None:
    samples = Samples(np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1), np.arange(40))
    first = shuffled(samples, seed=1, device="a")
    assert sorted(first.y.tolist()) == list(range(40)) and (first.x.ravel() == first.y).all()
    assert np.array_equal(first.y, shuffled(samples, seed=1, device="a").y)
    assert not np.array_equal(first.y, shuffled(samples, seed=1, device="b").y)
    assert not np.array_equal(first.y, shuffled(samples, seed=2, device="a").y)
