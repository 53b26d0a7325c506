"""Rounds: complete or over their deadline, ordered by name, whatever the order of arrival."""

from __future__ import annotations

import itertools

import pytest

from edge_sdk.wire import Message
from server_sdk.inbox import Arrival
from server_sdk.schedule import Rounds


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(device: str, number: int = 1) -> Arrival:
    return Arrival(device, Message("train", "r", f"session-{device}", number, {}, {}))


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_a_round_is_ordered_by_name_in_whatever_order_steps_come(order: tuple[str, ...]) -> None:
    rounds = Rounds(3)
    for device in order:
        assert rounds.close() is None
        assert rounds.offer(step(device))
    closed = rounds.close()
    assert closed is not None and [s.device for s in closed.steps] == ["a", "b", "c"] and closed.absent == ()
    assert rounds.close() is None


def test_a_repeat_changes_nothing_and_a_newer_step_replaces() -> None:
    rounds = Rounds(1)
    assert rounds.offer(step("a")) and not rounds.offer(step("a")) and rounds.offer(step("a", 2))
    closed = rounds.close()
    assert closed is not None and [s.message.step for s in closed.steps] == [2]


def test_the_first_round_waits_for_every_device_even_beyond_the_deadline() -> None:
    clock = Clock()
    rounds = Rounds(2, deadline_s=10, clock=clock)
    rounds.offer(step("a"))
    clock.now = 99
    assert rounds.close() is None


def test_the_absent_are_dropped_after_the_deadline_and_may_come_back() -> None:
    clock = Clock()
    rounds = Rounds(2, deadline_s=10, clock=clock)
    for device in "ab":
        rounds.offer(step(device))
    assert rounds.close() is not None
    rounds.offer(step("a", 2))
    clock.now = 9.9
    assert rounds.close() is None
    clock.now = 10
    closed = rounds.close()
    assert closed is not None and [s.device for s in closed.steps] == ["a"] and closed.absent == ("b",)
    rounds.offer(step("a", 3))
    assert rounds.close() is not None, "nobody waits for b any more"
    rounds.offer(step("b", 2))
    assert rounds.members == ("a", "b")
    clock.now = 11
    closed = rounds.close()
    assert closed is None, "b is back, so the round waits for a"
