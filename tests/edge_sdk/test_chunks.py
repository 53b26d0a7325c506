from __future__ import annotations

import random
import tracemalloc
import zlib
from dataclasses import replace

import cbor2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.chunks import (
    Assembler,
    ForeignFrame,
    Frame,
    decode_frame,
    foreign_version,
    unknown_kind,
    version_conflict,
)
from edge_sdk.errors import ConfigError, WireError
from edge_sdk.limits import Limits
from edge_sdk.messages import Message, check_identity
from edge_sdk.wire import encode


def message(step: int, *, kind: str = "infer", size: int = 100) -> Message:
    activations = np.random.default_rng(step).standard_normal((2, size)).astype(np.float32)
    tensors = {"activations": activations} | ({"labels": np.array([0, 1])} if kind == "train" else {})
    return Message(kind, "run", "session", step, {"front": 1}, tensors)


def frames(sent: Message, chunk_bytes: int = 100) -> list[Frame]:
    return [decode_frame(data) for data in encode(sent, chunk_bytes=chunk_bytes)]


def refusal(assembler: Assembler, frame: Frame) -> str:
    with pytest.raises(WireError) as caught:
        assembler.add(frame)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def feed(assembler: Assembler, many: list[Frame]) -> list[Message]:
    return [done for frame in many if (done := assembler.add(frame)) is not None]


@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(20, 400))
@settings(deadline=None)
def test_chunks_of_several_steps_in_any_order_with_repeats(order: random.Random, steps: int, chunk_bytes: int) -> None:
    sent = [message(step, kind=order.choice(["infer", "train"])) for step in range(steps)]
    pieces = [frame for one in sent for frame in frames(one, chunk_bytes)]
    first_chunks = [frame for frame in pieces if frame.count > 1]
    pieces += order.sample(first_chunks, min(5, len(first_chunks)))
    order.shuffle(pieces)
    assembler = Assembler()
    done = feed(assembler, pieces)
    for one in sent:
        assert one in done
    assert all(any(got == one for one in sent) for got in done)


def test_a_message_is_returned_once_by_its_last_chunk() -> None:
    sent = message(1)
    pieces = frames(sent)
    assembler = Assembler()
    for frame in reversed(pieces[1:]):
        assert assembler.add(frame) is None
        assert assembler.add(frame) is None
    assert assembler.add(pieces[0]) == sent
    assert assembler.held_bytes == 0


def test_the_same_step_of_another_kind_run_or_session_is_another_message() -> None:
    sent = [
        message(1),
        message(1, kind="train"),
        replace(message(1), run="other"),
        replace(message(1), session="other"),
    ]
    woven = [frame for group in zip(*(frames(one, 200) for one in sent), strict=False) for frame in group]
    rest = [frame for one in sent for frame in frames(one, 200) if frame not in woven]
    done = feed(Assembler(), woven + rest)
    assert len(done) == 4
    assert all(one in done for one in sent)


@pytest.mark.parametrize(
    "change",
    [
        lambda frame: replace(frame, count=frame.count + 1),
        lambda frame: replace(frame, size=frame.size + 1),
        lambda frame: replace(frame, crc=frame.crc ^ 1),
    ],
)
def test_conflicting_headers_are_refused_and_the_step_can_be_repeated(change) -> None:  # type: ignore[no-untyped-def]
    sent = message(1)
    pieces = frames(sent)
    assembler = Assembler()
    assembler.add(pieces[0])
    assert refusal(assembler, change(pieces[1])) == "conflict"
    assert assembler.held_bytes == 0
    assert feed(assembler, pieces) == [sent]


def test_a_chunk_repeated_with_other_bytes_is_refused() -> None:
    sent = message(1)
    pieces = frames(sent)
    assembler = Assembler()
    assembler.add(pieces[0])
    assert refusal(assembler, replace(pieces[0], body=b"\0" * len(pieces[0].body))) == "conflict"
    assert feed(assembler, pieces) == [sent]


def test_changed_bytes_are_noticed_and_the_step_can_be_repeated() -> None:
    sent = message(1)
    pieces = frames(sent)
    assembler = Assembler()
    feed(assembler, pieces[1:])
    assert refusal(assembler, replace(pieces[0], body=b"\0" * len(pieces[0].body))) == "crc"
    assert feed(assembler, pieces) == [sent]


