"""When a step is due, on a clock that the test drives."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from edge_sdk import resending
from edge_sdk.budget import Allowance
from edge_sdk.errors import TransportError
from edge_sdk.front import FrontState
from edge_sdk.resending import Resending
from edge_sdk.state import MemoryState, OutboxStep


class Clock:
    """Stands for the time module, and for chance."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def uniform(self, low: float, high: float) -> float:
        return high


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    driven = Clock()
    monkeypatch.setattr(resending, "time", driven)
    monkeypatch.setattr(resending, "random", driven)
    return driven


def outbox(step: int, size: int = 10) -> OutboxStep:
    return OutboxStep(step, "train", (bytes(size),))


def due(waiting: Resending) -> list[int]:
    return [each.outbox.step for each in waiting.due()]


def test_nothing_waits_at_first(clock: Clock) -> None:
    waiting = Resending(resend_s=5.0, give_up_s=300.0, allowance=None)
    assert (waiting.steps, due(waiting), waiting.next_at(), waiting.get(1)) == (frozenset(), [], math.inf, None)


def test_a_step_is_due_once_and_again_after_its_pause_with_jitter(clock: Clock) -> None:
    waiting = Resending(resend_s=4.0, give_up_s=300.0, allowance=None)
    waiting.add(outbox(1))
    assert waiting.next_at() <= clock.now
    assert due(waiting) == [1] and due(waiting) == []
    assert waiting.next_at() == clock.now + 5.0
    clock.now += 5.0
    assert due(waiting) == [1]
    assert waiting.next_at() == clock.now + 10.0, "the pause doubles"
    each = waiting.get(1)
    assert each is not None and each.sent == 2


def test_each_step_has_its_own_pause_and_hurry_ends_all(clock: Clock) -> None:
    waiting = Resending(resend_s=4.0, give_up_s=300.0, allowance=None)
    waiting.add(outbox(1))
    due(waiting)
    clock.now += 5.0
    waiting.add(outbox(2))
    assert due(waiting) == [1, 2]
    clock.now += 5.0
    assert due(waiting) == [2]
    waiting.hurry()
    assert due(waiting) == [1, 2]
    assert waiting.next_at() == clock.now + 5.0, "the pauses begin anew"


def test_what_was_dropped_is_due_no_more(clock: Clock) -> None:
    waiting = Resending(resend_s=4.0, give_up_s=300.0, allowance=None)
    for step in (1, 2, 3):
        waiting.add(outbox(step))
    waiting.drop([1, 7])
    assert due(waiting) == [2, 3]
    waiting.clear()
    assert waiting.steps == frozenset()


def test_silence_counts_from_the_last_sign_of_life_or_from_when_waiting_began(clock: Clock) -> None:
    waiting = Resending(resend_s=4.0, give_up_s=30.0, allowance=None)
    clock.now += 500.0  # nobody waited for the server
    waiting.add(outbox(1))
    due(waiting)
    clock.now += 29.0
    assert due(waiting) == [1]
    waiting.heard()
    clock.now += 30.0
    assert due(waiting) == [1]
    clock.now += 30.0
    with pytest.raises(TransportError, match="no reply to step 1 for 30 s"):
        due(waiting)


def test_a_step_that_was_never_sent_is_not_given_up(clock: Clock) -> None:
    waiting = Resending(resend_s=4.0, give_up_s=30.0, allowance=None)
    waiting.add(outbox(1))
    clock.now += 3600.0
    assert due(waiting) == [1]


def test_what_the_allowance_does_not_grant_waits_unsent(clock: Clock) -> None:
    wall = SimpleNamespace(now=0.0)
    allowance = Allowance(600, MemoryState(FrontState(0, {})), lambda: wall.now)  # 100 at once, 500 in an hour
    waiting = Resending(resend_s=4.0, give_up_s=1e6, allowance=allowance)
    waiting.add(outbox(1, 80))
    assert due(waiting) == [1]
    allowance.spend(80)
    clock.now += 5.0
    assert due(waiting) == []
    each = waiting.get(1)
    assert each is not None and each.sent == 1
    assert waiting.next_at() == clock.now + 60.0, "at most a minute, for the wall's clock may be set"
    wall.now += 3600.0
    clock.now += 60.0
    assert due(waiting) == [1]
