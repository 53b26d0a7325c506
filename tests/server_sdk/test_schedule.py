"""When a round begins: complete or over its deadline, ordered by name; whose turn it is; when fronts are averaged."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from edge_sdk.wire import Message
from server_sdk.plan import TrainingPlan
from server_sdk.schedule import Gathering, Schedule


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def waiting(*devices: str) -> dict[str, Any]:
    return {name: SimpleNamespace(message=Message("train", "r", f"s-{name}", 7)) for name in devices}


class Store:
    """What a schedule asks of the activation store."""

    def __init__(self, complete: tuple[str, ...] = (), devices: tuple[str, ...] = (), epoch: int = 0) -> None:
        self.complete, self.devices, self.epoch, self.ready = complete, devices, epoch, False
        self.samples = 5

    def __len__(self) -> int:
        return self.samples


def state(plan: TrainingPlan, **fields: Any) -> Any:
    """What a schedule sees of a run."""
    usual = {
        "round": 0,
        "over": False,
        "waiting": {},
        "members": set(),
        "fronts": {},
        "owing": set(),
        "holder": "",
        "last": "",
        "version": 0,
        "store": Store(),
    }
    return SimpleNamespace(plan=plan, **(usual | fields))


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_a_round_is_ordered_by_name_in_whatever_order_steps_came(order: tuple[str, ...]) -> None:
    plan = TrainingPlan(devices=3, rounds=9)
    schedule = Schedule(10.0)
    for count in (1, 2):
        assert schedule.next(state(plan, waiting=waiting(*order[:count]), members=set(order[:count]))) is None
    proposal = schedule.next(state(plan, waiting=waiting(*order), members=set("abc")))
    assert proposal is not None and proposal.kind == "round"
    assert proposal.fields == {"round": 1, "steps": [[n, f"s-{n}", 7] for n in "abc"], "absent": []}


def test_the_first_round_waits_for_every_device_even_beyond_the_deadline() -> None:
    clock = Clock()
    schedule, run = Schedule(10.0, clock=clock), state(TrainingPlan(devices=2, rounds=9), waiting=waiting("a"))
    assert schedule.next(run) is None
    clock.now = 99
    assert schedule.next(run) is None


def test_the_absent_are_left_out_after_the_deadline() -> None:
    clock = Clock()
    schedule = Schedule(10.0, clock=clock)
    run = state(TrainingPlan(devices=2, rounds=9), round=3, waiting=waiting("a"), members={"a", "b"})
    assert schedule.next(run) is None
    clock.now = 9.9
    assert schedule.next(run) is None
    clock.now = 10
    proposal = schedule.next(run)
    assert proposal is not None and proposal.fields["absent"] == ["b"] and proposal.fields["steps"][0][0] == "a"
    clock.now = 15
    assert schedule.next(run) is None, "the patience begins anew with each round"


def test_async_takes_each_step_as_it_comes_and_nothing_after_the_end() -> None:
    plan = TrainingPlan(devices=2, rounds=9, schedule="async")
    run = state(plan, waiting=waiting("b", "a"), members={"a", "b", "c"})
    proposal = Schedule(10.0).next(run)
    assert proposal is not None and proposal.fields["steps"] == [["b", "s-b", 7]]
    run.over = True
    assert Schedule(10.0).next(run) is None


def test_a_mean_waits_for_those_who_owe_their_front() -> None:
    clock = Clock()
    schedule = Schedule(10.0, clock=clock)
    plan = TrainingPlan(devices=2, rounds=9, fronts="shared")
    run = state(plan, fronts=waiting("b"), owing={"a"})
    assert schedule.next(run) is None
    run.fronts, run.owing = waiting("b", "a"), set()
    proposal = schedule.next(run)
    assert proposal is not None and proposal.kind == "synchronise"
    assert proposal.fields == {"steps": [["a", "s-a", 7], ["b", "s-b", 7]], "mean": True, "holder": ""}
    run.fronts, run.owing = waiting("b"), {"a"}
    assert schedule.next(run) is None
    clock.now = 10
    late = schedule.next(run)
    assert late is not None and [step[0] for step in late.fields["steps"]] == ["b"]


def test_turns_are_given_in_order_and_taken_from_the_silent() -> None:
    clock = Clock()
    schedule = Schedule(10.0, clock=clock)
    plan = TrainingPlan(devices=2, rounds=9, fronts="relay")
    run = state(plan, fronts=waiting("b"))
    assert schedule.next(run) is None, "the first turn waits for every device"
    run.fronts = waiting("b", "a")
    proposal = schedule.next(run)
    assert proposal is not None and proposal.fields == {"steps": [["a", "s-a", 7]], "mean": False, "holder": "a"}
    run.fronts, run.holder, run.last = waiting("b"), "a", "a"
    assert schedule.next(run) is None, "a has its turn"
    clock.now = 9
    run.round = 1
    assert schedule.next(run) is None
    clock.now = 18
    assert schedule.next(run) is None, "a trained a round, so the patience began anew"
    clock.now = 19
    taken = schedule.next(run)
    assert taken is not None and taken.fields["holder"] == "b"
    run.over, run.holder = True, ""
    last = schedule.next(run)
    assert last is not None and last.fields["holder"] == "" and not last.fields["mean"]


def test_an_epoch_begins_when_every_sample_is_there_and_then_again_and_again() -> None:
    clock = Clock()
    schedule = Schedule(10.0, clock=clock)
    plan = TrainingPlan(devices=2, rounds=9, fronts="frozen")
    assert schedule.next(state(plan, store=Store(("a",), ("a", "b")))) is None
    first = schedule.next(state(plan, store=Store(("a", "b"), ("a", "b"))))
    assert first is not None and (first.kind, first.fields) == ("epoch", {"number": 1, "samples": 5})
    second = schedule.next(state(plan, store=Store(("a",), ("a", "b"), epoch=1)))
    assert second is not None and second.fields["number"] == 2, "a late joiner stops nobody"


def test_samples_that_never_come_hold_the_first_epoch_up_for_the_deadline_only() -> None:
    clock, store = Clock(), Store(("a",), ("a", "b"))
    schedule, run = Schedule(10.0, clock=clock), state(TrainingPlan(devices=2, rounds=9, fronts="frozen"), store=store)
    assert schedule.next(run) is None
    clock.now = 9
    store.samples = 6
    assert schedule.next(run) is None, "the patience begins anew with each sample"
    clock.now = 18
    assert schedule.next(run) is None
    clock.now = 19
    assert schedule.next(run) is not None
    alone = state(run.plan, store=Store((), ("b",)))
    schedule = Schedule(10.0, clock=clock)
    assert schedule.next(alone) is None
    clock.now = 99
    assert schedule.next(alone) is None, "nothing begins before every device has sent something"


def test_the_patience_ends_only_while_somebody_is_there() -> None:
    clock = Clock()
    gathering = Gathering(5.0, clock=clock)
    assert not gathering.over((), ("a",))
    clock.now = 100
    assert not gathering.over(("b",), ("a", "b")), "the clock runs since the first came"
    clock.now = 104
    assert not gathering.over((), ("a", "b")), "and begins anew when nobody is left"
    clock.now = 105
    assert not gathering.over(("b",), ("a", "b"))
    clock.now = 110
    assert gathering.over(("b",), ("a", "b"))
