"""Huge activations are refused or clipped, by policy; everything else passes untouched."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import ConfigError, WireError
from server_sdk.screening import MAX_ACTIVATION, Screen

CUT = (4, 3, 3)


def activations(*norms: float, seed: int = 0) -> npt.NDArray[np.float32]:
    """One sample of each norm."""
    noise = np.random.default_rng(seed).standard_normal((len(norms), *CUT))
    noise /= np.sqrt(np.square(noise).sum(axis=(1, 2, 3), keepdims=True))
    scaled: npt.NDArray[np.float32] = (noise * np.array(norms).reshape(-1, 1, 1, 1)).astype(np.float32)
    return scaled


def norms(of: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = np.sqrt(np.square(of.reshape(len(of), -1).astype(np.float64)).sum(axis=1))
    return found


def refusal(screen: Screen, of: npt.NDArray[np.float32]) -> str:
    with pytest.raises(WireError) as caught:
        screen.check(of)
    assert "from the bundle again" in str(caught.value) and "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("when_large", ["refuse", "clip"])
@pytest.mark.parametrize("max_norm", [None, 10.0])
def test_what_is_not_above_passes_as_the_same_object(when_large: Any, max_norm: float | None) -> None:
    given_ones = activations(1, 9.99, 0)
    checked, clipped = Screen(max_norm, when_large).check(given_ones)
    assert checked is given_ones and clipped == 0


@pytest.mark.parametrize("when_large", ["refuse", "clip"])
def test_an_element_beyond_the_hard_limit_is_always_refused(when_large: Any) -> None:
    for sign in (1, -1):
        ones = np.ones((2, *CUT), np.float32)
        ones[1, 3, 2, 2] = sign * np.float32(MAX_ACTIVATION)
        assert Screen(when_large=when_large).check(ones)[0] is ones
        ones[1, 3, 2, 2] = sign * np.nextafter(np.float32(MAX_ACTIVATION), np.float32(np.inf))
        assert refusal(Screen(when_large=when_large), ones) == "range"
        assert refusal(Screen(1e9, when_large), ones) == "range"
    assert refusal(Screen(max_activation=0.5), np.full((1, 2), 0.6, np.float32)) == "range"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("screen", [Screen(), Screen(1.0, "clip"), Screen(1.0, "refuse"), Screen(1e12, "clip", 1e12)])
def test_what_is_not_finite_is_refused_and_never_clipped(screen: Screen, value: float) -> None:
    ones = activations(0.1, 5)
    ones[0, 0, 0, 0] = value
    assert refusal(screen, ones) == "nonfinite"


def test_refusing_says_how_many() -> None:
    with pytest.raises(WireError, match="2 of 3 samples are beyond the norm 10") as caught:
        Screen(10.0).check(activations(11, 9, 1000))
    assert caught.value.reason == "range"


def test_a_sample_of_exactly_the_norm_is_not_above_it() -> None:
    exact = np.array([[3, 4], [0, 5]], np.float32)
    assert Screen(5.0).check(exact)[0] is exact
    assert Screen(5.0, "clip").check(exact) == (exact, 0)


def test_clipping_scales_the_large_samples_and_leaves_the_others() -> None:
    before = activations(11, 9, 1000, 10.0001)
    before.flags.writeable = False
    kept = before.copy()
    after, clipped = Screen(10.0, "clip").check(before)
    assert clipped == 3 and after is not before
    assert np.array_equal(before, kept)
    assert after.dtype == np.float32 and after.shape == before.shape
    assert np.array_equal(after[1], before[1])
    assert np.allclose(norms(after)[[0, 2, 3]], 10, rtol=1e-6)
    direction = after[2].astype(float) / norms(after)[2] - before[2].astype(float) / norms(before)[2]
    assert np.abs(direction).max() < 1e-6


@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=12), st.floats(1e-6, 1e5), st.integers(0, 99))
def test_nothing_is_above_the_norm_afterwards(sizes: list[float], max_norm: float, seed: int) -> None:
    before = activations(*sizes, seed=seed)
    screen = Screen(max_norm, "clip")
    after, clipped = screen.check(before)
    assert clipped == int((norms(before) > max_norm).sum())
    assert (norms(after) <= max_norm).all()
    again, more = screen.check(after)
    assert again is after and more == 0


def test_a_sample_is_clipped_to_the_same_bits_in_any_batch_and_layout() -> None:
    batch = activations(*np.geomspace(1, 1e5, 20))
    screen = Screen(10.0, "clip")
    whole, _ = screen.check(batch)
    for index in range(len(batch)):
        alone, _ = screen.check(batch[index : index + 1])
        assert alone.tobytes() == whole[index : index + 1].tobytes()
    shifted = np.frombuffer(b"\0\0" + batch.tobytes(), np.uint8)[2:].view(np.float32).reshape(batch.shape)
    assert screen.check(shifted)[0].tobytes() == whole.tobytes()
    assert screen.check(np.asfortranarray(batch))[0].tobytes() == whole.tobytes()


def test_tiny_and_huge_norms_do_not_leave_float32() -> None:
    for size in (1.1e-6, 1e11):
        before = activations(size, size / 10)
        after, clipped = Screen(max(size / 2, 1e-6), "clip", 1e12).check(before)
        assert clipped == 1 and np.isfinite(after).all() and np.array_equal(after[1], before[1])


def test_no_samples_are_no_problem() -> None:
    empty = np.zeros((0, *CUT), np.float32)
    assert Screen(1.0).check(empty) == (empty, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"max_norm": 0},
        {"max_norm": -1.0},
        {"max_norm": float("nan")},
        {"max_norm": float("inf")},
        {"when_large": "ignore"},
        {"max_activation": 0},
        {"max_activation": float("nan")},
        {"max_activation": 1e13},
    ],
)
def test_a_policy_that_cannot_serve_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}="):
        Screen(**options)
