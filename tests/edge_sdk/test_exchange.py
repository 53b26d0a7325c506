"""The device's end of the conversation, on a clock and a transport that the test drives: nothing here waits."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_sdk import cbor, exchange, resending, topics
from edge_sdk.errors import RefusedError, TransportError
from edge_sdk.exchange import Exchange
from edge_sdk.state import OutboxStep
from edge_sdk.transport import Received, Will
from edge_sdk.wire import Assembler, Limits, Message, decode_frame, encode

RUN, SESSION, BUNDLE = "run-1", "5e55" * 4, "bundle-1"
UP, STATE = topics.up_step("ward", "d1"), topics.up_state("ward", "d1")
DOWN, MODEL = topics.down_step("ward", "d1"), topics.down_model("ward")


class Clock:
    """Stands for the time module: seconds that pass only while the transport waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.coming: list[tuple[float, Callable[[], None]]] = []

    def monotonic(self) -> float:
        return self.now

    def at(self, after_s: float, what: Callable[[], None]) -> None:
        """Do something so many seconds from now."""
        self.coming.append((self.now + after_s, what))

    def wait(self, seconds: float, until: Callable[[], bool]) -> None:
        end = self.now + seconds
        while not until():
            self.coming.sort(key=lambda each: each[0])
            if not self.coming or self.coming[0][0] > end:
                self.now = max(self.now, end)
                return
            when, what = self.coming.pop(0)
            self.now = max(self.now, when)
            what()


class Wire:
    """A transport whose other end is the test."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.generation = 1
        self.connected = True
        self.max_packet_bytes = 1 << 20
        self.refused_messages = 0
        self.refused_patterns: tuple[str, ...] = ()
        self.full = False
        self.closed = False
        self.will: Will | None = None
        self.subscribed: list[str] = []
        self.published: list[tuple[float, str, bytes]] = []
        self.acknowledged = 0
        self._arrived: deque[tuple[str, bytes]] = deque()

    def open(self, will: Will | None = None) -> None:
        self.will = will

    def close(self) -> None:
        self.closed = True

    def subscribe(self, *patterns: str) -> None:
        self.subscribed += patterns

    def unsubscribe(self, *patterns: str) -> None:
        raise AssertionError("a device keeps its subscriptions")

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        assert retain == (topic == STATE)
        if self.full or len(payload) > self.max_packet_bytes:
            raise TransportError("no room: wait")
        self.published.append((self.clock.now, topic, payload))

    def receive(self, timeout_s: float) -> Received | None:
        self.clock.wait(timeout_s, lambda: bool(self._arrived))
        if not self._arrived:
            return None
        topic, payload = self._arrived.popleft()
        return Received(topic, payload, False, self._acknowledge)

    def _acknowledge(self) -> None:
        self.acknowledged += 1

    def arrive(self, topic: str, *payloads: bytes) -> None:
        self._arrived.extend((topic, payload) for payload in payloads)

    def steps(self) -> list[tuple[float, bytes]]:
        """When each packet of a step went out, counted from the clock's beginning."""
        return [(when - 1000.0, payload) for when, topic, payload in self.published if topic == UP]

    def told(self) -> list[str]:
        """What the device said of itself, in order."""
        said = [decode_frame(payload, Limits()) for _, topic, payload in self.published if topic == STATE]
        messages = [Assembler(Limits()).add(frame) for frame in said]
        return [message.fields["status"] for message in messages if message is not None]


def model(run: str = RUN, **changes: Any) -> bytes:
    fields = {"bundle": BUNDLE, "status": "training", "rounds": 4, "evaluate_every": 0, "batch": 6, "server": "s1"}
    (frame,) = encode(Message("model", run, "", 0, fields | changes, {}))
    return frame


def reply(kind: str, step: int, session: str = SESSION, **fields: Any) -> list[bytes]:
    return encode(Message(kind, RUN, session, step, fields, {}))


