"""What arrives becomes a valid step, a refusal with a reason, or a count; nothing raises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import topics
from edge_sdk.transport import Received
from edge_sdk.wire import Limits, Message, Packing, encode
from server_sdk.inbox import Arrival, Flood, Gap, Inbox, Refusal
from server_sdk.rates import RateLimits, Rates

CUT = (4, 2, 2)


def inbox(**options: Any) -> Inbox:
    return Inbox("ward", "run-1", CUT, classes=3, max_batch=8, **options)


def train(n: int = 2, run: str = "run-1", value: float = 1.0, shape: tuple[int, ...] = CUT, label: int = 1) -> Message:
    tensors = {"activations": np.full((n, *shape), value, np.float32), "labels": np.full(n, label, np.int64)}
    return Message("train", run, "s", 1, {"front": 0}, tensors)


def deliver(to: Inbox, message: Message, topic: str = "psgl/v1/ward/up/d1/step", chunk_bytes: int = 65536) -> Any:
    taken = None
    for frame in encode(message, chunk_bytes=chunk_bytes):
        taken = to.take(Received(topic, frame, False, lambda: None))
    return taken


@pytest.mark.parametrize("bits", [0, 1, 4, 8])
def test_vectors_in_few_bits_arrive_and_are_screened(bits: int) -> None:
    box = Inbox("ward", "run-1", (5,), classes=3, max_batch=8)
    codec: Any = Packing(bits, -2.0, 2.0) if bits else "float32"
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)

    def sent(shape: tuple[int, ...], codec: Any) -> Any:
        tensors = {"activations": np.resize(values, (3, *shape)), "labels": np.zeros(3, np.int64)}
        message = Message("train", "run-1", "s", 1, {"front": 0}, tensors)
        (frame,) = encode(message, codec=codec)
        return box.take(Received(topics.up_step("ward", "d1"), frame, False, lambda: None))

    taken = sent((5,), codec)
    assert isinstance(taken, Arrival) and taken.message.tensors["activations"].shape == (3, 5)
    assert isinstance(refused := sent((5, 1), codec), Refusal) and refused.reason == "shape"
    wide = sent((5,), Packing(bits, -1e7, 1e7)) if bits == 1 else None
    assert wide is None or (isinstance(wide, Refusal) and wide.reason == "range")


def test_a_step_in_chunks_arrives_whole_under_the_topics_name() -> None:
    taken = deliver(inbox(), train(8), chunk_bytes=64)
    assert isinstance(taken, Arrival) and taken.device == "d1"
    assert taken.message.tensors["activations"].shape == (8, *CUT)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (train(run="run-0"), "run"),
        (train(shape=(4, 2, 3)), "shape"),
        (train(n=9), "shape"),
        (train(value=1e7), "range"),
        (train(label=3), "labels"),
    ],
)
def test_a_step_that_the_run_cannot_take_is_refused_with_words(message: Message, reason: str) -> None:
    box = inbox()
    taken = deliver(box, message)
    assert isinstance(taken, Refusal) and taken.reason == reason and taken.detail
    assert (taken.device, taken.session, taken.step) == ("d1", "s", 1)
    assert box.rejected[reason] == 1


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        ("psgl/v1/other/up/d1/step", "topic"),
        ("psgl/v1/ward/down/d1/step", "topic"),
        ("something/else", "topic"),
        ("psgl/v1/ward/up/d1/state", "kind"),
    ],
)
def test_the_wrong_place_is_counted(topic: str, reason: str) -> None:
    box = inbox()
    assert deliver(box, train(), topic) is None
    assert box.rejected[reason] == 1


@given(st.binary(max_size=200))
def test_hostile_bytes_never_raise_and_are_always_counted(payload: bytes) -> None:
    box = inbox()
    assert box.take(Received(topics.up_step("ward", "d1"), payload, False, lambda: None)) is None
    assert sum(box.rejected.values()) == 1


def test_strangers_cannot_fill_the_memory() -> None:
    box = inbox(max_devices=2)
    for number in range(10):
        deliver(box, train(), topics.up_step("ward", f"d{number}"))
    assert box.rejected["devices"] == 6


def test_what_is_above_a_devices_rate_is_a_flood_of_its_channel() -> None:
    box = inbox(rates=Rates(RateLimits(messages_per_s=1.0, burst_s=2.0), lambda: 0.0))
    assert [type(deliver(box, train())) for _ in range(3)] == [Arrival, Arrival, Flood]
    assert deliver(box, train()) == Flood("d1", "step")
    assert deliver(box, train(), topics.up_state("ward", "d1")) == Flood("d1", "state")
    assert isinstance(deliver(box, train(), topics.up_step("ward", "d2")), Arrival)
    assert box.rejected == {"rate": 3}


def state(size: int) -> Message:
    fields = {"manifest": "m", "status": "online", "speaks": [1], "notes": ["x" * (size // 2)] * 2}
    return Message("state", "", "s", 0, fields, {})


def test_a_state_is_one_frame_of_at_most_64_kib() -> None:
    topic = topics.up_state("ward", "d1")
    box = inbox()
    assert isinstance(deliver(box, state(60_000), topic), Arrival)
    assert deliver(box, state(66_000), topic, chunk_bytes=1 << 20) is None
    assert deliver(box, state(60_000), topic, chunk_bytes=50_000) is None
    assert deliver(box, state(10), topic, chunk_bytes=60) is None
    assert box.rejected["limit"] == 1 + 2 + len(encode(state(10), chunk_bytes=60)) and len(box.rejected) == 1
    assert box.held_bytes == 0
    tight = inbox(limits=Limits(max_chunk_bytes=1000))
    assert isinstance(deliver(tight, state(800), topic), Arrival)
    assert deliver(tight, state(2000), topic) is None
    assert tight.rejected == {"limit": 1}


def test_only_steps_of_another_version_or_kind_are_answered() -> None:
    (frame,) = encode(train())
    foreign = frame.replace(b"train", b"trein")
    box = inbox()
    answers = [
        box.take(Received(topic("ward", "d1"), foreign, False, lambda: None))
        for topic in (topics.up_step, topics.up_state)
    ]
    assert isinstance(answers[0], Refusal) and answers[0].reason == "kind" and answers[1] is None
    assert box.rejected == {"kind": 2}


def unfinished(box: Inbox, device: str, chunks: int, step: int = 1) -> Any:
    """Deliver so many of the chunks of 100 bytes of a step, never the last one of them."""
    message = Message("train", "run-1", "s", step, {"front": 0}, dict(train(8).tensors))
    frames = encode(message, chunk_bytes=100)
    assert len(frames) > chunks
    taken = None
    for frame in frames[:chunks]:
        taken = box.take(Received(topics.up_step("ward", device), frame, False, lambda: None))
    return taken


def test_the_device_that_holds_most_gives_way_when_the_memory_is_full() -> None:
    box = inbox(max_held_bytes=1000)
    unfinished(box, "a", 3)
    unfinished(box, "glutton", 3)
    unfinished(box, "glutton", 2, step=2)
    unfinished(box, "b", 2)
    assert box.held_bytes == 1000 and box.rejected == {}
    unfinished(box, "c", 1)
    assert box.held_bytes == 600 and box.rejected == {"memory": 1}
    for device in ("a", "b", "c", "glutton"):
        assert isinstance(deliver(box, train(8), topics.up_step("ward", device), chunk_bytes=100), Arrival)
    unfinished(box, "a", 4)
    assert box.held_bytes == 400 and box.rejected == {"memory": 1}


def test_who_outgrows_the_memory_alone_loses_its_own_and_may_begin_anew() -> None:
    message = train(8)
    frames = encode(message, chunk_bytes=100)
    box = inbox(max_held_bytes=100 * (len(frames) - 2))
    box.take(Received(topics.up_step("ward", "a"), frames[0], False, lambda: None))
    for frame in frames[2:-1]:
        box.take(Received(topics.up_step("ward", "a"), frame, False, lambda: None))
    gap = box.take(Received(topics.up_step("ward", "a"), frames[-1], False, lambda: None))
    assert gap is None and box.held_bytes == 0 and box.rejected == {"memory": 1}
    assert isinstance(deliver(box, message, topics.up_step("ward", "a")), Arrival)


def test_what_is_held_is_let_go_with_the_whole_the_dropped_and_the_wrong() -> None:
    box = inbox()
    frames = encode(train(8), chunk_bytes=100)
    topic = topics.up_step("ward", "a")
    for frame in frames[1:]:
        taken = box.take(Received(topic, frame, False, lambda: None))
    assert taken == Gap("a", "s", 1, (0,))
    assert box.held_bytes > 0
    assert isinstance(box.take(Received(topic, frames[0], False, lambda: None)), Arrival)
    assert box.held_bytes == 0
    for step in range(10):  # four of a device are kept
        unfinished(box, "a", 2, step)
    assert box.held_bytes == 800
    other = encode(Message("train", "run-1", "s", 9, {"front": 0}, dict(train(7).tensors)), chunk_bytes=100)
    assert box.take(Received(topic, other[0], False, lambda: None)) is None
    assert box.rejected == {"conflict": 1} and box.held_bytes == 600


def test_a_device_that_sends_what_is_wrong_without_end_floods_and_is_answered_no_more() -> None:
    now_s = [0.0]
    box = inbox(wrong=Rates(RateLimits(messages_per_s=1.0, bytes_per_s=1e6, burst_s=3.0), lambda: now_s[0]))
    noise = Received(topics.up_step("ward", "d1"), b"noise", False, lambda: None)
    assert isinstance(deliver(box, train(run="run-0")), Refusal)
    assert box.take(noise) is None
    assert deliver(box, train(), topics.up_state("ward", "d1")) is None
    for _ in range(2):
        assert deliver(box, train(run="run-0")) == Flood("d1", "step")
        assert box.take(noise) == Flood("d1", "step")
        assert deliver(box, train(), topics.up_state("ward", "d1")) == Flood("d1", "state")
    assert isinstance(deliver(box, train()), Arrival)  # what is right is taken
    assert isinstance(deliver(box, train(run="run-0"), topics.up_step("ward", "d2")), Refusal)
    assert box.rejected["run"] == 4 and box.rejected["kind"] == 3 and sum(box.rejected.values()) == 10
    now_s[0] += 1.0
    assert isinstance(deliver(box, train(run="run-0")), Refusal)


def test_by_default_some_four_megabytes_a_second_may_be_wrong() -> None:
    box = inbox()
    wrong = Received(topics.up_step("ward", "d1"), bytes(1 << 20), False, lambda: None)
    taken = [box.take(wrong) for _ in range(60)]
    assert taken[:7] == [None] * 7 and taken[-1] == Flood("d1", "step")
