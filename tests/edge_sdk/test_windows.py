"""Samples become windows: where each begins, what it holds, and why one is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import ConfigError
from edge_sdk.windows import FAULTS, Reading, Window, Windower, Windowing


def windows(samples: Any, windowing: Windowing, input_range: tuple[float, float] | None = None) -> list[Window]:
    windower = Windower(windowing, input_range)
    return [window for window in map(windower.add, samples) if window is not None]


def timed(times: Any) -> list[Reading]:
    return [Reading(float(at_s), 0.5) for at_s in times]


@given(length=st.integers(2, 12), hop=st.integers(1, 20), channels=st.integers(1, 3), count=st.integers(0, 60))
def test_windows_are_slices_of_the_recording(length: int, hop: int, channels: int, count: int) -> None:
    recording = np.random.default_rng(0).random((channels, count))
    made = windows(recording.T, Windowing(length, hop, channels))
    starts = range(0, count - length + 1, hop)
    assert [window.number for window in made] == list(range(len(starts)))
    for window, start in zip(made, starts, strict=True):
        assert window.fault == "" and window.x.dtype == np.float32
        assert np.array_equal(window.x, recording[:, start : start + length].astype(np.float32))


def test_sensor_units_become_the_bundles_range_and_are_clipped() -> None:
    (window,) = windows([-600, -500, 0, 500, 700], Windowing(5), (-500.0, 500.0))
    assert window.fault == "" and np.allclose(window.x, [[0, 0, 0.5, 1, 1]])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "broken", [0.1, 0.2], [], 10**400])
def test_a_sample_that_is_none_spoils_its_windows_and_no_others(bad: Any) -> None:
    made = windows([0.1, 0.2, 0.3, 0.4, bad, 0.6, 0.7, 0.8, 0.9], Windowing(3, 1), (0.0, 1.0))
    assert [window.fault for window in made] == ["", "", *["not-finite"] * 3, "", ""]


def test_values_that_the_sensor_cannot_measure_are_refused() -> None:
    faults = [w.fault for w in windows([0, 100, 2048, 0, -2049, 5], Windowing(3, valid=(-2048, 2048)), (-10.0, 10.0))]
    assert faults == ["", "range"]
    assert [w.fault for w in windows([0.0, 1.0, 1.1, 1.0], Windowing(2))] == ["", "range"], "no range: already scaled"


def test_the_rate_is_held_against_the_times() -> None:
    steady = np.arange(200) / 100
    assert {w.fault for w in windows(timed(steady), Windowing(50, hz=100))} == {""}
    assert {w.fault for w in windows(timed(steady / 1.05), Windowing(50, hz=100))} == {""}, "within the tolerance"
    for factor in (0.5, 0.8, 1.25, 2.0):
        assert {w.fault for w in windows(timed(steady * factor), Windowing(50, hz=100))} == {"rate"}, factor
    gap = np.where(np.arange(200) < 75, steady, steady + 0.2)
    assert [w.fault for w in windows(timed(gap), Windowing(50, hz=100))] == ["", "rate", "", ""]
    back = [*steady[:60], *steady[50:190]]
    assert [w.fault for w in windows(timed(back), Windowing(50, hz=100))] == ["", "rate", "", ""]
    jitter = steady + np.random.default_rng(0).uniform(-0.004, 0.004, 200)
    assert {w.fault for w in windows(timed(jitter), Windowing(50, hz=100))} == {""}


def test_some_samples_without_a_time_do_not_pass_for_steady() -> None:
    mixed = [*timed(np.arange(9) / 10), 0.5]
    assert [w.fault for w in windows(mixed, Windowing(10, hz=10))] == ["rate"]
    assert [w.fault for w in windows([0.5] * 10, Windowing(10, hz=10))] == [""]
    (window,) = windows(timed(7 + np.arange(10) / 10), Windowing(10))
    assert window.at_s == 7.0


def test_after_a_silence_no_window_spans_the_gap() -> None:
    windower = Windower(Windowing(4))
    assert all(windower.add(0.1) is None for _ in range(3))
    windower.forget()
    assert all(windower.add(0.2) is None for _ in range(3))
    window = windower.add(0.2)
    assert window is not None and np.allclose(window.x, 0.2)


def test_a_window_shows_no_values() -> None:
    (window,) = windows([0.123456, 0.654321], Windowing(2))
    assert "123" not in repr(window)


@pytest.mark.parametrize(
    "options",
    [
        *({"length": 1}, {"hop": 0}, {"channels": 0}, {"hz": 0.0}, {"hz": math.inf}, {"tolerance": 1.0}),
        *({"valid": (1.0, 1.0)}, {"valid": (math.nan, 1.0)}),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give"):
        Windowing(**({"length": 8} | options))


def test_every_fault_has_a_sentence() -> None:
    assert set(FAULTS) >= {"not-finite", "range", "rate", "shape"} and all(map(str.strip, FAULTS.values()))