def test_swapped_chunks_are_noticed() -> None:
    pieces = frames(message(1, size=200))
    assembler = Assembler()
    feed(assembler, pieces[2:])
    assembler.add(replace(pieces[0], index=1))
    assert refusal(assembler, replace(pieces[1], index=0)) == "crc"


def test_a_header_that_all_chunks_share_is_checked_too() -> None:
    assembler = Assembler()
    pieces = [replace(frame, step=2) for frame in frames(message(1))]
    feed(assembler, pieces[:-1])
    assert refusal(assembler, pieces[-1]) == "header"


def test_chunks_longer_than_their_size_are_refused_when_they_arrive() -> None:
    assembler = Assembler()
    body = b"x" * 60
    frame = Frame("infer", "run", "session", 1, 0, 3, 100, zlib.crc32(body), body)
    assembler.add(frame)
    assert refusal(assembler, replace(frame, index=1)) == "conflict"
    assert assembler.held_bytes == 0


def test_chunks_shorter_than_their_size_are_refused() -> None:
    assembler = Assembler()
    frame = Frame("infer", "run", "session", 1, 0, 2, 100, 0, b"x" * 10)
    assembler.add(frame)
    assert refusal(assembler, replace(frame, index=1)) == "truncated"


def test_missing_chunks_are_named() -> None:
    pieces = frames(message(1))
    assert len(pieces) > 4
    assembler = Assembler()
    assert assembler.missing(pieces[0].key) == []
    feed(assembler, [pieces[1], pieces[3]])
    assert assembler.missing(pieces[0].key) == [0, 2, *range(4, len(pieces))]


def test_the_message_longest_untouched_gives_way() -> None:
    steps = {step: frames(message(step)) for step in range(3)}
    assembler = Assembler(max_partial=2)
    assembler.add(steps[0][0])
    assembler.add(steps[1][0])
    assembler.add(steps[0][1])
    assert assembler.dropped == 0
    assembler.add(steps[2][0])
    assert assembler.dropped == 1
    assert assembler.missing(steps[1][0].key) == []
    assert feed(assembler, steps[0][2:]) == [message(0)]
    assert feed(assembler, steps[2][1:]) == [message(2)]
    assert feed(assembler, steps[1]) == [message(1)]


def test_memory_is_bounded_by_what_arrived_and_by_max_partial() -> None:
    limits = Limits(max_message_bytes=1 << 20)
    assembler = Assembler(limits, max_partial=3)
    chunk = 64 << 10
    tracemalloc.start()
    try:
        for step in range(50):
            for index in range(10):
                body = bytes([step]) * chunk
                assembler.add(Frame("infer", "run", "session", step, index, 16, 1 << 20, 0, body))
        held = assembler.held_bytes
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held == 3 * 10 * chunk
    assert peak_bytes < held + 4 * chunk
    assert assembler.dropped == 47


def test_a_declared_size_takes_no_memory() -> None:
    assembler = Assembler(max_partial=1)
    tracemalloc.start()
    try:
        assembler.add(Frame("infer", "run", "session", 1, 0, 4096, 64 << 20, 0, b"x"))
        assert tracemalloc.get_traced_memory()[1] < 10_000
    finally:
        tracemalloc.stop()


def test_limits_apply_to_frames_from_anywhere() -> None:
    assembler = Assembler(Limits(max_message_bytes=1000, max_chunks=4))
    frame = Frame("infer", "run", "session", 1, 0, 2, 100, 0, b"x")
    assembler.add(frame)
    assert refusal(assembler, replace(frame, step=2, size=1001)) == "limit"
    assert refusal(assembler, replace(frame, step=2, count=5)) == "limit"
    with pytest.raises(ConfigError):
        Assembler(max_partial=0)


def later(**changes: object) -> bytes:
    """A frame as a later version of the protocol may write it."""
    frame = {
        **{"v": 2, "kind": "train", "session": "s1", "step": 7, "route": ["a", {"b": None}], "sealed": True},
        "parts": {str(number): bytes(10) for number in range(20)},
        "crc64": cbor2.CBORTag(67, b"abc"),
        **changes,
    }
    return cbor2.dumps({name: value for name, value in frame.items() if value is not ...})


