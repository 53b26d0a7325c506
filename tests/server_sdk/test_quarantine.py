"""A flooding device is left unread, the others are not, and afterwards everybody is heard again."""

from __future__ import annotations

import math
from typing import Any

import pytest

from edge_sdk import topics
from edge_sdk.errors import ConfigError, TransportError
from edge_sdk.memory_transport import MemoryBroker, MemoryTransport
from server_sdk.quarantine import Quarantine

STEPS, STATES = topics.every_step("ward"), topics.every_state("ward")


def step(device: str) -> str:
    return topics.up_step("ward", device)


def state(device: str) -> str:
    return topics.up_state("ward", device)


class Ward:
    """A quarantine on a broker in memory, its clock and its events."""

    def __init__(self, *known: str, after: int = 2, **options: Any) -> None:
        self.now_s = 1000.0
        self.events: list[dict[str, Any]] = []
        self.broker = MemoryBroker()
        self.server, self.sender = MemoryTransport(self.broker, "server"), MemoryTransport(self.broker, "sender")
        self.server.open()
        self.sender.open()
        options = {"first_s": 60.0, "longest_s": 200.0, **options}
        self.quarantine = Quarantine(
            self.server, "ward", after=after, on_event=self.events.append, clock=lambda: self.now_s, **options
        )
        self.after = after
        self.quarantine.open()
        for device in known:
            self.quarantine.known(device)

    @property
    def patterns(self) -> set[str]:
        return set(self.server._patterns)

    def flood(self, device: str, channel: str = "step") -> None:
        for _ in range(self.after + 1):
            self.quarantine.blame(device, channel)

    def later(self, seconds: float) -> None:
        self.now_s += seconds
        self.quarantine.tend()

    def heard(self, *sent: str) -> list[str]:
        for topic in sent:
            self.sender.publish(topic, b"1")
        got = []
        while (message := self.server.receive(0.0)) is not None:
            message.acknowledge()
            got.append(message.topic)
        return got


def event(device: str, seconds: float, *, over: bool = False, channel: str = "step") -> dict[str, Any]:
    return {"event": "quarantine", "device": device, "channel": channel, "over": over, "seconds": seconds}


def test_at_first_everybody_is_read() -> None:
    ward = Ward()
    assert ward.patterns == {STEPS, STATES}
    assert ward.heard(step("a"), state("b")) == [step("a"), state("b")]


def test_a_flood_is_left_unread_and_the_others_are_served() -> None:
    ward = Ward("a", "flood", "b")
    ward.flood("flood")
    assert ward.patterns == {step("a"), step("b"), STATES}
    assert ward.heard(step("flood"), step("a"), step("b"), state("flood")) == [step("a"), step("b"), state("flood")]
    assert ward.events == [event("flood", 60.0)]


def test_a_flood_of_states_leaves_the_steps_alone() -> None:
    ward = Ward("a", "flood")
    ward.flood("flood", "state")
    assert ward.patterns == {state("a"), STEPS}
    assert ward.events == [event("flood", 60.0, channel="state")]


def test_some_refusals_are_no_flood() -> None:
    ward = Ward("a", after=100)
    for _ in range(5):
        for _ in range(100):
            ward.quarantine.blame("a", "step")
        ward.now_s += 10.01  # counted anew
    assert ward.events == [] and ward.patterns == {STEPS, STATES}
    for _ in range(100):
        ward.quarantine.blame("a", "step")
        ward.quarantine.blame("b", "step")
        ward.quarantine.blame("a", "state")
    assert ward.events == []
    ward.now_s += 9.9
    ward.quarantine.blame("a", "step")
    assert ward.events == [event("a", 60.0)]


def test_what_comes_of_it_during_its_quarantine_is_not_counted() -> None:
    ward = Ward("flood")
    for _ in range(50):
        ward.flood("flood")
    ward.later(60.0)
    ward.quarantine.blame("flood", "step")
    assert ward.events == [event("flood", 60.0), event("flood", 60.0, over=True)]


