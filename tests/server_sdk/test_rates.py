"""A device gets its rate and its burst, whatever the others and the clock do."""

from __future__ import annotations

import random
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import ConfigError
from edge_sdk.limits import DEFAULT_LIMITS
from server_sdk.rates import RateLimits, Rates


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def rates(messages: float = 10, size: float = 1000, burst_s: float = 2.0, **options: Any) -> tuple[Rates, Clock]:
    clock = Clock()
    return Rates(RateLimits(messages, size, burst_s), clock, **options), clock


def taken(to: Rates, count: int, size: int = 0, device: str = "d1") -> int:
    return sum(to.allow(device, size) for _ in range(count))


def test_messages_burst_and_then_keep_their_rate() -> None:
    limited, clock = rates()
    assert taken(limited, 50) == 20
    assert limited.refused == {"d1": 30}
    for _ in range(5):
        clock.now += 0.5
        assert taken(limited, 50) == 5
    clock.now += 1000
    assert taken(limited, 50) == 20


def test_bytes_burst_and_then_keep_their_rate() -> None:
    limited, clock = rates()
    assert taken(limited, 5, 500) == 4
    clock.now += 0.25
    assert not limited.allow("d1", 251)
    assert limited.allow("d1", 250)
    assert not limited.allow("d1", 1)
    assert limited.allow("d1", 0)
    clock.now += 1000
    assert taken(limited, 5, 500) == 4


def test_what_is_refused_costs_nothing() -> None:
    limited, _ = rates()
    assert taken(limited, 1, 1900) == 1
    assert taken(limited, 100, 101) == 0
    assert limited.allow("d1", 100)
    assert taken(limited, 100) == 18


def test_devices_do_not_share() -> None:
    limited, _ = rates()
    assert taken(limited, 100, device="flood") == 20
    assert taken(limited, 20, device="d2") == 20
    assert limited.refused == {"flood": 80}


def test_a_message_beyond_a_whole_burst_passes_when_the_bucket_is_full_and_is_paid_for() -> None:
    limited, clock = rates()
    assert limited.allow("d1", 5000)
    clock.now += 3.0
    assert not limited.allow("d1", 1)
    clock.now += 1.0
    assert limited.allow("d1", 1000)
    assert not limited.allow("d1", 5000)


def test_less_than_one_message_in_a_burst_still_lets_one_through() -> None:
    limited, clock = rates(messages=0.1, burst_s=1.0)
    assert taken(limited, 3) == 1
    clock.now += 9.9
    assert not limited.allow("d1", 0)
    clock.now += 0.2
    assert limited.allow("d1", 0)


def test_a_clock_that_is_set_back_gives_nothing_and_takes_nothing() -> None:
    limited, clock = rates()
    assert taken(limited, 20) == 20
    clock.now -= 500
    assert taken(limited, 5) == 0
    clock.now += 0.1
    assert taken(limited, 5) == 1
    clock.now += 1e12
    assert taken(limited, 50) == 20


def test_devices_are_bounded_and_the_silent_ones_give_way() -> None:
    limited, clock = rates(max_devices=3)
    for name in ("a", "b", "c"):
        assert limited.allow(name, 1000)
    assert not limited.allow("new", 0)
    assert limited.refused == {"": 1}
    clock.now += 0.9
    assert taken(limited, 20, device="a") == 20
    assert not limited.allow("new", 0), "b needs its full second"
    clock.now += 0.25
    assert limited.allow("new", 0), "b was silent longest and has all it may have"
    assert taken(limited, 50, device="a") == 2, "a was not forgotten"


def test_a_flooding_device_is_not_forgotten_by_hiding_among_many_names() -> None:
    limited, clock = rates(max_devices=2)
    assert taken(limited, 30, device="flood") == 20
    assert limited.allow("d2", 0)
    for number in range(50):
        limited.allow(f"name-{number}", 0)
    assert taken(limited, 30, device="flood") == 0
    assert limited.refused == {"flood": 40, "": 50}
    clock.now += 2.1
    assert limited.allow("d2", 0)
    assert limited.allow("d3", 0)
    assert limited.refused == {"": 60 + 30}, "the counts of a device that was forgotten stay in the sum"


def test_names_without_end_take_no_memory() -> None:
    limited, _ = rates(max_devices=10)
    tracemalloc.start()
    try:
        for number in range(5000):
            limited.allow(f"name-{number}", 10)
        assert tracemalloc.get_traced_memory()[0] < 20_000
    finally:
        tracemalloc.stop()


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 900)), min_size=1, max_size=60), st.integers(0, 2**32))
def test_never_more_than_burst_and_rate_and_never_less_than_fair(steps: list[tuple[float, int]], seed: int) -> None:
    limited, clock = rates()
    order = random.Random(seed)
    start, messages, size = clock.now, 0, 0
    for wait_s, length in steps:
        clock.now += wait_s * order.random()
        passed = limited.allow("d1", length)
        messages, size = messages + passed, size + passed * length
        elapsed_s = clock.now - start
        assert messages <= 10 * (2 + elapsed_s) + 1e-6
        assert size <= 1000 * (2 + elapsed_s) + 1e-3
        assert passed or messages + 1 > 20 or size + length > 2000, "a burst was refused"


def test_the_defaults_let_the_largest_message_pass_at_once() -> None:
    limited, _ = rates(RateLimits().messages_per_s, RateLimits().bytes_per_s, RateLimits().burst_s)
    size = DEFAULT_LIMITS.max_message_bytes // DEFAULT_LIMITS.max_chunks
    assert taken(limited, DEFAULT_LIMITS.max_chunks, size) == DEFAULT_LIMITS.max_chunks


def test_the_time_of_a_decision_does_not_grow_with_the_devices() -> None:
    def cost_s(devices: int) -> float:
        limited = Rates(max_devices=devices)
        names = [f"d{number}" for number in range(devices)]
        for name in names:
            limited.allow(name, 1)
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            for number in range(2000):
                limited.allow(names[number % devices], 1)
            best = min(best, time.perf_counter() - started)
        return best

    assert cost_s(20_000) < 10 * cost_s(10)


@pytest.mark.parametrize("field", ["messages_per_s", "bytes_per_s", "burst_s"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "8", None])
def test_limits_that_are_none_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field}=.* positive number"):
        RateLimits(**{field: value})


def test_no_room_for_any_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Rates(max_devices=0)


def test_the_counts_cannot_be_changed_from_outside() -> None:
    limited, _ = rates()
    with pytest.raises(TypeError):
        limited.refused["d1"] = 0  # type: ignore[index]