def test_a_frame_of_a_later_version_is_told_from_garbage() -> None:
    for data in (later(), later(**{"body": bytes(3 << 20)}), later(v=0), later(v=2**64 - 1)):
        with pytest.raises(WireError) as caught:
            decode_frame(data)
        assert caught.value.reason == "version"
        frame = foreign_version(data)
        assert frame is not None
        assert (frame.kind, frame.session, frame.step) == ("train", "s1", 7)
    assert foreign_version(later()) == ForeignFrame(2, "train", "s1", 7)


@pytest.mark.parametrize(
    "changes",
    [
        {"session": ...},
        {"step": ...},
        {"session": 1},
        {"session": "a\nb"},
        {"session": "ä"},
        {"session": "a" * 129},
        {"step": -1},
        {"step": 2**63},
        {"step": "7"},
        {"step": 7.0},
    ],
)
def test_session_and_step_are_told_only_when_both_are_well_formed(changes: dict[str, object]) -> None:
    assert foreign_version(later(**changes)) == ForeignFrame(2, "train", None, None)


@pytest.mark.parametrize("kind", [..., 5, "a\nb", "\x1b[2J", "ä", "a" * 129])
def test_a_kind_that_must_not_be_shown_is_left_out(kind: object) -> None:
    assert foreign_version(later(kind=kind)) == ForeignFrame(2, "", "s1", 7)


def test_frames_of_this_version_and_garbage_are_not_foreign() -> None:
    ours = encode(message(1))[0]
    for data in (ours, ours[:-1], ours + b"\0", later(v=1), later(v=-1), later(v="2"), later(v=2.0), later(v=...), b""):
        assert foreign_version(data) is None
        with pytest.raises(WireError) as caught:
            decode_frame(data + b"\0")
        assert caught.value.reason != "version"
    for data in (b"\xbf" + later()[1:] + b"\xff", b"\x81" + later(), cbor2.dumps(cbor2.CBORTag(24, {"v": 2}))):
        assert foreign_version(data) is None


@given(st.binary(max_size=120) | st.binary(max_size=120).map(lambda rest: b"\xa8\x61v\x02" + rest))
def test_whatever_decoding_calls_another_version_can_be_answered(data: bytes) -> None:
    try:
        decode_frame(data)
    except WireError as exc:
        if exc.reason == "version":
            assert foreign_version(data) is not None


@given(st.integers(0, len(later()) - 1), st.binary(max_size=4))
def test_a_damaged_foreign_frame_never_raises(position: int, change: bytes) -> None:
    data = later()
    frame = foreign_version(data[:position] + change + data[position + len(change) :])
    if frame is not None and frame.session is not None:
        check_identity("refused", "", frame.session, frame.step)


def test_an_unknown_kind_is_told_too() -> None:
    newer = cbor2.loads(encode(message(1))[0]) | {"kind": "telepathy"}
    data = cbor2.dumps(newer)
    with pytest.raises(WireError) as caught:
        decode_frame(data)
    assert caught.value.reason == "kind"
    assert unknown_kind(data) == ForeignFrame(1, "telepathy", "session", 1)
    assert foreign_version(data) is None
    assert unknown_kind(encode(message(1))[0]) is None
    assert unknown_kind(later(kind="telepathy")) is None
    assert unknown_kind(b"\xa0") is None


def test_the_older_side_is_told_to_upgrade() -> None:
    def conflict(*theirs: object) -> str | None:
        return version_conflict(theirs, here="device", there="server")

    assert conflict(2) == "the server speaks protocol version 2, this device 1: upgrade psgl on the device"
    assert conflict(0) == "the server speaks protocol version 0, this device 1: upgrade psgl on the server"
    assert conflict(3, 2) == "the server speaks protocol version 3, this device 1: upgrade psgl on the device"
    assert version_conflict([2], here="server", there="device") == (
        "the device speaks protocol version 2, this server 1: upgrade psgl on the server"
    )
    for shared in ((1,), (1, 2), (2, 1), (), ("2",), (True,), (-2,), (None, [2], 2.0), ("2", 1)):
        assert conflict(*shared) is None