def outbox(step: int = 1, chunk_bytes: int = 65536) -> OutboxStep:
    tensors: dict[str, Any] = {"activations": np.zeros((2, 40), np.float32), "labels": np.zeros(2, np.int64)}
    message = Message("train", RUN, SESSION, step, {"front": 0}, tensors)
    return OutboxStep(step, "train", tuple(encode(message, chunk_bytes=chunk_bytes)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    driven = Clock()
    for module in (exchange, resending):
        monkeypatch.setattr(module, "time", driven)
    monkeypatch.setattr(resending, "random", SimpleNamespace(uniform=lambda low, high: low))
    assert time.monotonic() != driven.now, "the clock of everybody else goes on"
    return driven


@pytest.fixture
def wire(clock: Clock) -> Wire:
    return Wire(clock)


def make(wire: Wire, *, resend_s: float = 5.0, give_up_s: float = 300.0) -> Exchange:
    return Exchange(
        wire, fleet="ward", device="d1", session=SESSION, bundle=BUNDLE, resend_s=resend_s, give_up_s=give_up_s
    )


@pytest.fixture
def joined(wire: Wire) -> Exchange:
    """A device that has joined the run."""
    each = make(wire)
    wire.arrive(MODEL, model())
    each.open(10.0)
    return each


# --- joining ---


def test_a_device_subscribes_before_it_speaks_and_leaves_a_last_will(wire: Wire, joined: Exchange) -> None:
    assert wire.subscribed == [DOWN, MODEL] and wire.told() == ["online"]
    assert wire.will is not None and wire.will.topic == STATE and wire.will.retain
    will = Assembler(Limits()).add(decode_frame(wire.will.payload, Limits()))
    assert will is not None and (will.fields["status"], will.session) == ("offline", SESSION)
    assert joined.plan is not None and (joined.plan.run, joined.plan.rounds, joined.plan.batch) == (RUN, 4, 6)


def test_no_server_ends_after_the_wait_with_the_remedy(wire: Wire, clock: Clock) -> None:
    with pytest.raises(TransportError, match=r"start psgl-server train .* same --fleet"):
        make(wire).open(30.0)
    assert 30 <= clock.now - 1000 <= 32


@pytest.mark.parametrize(("mine", "taken"), [("", False), ("run-0", False), (RUN, True)])
def test_a_finished_run_is_of_interest_only_to_who_took_part(wire: Wire, clock: Clock, mine: str, taken: bool) -> None:
    each = make(wire)
    wire.arrive(MODEL, model(status="finished"))
    clock.at(3.0, lambda: wire.arrive(MODEL, model("run-2")))
    assert each.open(10.0, mine).run == (RUN if taken else "run-2")


def test_another_bundle_is_refused_with_both_names(wire: Wire) -> None:
    wire.arrive(MODEL, model(bundle="bundle-2"))
    with pytest.raises(RefusedError, match=r"bundle-2, .* bundle-1: copy the server's bundle") as caught:
        make(wire).open(10.0)
    assert caught.value.reason == "bundle"


def test_the_announcement_that_ended_a_run_is_the_next_one(wire: Wire, joined: Exchange) -> None:
    wire.arrive(MODEL, model("run-2"))
    with pytest.raises(RefusedError, match="trains run run-2 now"):
        joined.listen(1.0)
    joined.leave()
    assert joined.join(0.0).run == "run-2", "nothing more is said"
    joined.leave()
    with pytest.raises(TransportError):
        joined.join(0.0)


def test_after_a_change_of_bundle_the_one_that_was_left_is_looked_at_again(wire: Wire) -> None:
    each = make(wire)
    wire.arrive(MODEL, model(bundle="bundle-2"))
    with pytest.raises(RefusedError):
        each.open(10.0)
    each.leave()
    each.change_bundle("bundle-2")
    assert each.join(0.0).bundle == "bundle-2" and len(wire.told()) == 2


@pytest.mark.parametrize(("version", "older"), [(2, "device"), (0, "server")])
def test_an_announcement_of_another_protocol_says_who_is_too_old(wire: Wire, version: int, older: str) -> None:
    foreign = {"v": version, "kind": "model", "session": "", "step": 0, "weights": {"a": [1, 2]}}
    wire.arrive(MODEL, cbor.dumps(foreign))
    with pytest.raises(RefusedError, match=f"upgrade psgl on the {older}") as caught:
        make(wire).open(10.0)
    assert caught.value.reason == "version"


def test_a_server_that_speaks_only_a_later_version_is_refused(wire: Wire) -> None:
    wire.arrive(MODEL, model(speaks=[2, 3]))
    with pytest.raises(RefusedError, match="upgrade psgl on the device"):
        make(wire).open(10.0)


def test_a_foreign_version_elsewhere_is_only_counted(wire: Wire, joined: Exchange) -> None:
    wire.arrive(DOWN, cbor.dumps({"v": 2, "kind": "gradient", "session": SESSION, "step": 1}))
    joined.listen(0.0)
    assert joined.traffic.rejected == {"version": 1} and joined.plan is not None


def test_a_message_is_acknowledged_when_the_next_one_is_asked_for(wire: Wire, joined: Exchange) -> None:
    wire.arrive(DOWN, *reply("stored", 1, samples=1), b"no message")
    joined.send(outbox())
    before = wire.acknowledged
    assert joined.reply(1.0) is not None and wire.acknowledged == before + 1, "the announcement; the reply is not used"
    for expected in (2, 3):
        joined.listen(0.0)
        assert wire.acknowledged == before + expected, "whatever it was"


# --- until the reply comes ---


def test_the_pause_doubles_to_eight_times_and_the_bytes_stay_the_same(wire: Wire, joined: Exchange) -> None:
    joined.send(outbox())
    assert joined.reply(160.0) is None and joined.waiting == {1}
    assert [when for when, _ in wire.steps()] == [0, 5, 15, 35, 75, 115, 155]
    assert {payload for _, payload in wire.steps()} == set(outbox().frames)
    wire.arrive(DOWN, *reply("stored", 1, samples=2))
    got = joined.reply(1.0)
    assert got is not None and (got.step, got.resent, got.message.kind) == (1, 6, "stored")
    assert joined.traffic.resent == 6 and joined.waiting == frozenset()


def test_silence_is_counted_from_the_last_sign_of_life(wire: Wire, clock: Clock) -> None:
    each = make(wire, resend_s=1.0, give_up_s=50.0)
    wire.arrive(MODEL, model())
    each.open(10.0)
    clock.now += 1000  # of other work, which is nobody's silence
    began = clock.now
    clock.at(45.0, lambda: wire.arrive(MODEL, model(round=3)))
    clock.at(90.0, lambda: wire.arrive(DOWN, *reply("missing", 1, chunks=[0])))
    clock.at(100.0, lambda: wire.arrive(DOWN, *reply("stored", 1, session="another", samples=1)))
    with pytest.raises(TransportError, match="no reply to step 1 for 50 s: is the server up"):
        each.ask(outbox())
    assert 140 < clock.now - began <= 150
    assert each.waiting == frozenset(), "who asks again begins anew"


def test_a_new_life_of_the_server_makes_everything_go_out_at_once(wire: Wire, clock: Clock, joined: Exchange) -> None:
    joined.send(outbox(1))
    joined.send(outbox(2))
    clock.at(2.0, lambda: wire.arrive(MODEL, model(round=1)))
    clock.at(3.0, lambda: wire.arrive(MODEL, model(server="s2", status="training")))
    joined.reply(4.0)
    assert [when for when, _ in wire.steps()] == [0, 0, 3, 3], "not at 2: the same server tells its progress"
    joined.reply(5.0)
    assert [when for when, _ in wire.steps()][4:] == [8, 8], "and the pause is the first again"


def test_a_new_connection_makes_everything_go_out_at_once(wire: Wire, clock: Clock, joined: Exchange) -> None:
    joined.send(outbox())
    clock.at(1.0, lambda: setattr(wire, "generation", 2))
    joined.reply(3.0)
    assert [when for when, _ in wire.steps()] == [0, 1] and wire.told() == ["online", "online"]


def test_only_the_missing_chunks_go_out_again(wire: Wire, joined: Exchange) -> None:
    step = outbox(chunk_bytes=100)
    assert len(step.frames) > 4
    joined.send(step)
    wire.arrive(DOWN, *reply("missing", 1, chunks=[1, 3, 999]))
    joined.reply(1.0)
    assert [payload for _, payload in wire.steps()] == [*step.frames, step.frames[1], step.frames[3]]
    assert joined.traffic.resent == 0 and joined.waiting == {1}
    assert joined.traffic.bytes_sent == sum(len(payload) for _, payload in wire.steps())


def test_a_refusal_of_the_version_ends_no_step_of_a_server_that_speaks_it(wire: Wire, joined: Exchange) -> None:
    wire.arrive(MODEL, model(speaks=[1, 2]))
    joined.send(outbox())
    wire.arrive(DOWN, *reply("refused", 1, reason="version", detail="the device speaks protocol version 9"))
    assert joined.reply(6.0) is None and joined.waiting == {1}
    assert joined.traffic.rejected == {"version": 1} and joined.traffic.resent == 1, "it goes out again"


def test_a_refusal_for_any_other_reason_ends_the_step(wire: Wire, joined: Exchange) -> None:
    wire.arrive(DOWN, *reply("refused", 1, reason="run", detail="start again"))
    with pytest.raises(RefusedError, match=r"refused step 1 \(run\): start again") as caught:
        joined.ask(outbox())
    assert caught.value.reason == "run" and joined.waiting == frozenset()


def test_what_is_of_another_session_step_or_kind_is_no_reply(wire: Wire, joined: Exchange) -> None:
    joined.send(outbox())
    wire.arrive(DOWN, *reply("stored", 1, session="0" * 16, samples=1), *reply("stored", 2, samples=1))
    wire.arrive(DOWN, *encode(Message("state", "", SESSION, 1, {"status": "x", "manifest": "m"}, {})))
    wire.arrive(DOWN, b"", b"\xff", b"\x9f" * 100)
    assert joined.reply(1.0) is None and joined.waiting == {1} and joined.plan is not None
    assert sum(joined.traffic.rejected.values()) == 3


def test_replies_to_other_steps_are_kept_in_their_order(wire: Wire, joined: Exchange) -> None:
    for number in (1, 2, 3):
        joined.send(outbox(number))
    for number in (2, 3, 1, 4):
        wire.arrive(DOWN, *reply("stored", number, samples=number))
    assert joined.ask(outbox(4)).step == 4
    rest = [joined.reply(0.0) for _ in range(3)]
    assert [each.step for each in rest if each is not None] == [2, 3, 1] and joined.reply(0.0) is None


def test_the_work_meanwhile_begins_after_the_step_is_on_its_way(wire: Wire, joined: Exchange) -> None:
    sent: list[int] = []
    wire.arrive(DOWN, *reply("stored", 1, samples=1))
    joined.ask(outbox(), lambda: sent.append(len(wire.steps())))
    assert sent == [1]


def test_a_step_that_gave_way_is_sent_no_more(wire: Wire, joined: Exchange) -> None:
    for number in (1, 2):
        joined.send(outbox(number))
    joined.forget((1, 7))
    wire.arrive(DOWN, *reply("stored", 1, samples=1))
    assert joined.reply(11.0) is None and joined.waiting == {2}
    assert [payload for _, payload in wire.steps()[2:]] == [outbox(2).frames[0]]


# --- a broker that does not take everything ---


def test_a_full_queue_is_no_error_and_the_step_goes_out_after_the_pause(wire: Wire, joined: Exchange) -> None:
    wire.full = True
    joined.send(outbox())
    wire.full = False
    joined.reply(6.0)
    assert [when for when, _ in wire.steps()] == [5] and joined.traffic.bytes_sent == len(outbox().frames[0])


def test_a_packet_that_no_broker_takes_is_an_error(wire: Wire, joined: Exchange) -> None:
    wire.max_packet_bytes = 50
    with pytest.raises(TransportError):
        joined.send(outbox())


def test_a_broker_that_refuses_what_is_published_is_named(wire: Wire, clock: Clock, joined: Exchange) -> None:
    clock.at(1.0, lambda: setattr(wire, "refused_messages", 1))
    with pytest.raises(TransportError, match=f"refuses what this device publishes on {UP}: correct its ACL"):
        joined.ask(outbox())


# --- the end ---


@pytest.mark.parametrize(
    ("run", "status", "words"),
    [
        ("run-2", "training", "trains run run-2 now, not run-1: start this device again"),
        (RUN, "finished", "ended run run-1: start psgl-server train"),
    ],
)
def test_a_run_that_ends_ends_the_wait(
    wire: Wire, clock: Clock, joined: Exchange, run: str, status: str, words: str
) -> None:
    clock.at(1.0, lambda: wire.arrive(MODEL, model(run, status=status)))
    with pytest.raises(RefusedError, match=words) as caught:
        joined.ask(outbox())
    assert caught.value.reason == "run"


def test_whoever_waits_can_be_interrupted(wire: Wire, clock: Clock, joined: Exchange) -> None:
    clock.at(3.0, joined.interrupt)
    with pytest.raises(KeyboardInterrupt):
        joined.ask(outbox())
    assert clock.now - 1000 <= 4
    joined.close()
    assert wire.told()[-1] == "offline" and wire.closed


def test_a_server_that_pauses_does_not(wire: Wire, clock: Clock, joined: Exchange) -> None:
    clock.at(1.0, lambda: wire.arrive(MODEL, model(status="paused")))
    clock.at(30.0, lambda: wire.arrive(MODEL, model(server="s2")))
    clock.at(30.1, lambda: wire.arrive(DOWN, *reply("stored", 1, samples=1)))
    assert joined.ask(outbox()).step == 1


@pytest.mark.parametrize(("last", "said"), [("training", "offline"), ("done", "done")])
def test_goodbye_says_offline_unless_the_device_is_done(wire: Wire, joined: Exchange, last: str, said: str) -> None:
    joined.tell(status=last, round=4)
    joined.close()
    assert wire.told()[-1] == said and wire.closed


def test_goodbye_never_raises(wire: Wire, joined: Exchange) -> None:
    wire.full = True
    joined.close()
    assert wire.closed