def test_after_a_short_quarantine_refusals_are_counted_from_nothing() -> None:
    ward = Ward("flood", after=2, first_s=1.0)
    for _ in range(20):
        ward.quarantine.blame("flood", "step")
    ward.later(1.0)
    ward.quarantine.blame("flood", "step")
    ward.quarantine.blame("flood", "step")
    assert ward.events == [event("flood", 1.0), event("flood", 1.0, over=True)]
    ward.quarantine.blame("flood", "step")
    assert ward.events[2:] == [event("flood", 2.0)]


def test_it_ends_when_its_time_is_over_and_newcomers_are_found() -> None:
    ward = Ward("a", "flood")
    ward.flood("flood", "state")
    assert ward.heard() == []
    ward.sender.publish(state("new"), b"1", retain=True)
    assert ward.heard() == []
    ward.later(59.9)
    assert ward.patterns == {state("a"), STEPS}
    ward.later(0.1)
    assert ward.patterns == {STEPS, STATES}
    assert ward.heard(state("flood")) == [state("new"), state("flood")]
    assert ward.events[1:] == [event("flood", 60.0, over=True, channel="state")]


def test_who_comes_to_be_known_meanwhile_is_served_at_once() -> None:
    ward = Ward("flood")
    ward.flood("flood")
    ward.quarantine.known("new")
    assert ward.patterns == {step("new"), STATES}
    assert ward.heard(step("new"), step("flood")) == [step("new")]
    ward.later(60.0)
    assert ward.patterns == {STEPS, STATES}


def test_a_stranger_that_floods_is_not_let_in_by_becoming_known() -> None:
    ward = Ward("a")
    ward.flood("flood")
    ward.quarantine.known("flood")
    assert ward.patterns == {step("a"), STATES}


def test_a_second_flood_ends_by_its_own_time() -> None:
    ward = Ward("a", "one", "two")
    ward.flood("one")
    ward.later(30.0)
    ward.flood("two")
    assert ward.patterns == {step("a"), STATES}
    ward.later(30.0)
    assert ward.patterns == {step("a"), step("one"), STATES}
    ward.later(30.0)
    assert ward.patterns == {STEPS, STATES}
    assert [(each["device"], each["over"]) for each in ward.events] == [
        ("one", False),
        ("two", False),
        ("one", True),
        ("two", True),
    ]


def test_who_floods_again_waits_twice_as_long_up_to_the_longest() -> None:
    ward = Ward()
    for seconds in (60.0, 120.0, 200.0, 200.0):
        ward.flood("flood")
        assert ward.events[-1] == event("flood", seconds)
        ward.later(seconds - 0.1)
        assert not ward.events[-1]["over"]
        ward.later(0.1)
        assert ward.events[-1] == event("flood", seconds, over=True)
    ward.later(200.1)
    ward.flood("flood")
    assert ward.events[-1] == event("flood", 60.0)


def test_memory_is_bounded_and_a_flood_under_many_names_is_still_one() -> None:
    ward = Ward("a", "b", "c", max_devices=2)
    for number in range(5):
        ward.quarantine.blame(f"d{number}", "step")
    assert len(ward.quarantine._refusals) <= 3
    assert ward.events == [event("", 60.0)]
    assert ward.patterns == {step("a"), step("b"), STATES}
    for number in range(5, 100):
        ward.quarantine.blame(f"d{number}", "step")
    assert len(ward.events) == 1
    for number in range(10):
        ward.now_s += 10.01
        ward.flood(f"e{number}")
        assert len(ward.quarantine._sentences) <= 2
    ward.later(1000.0)
    begun = [each["device"] for each in ward.events if not each["over"]]
    assert begun == ["", *(f"e{number}" for number in range(10))]
    assert sorted(begun) == sorted(each["device"] for each in ward.events if each["over"])
    assert ward.patterns == {STEPS, STATES}


