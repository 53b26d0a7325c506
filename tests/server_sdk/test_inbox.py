"""What arrives becomes a valid step, a refusal with a reason, or a count; nothing raises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import topics
from edge_sdk.transport import Received
from edge_sdk.wire import Message, encode
from server_sdk.inbox import Arrival, Inbox, Refusal

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