def test_the_flood_that_ends_first_gives_way_and_its_device_is_read_again() -> None:
    ward = Ward("a", "b", "c", max_devices=3)
    ward.flood("a")
    ward.later(60.0)
    ward.flood("a")  # 120 s
    ward.now_s += 10.01
    ward.flood("b")
    ward.flood("c")
    ward.now_s += 10.01
    ward.flood("d")
    assert [(each["device"], each["over"]) for each in ward.events[-2:]] == [("b", True), ("d", False)]
    assert ward.patterns == {step("b"), STATES}


def test_new_subscriptions_come_before_old_ones_end() -> None:
    ward = Ward("a", "flood")
    calls: list[tuple[str, set[str]]] = []
    server = ward.server
    subscribe, unsubscribe = server.subscribe, server.unsubscribe
    server.subscribe = lambda *patterns: (calls.append(("new", set(patterns))), subscribe(*patterns))[1]
    server.unsubscribe = lambda *patterns: (calls.append(("end", set(patterns))), unsubscribe(*patterns))[1]
    ward.flood("flood")
    ward.later(60.0)
    singles = {step("a"), step("flood"), state("a"), state("flood")}
    assert calls == [
        ("new", {step("a"), STATES}),
        ("end", {STEPS, *singles} - {step("a")}),
        ("new", {STEPS, STATES}),
        ("end", singles),
    ]


def test_a_broker_that_refuses_is_told_of_and_asked_again() -> None:
    ward = Ward("a", "flood")
    ward.broker.forbid(step("a"))
    ward.flood("flood")
    assert [each["event"] for each in ward.events] == ["quarantine", "broker"]
    assert step("a") in ward.events[1]["why"]
    assert STEPS in ward.patterns  # rather a flood than nobody
    ward.later(9.9)
    ward.quarantine.known("b")  # what succeeds meanwhile is not all
    ward.later(0.2)
    assert [each["event"] for each in ward.events] == ["quarantine", "broker", "broker"]
    ward.broker.forbid()
    ward.later(10.1)
    assert ward.patterns == {step("a"), step("b"), STATES}
    ward.broker.forbid(step("a"))
    ward.later(10.1)
    assert len(ward.events) == 3  # it was not asked again


def test_a_broker_that_refuses_at_first_is_an_error() -> None:
    broker = MemoryBroker()
    broker.forbid(STEPS)
    transport = MemoryTransport(broker, "server")
    transport.open()
    with pytest.raises(TransportError, match="refuses"):
        Quarantine(transport, "ward").open()


def test_nothing_is_left_to_the_next_life_of_the_server() -> None:
    ward = Ward("a", "flood")
    ward.quarantine.close()
    assert ward.patterns == {STEPS, STATES}
    ward.flood("flood")
    ward.quarantine.close()
    assert ward.patterns == {STATES}


def test_what_an_earlier_life_of_the_server_left_is_ended() -> None:
    broker = MemoryBroker()
    first, second = MemoryTransport(broker, "server"), MemoryTransport(broker, "server")
    first.open()
    quarantine = Quarantine(first, "ward", after=0)
    quarantine.known("a")
    quarantine.known("b")
    quarantine.blame("b", "step")
    first.kill()
    events: list[dict[str, Any]] = []
    quarantine = Quarantine(second, "ward", after=0, on_event=events.append)
    quarantine.known("a")  # before it is connected
    second.open()
    quarantine.open()
    assert broker._sessions["server"].patterns == {STEPS, STATES} and events == []
    second.subscribe(step("stranger"))
    quarantine.blame("stranger", "step")
    assert broker._sessions["server"].patterns == {step("a"), STATES}


@pytest.mark.parametrize(
    "wrong",
    [
        {"after": -1},
        {"first_s": 0.0},
        {"first_s": 61.0, "longest_s": 60.0},
        {"longest_s": math.inf},
        {"first_s": math.nan},
        {"max_devices": 0},
    ],
)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    transport = MemoryTransport(MemoryBroker(), "server")
    with pytest.raises(ConfigError, match="choose"):
        Quarantine(transport, "ward", **wrong)
    with pytest.raises(ConfigError, match="cannot name a fleet"):
        Quarantine(transport, "a ward")
