from __future__ import annotations

import struct
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_sdk.codec import pack_tensors, unpack_tensors
from edge_sdk.errors import ConfigError, WireError
from edge_sdk.wire import KINDS, Assembler, Frame, Limits, Message, Packing, decode_body, decode_frame, encode

GOLDEN = Path(__file__).parent.parent / "golden"
REASONS = {
    *("truncated", "trailing", "cbor", "tag", "version", "kind", "limit", "schema"),
    *("crc", "header", "conflict", "dtype", "shape", "nonfinite", "range"),
}

ACTIVATIONS = (np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2) - 5) / 8
LEVELS = np.array([-0.5, 1.0, 0.25, 1.75, 1.75, 0.25, 0.25, -0.5, 1.0, 1.75, -0.5, 0.25], np.float32)
FRONT = {
    "p.conv.weight": ACTIVATIONS[:, :1, 0] / 4,
    "b.norm.mean": np.array([0.5, -1.5, 2.0], np.float32),
    "s.steps": np.array(12, np.float32),
}
SAMPLES: dict[str, Message] = {
    "train": Message("train", "r1", "s1", 7, {"front": 3}, {"activations": ACTIVATIONS, "labels": np.array([1, 9])}),
    "store": Message(
        "store",
        "r1",
        "s1",
        9,
        {"front": 0, "first": 64, "total": 5000},
        {"activations": ACTIVATIONS[:, :, 0, 0], "labels": np.array([3, 0])},
    ),
    "front": Message("front", "r1", "s1", 10, {"front": 3, "samples": 700}, FRONT),
    "infer": Message("infer", "r1", "s1", 8, {"front": 3}, {"activations": ACTIVATIONS[:, :, 0]}),
    "fetch": Message("fetch", "r1", "s1", 12, {"bundle": "ab12", "first": 61440, "most": 61440}),
    "state": Message(
        "state",
        "",
        "s1",
        0,
        {"status": "online", "manifest": "ab12", "versions": {"wire": 1, "sdk": "0.1.0"}},
    ),
    "gradient": Message(
        "gradient",
        "r1",
        "s1",
        7,
        {"front": 3, "rate": 0.1, "loss": 2.25, "round": 4},
        {"gradient": ACTIVATIONS * 1e-7},
    ),
    "stored": Message("stored", "r1", "s1", 9, {"samples": 66}),
    "synchronised": Message("synchronised", "r1", "s1", 10, {"front": 4, "round": 40}, FRONT),
    "decision": Message(
        "decision",
        "r1",
        "s1",
        7,
        {"front": 3},
        {
            "probabilities": np.array([[0.25, 0.75], [0.5, 0.5]], np.float32),
            "class.attacked": np.array([1, 0]),
            "class.fused": np.array([1, 1]),
        },
    ),
    "part": Message(
        "part",
        "r1",
        "s1",
        12,
        {"bundle": "ab12", "first": 61440, "total": 61445},
        {"part": np.frombuffer(b"PK\5\6\0", np.uint8)},
    ),
    "refused": Message("refused", "r1", "s1", 7, {"reason": "run", "detail": "this run is over"}),
    "missing": Message("missing", "r1", "s1", 7, {"chunks": [0, 2, 300]}),
    "model": Message(
        "model",
        "r1",
        "",
        0,
        {
            "bundle": "ab12",
            "front": 0,
            "rounds": 20,
            "evaluate_every": 5,
            "batch": 32,
            "status": "open",
            "later": [None, True],
        },
    ),
}
VARIANTS: dict[str, tuple[Message, str | Packing]] = {  # optional fields, absent tensors, other codecs
    "train-packed": (
        replace(SAMPLES["train"], tensors={**SAMPLES["train"].tensors, "activations": LEVELS.reshape(2, 3, 2)}),
        Packing(2),
    ),
    "store-packed": (
        replace(SAMPLES["store"], tensors={**SAMPLES["store"].tensors, "activations": LEVELS[:10].reshape(2, 5) * 2}),
        Packing(4, -1.5, 6.0),
    ),
    "train-float16": (SAMPLES["train"], "float16"),
    "train-samples": (replace(SAMPLES["train"], fields={"front": 3, "samples": 700}), "float32"),
    "front-float16": (SAMPLES["front"], "float16"),
    "front-request": (replace(SAMPLES["front"], step=11, fields={"front": 0}, tensors={}), "float32"),
    "gradient-synchronise": (
        replace(SAMPLES["gradient"], fields={**SAMPLES["gradient"].fields, "synchronise": True}),
        "float32",
    ),
    "synchronised-keep": (replace(SAMPLES["synchronised"], step=11, tensors={}), "float32"),
    "model-shared": (
        Message(
            "model",
            "r1",
            "",
            0,
            {
                **{"bundle": "ab12", "status": "training", "rounds": 300, "evaluate_every": 100, "batch": 32},
                **{"round": 40, "front": 4, "fronts": "shared", "server": "5e44", "speaks": [1]},
                "versions": {"psgl": "0.2.0"},
            },
        ),
        "float32",
    ),
    "state-done": (
        Message(
            "state",
            "",
            "s1",
            0,
            {
                **{"status": "done", "manifest": "ab12", "versions": {"psgl": "0.2.0"}, "speaks": [1]},
                **{"round": 300, "bytes_per_sample": 1604.5},
                "evaluation": {
                    **{"samples": 100, "fused": 93, "streams": {"attacked": 90}},
                    **{"guide_right": 0, "guide_agreed": 0, "guide_followed": 0, "has_guide": False},
                },
            },
        ),
        "float32",
    ),
}

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=10)
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
IDS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    batch = draw(st.integers(1, 4))
    shape = (batch, *draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=4)))
    activations = draw(hnp.arrays(np.float32, shape, elements=FLOATS))
    labels = draw(hnp.arrays(np.int64, (batch,), elements=st.integers(0, 2**63 - 1)))
    extra = draw(st.dictionaries(st.text(max_size=5).map("x".__add__), PLAIN, max_size=3))
    fields = {"front": draw(st.integers(0, 2**63 - 1)), **extra}
    tensors = {"activations": activations, "labels": labels}
    return Message("train", draw(IDS), draw(IDS), draw(st.integers(0, 2**63 - 1)), fields, tensors)


@st.composite
def fronts(draw: st.DrawFn) -> Message:
    names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)
    array = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=6, max_side=3), elements=FLOATS)
    return Message("front", "r", "s", 1, {"front": 0}, draw(st.dictionaries(names, array, max_size=5)))


def decode(frames: list[bytes], limits: Limits | None = None) -> Message:
    assembler = Assembler(limits or Limits())
    results = [assembler.add(decode_frame(data, limits or Limits())) for data in frames]
    assert results[:-1] == [None] * (len(frames) - 1)
    assert results[-1] is not None
    return results[-1]


def refusal(frames: list[bytes], limits: Limits | None = None) -> str:
    with pytest.raises(WireError) as caught:
        decode(frames, limits)
    assert "\n" not in str(caught.value)
    assert caught.value.reason in REASONS
    return caught.value.reason


def frame_of(body: bytes, /, **changes: Any) -> bytes:
    """A frame whose checksum is right, as an attacker would make it."""
    header = {
        "v": 1, "kind": "train", "run": "r1", "session": "s1", "step": 7, "chunk": [0, 1],
        "size": len(body), "crc": zlib.crc32(body), "body": body,
    }  # fmt: skip
    return cbor2.dumps({name: value for name, value in {**header, **changes}.items() if value is not ...})


def body_of(activations: Any = ..., /, **changes: Any) -> bytes:
    tensors = {
        "activations": {"data": typed([2, 1], 85, b"\0" * 8)} if activations is ... else activations,
        "labels": {"data": typed([2], 79, b"\0" * 16)},
    }
    content = {"id": ["train", "r1", "s1", 7], "fields": {"front": 0}, "tensors": tensors, **changes}
    return cbor2.dumps({name: value for name, value in content.items() if value is not ...})


def typed(dims: Any, tag: int, data: Any) -> cbor2.CBORTag:
    return cbor2.CBORTag(40, [dims, cbor2.CBORTag(tag, data)])


def test_the_hand_made_frame_is_valid() -> None:
    message = decode([frame_of(body_of())])
    assert message.tensors["activations"].shape == (2, 1)


@given(messages(), st.integers(1, 3000))
@settings(deadline=None)
def test_round_trip(message: Message, chunk_bytes: int) -> None:
    frames = encode(message, chunk_bytes=chunk_bytes)
    assert decode(frames) == message
    assert encode(message, chunk_bytes=chunk_bytes) == frames
    assert all(len(data) <= chunk_bytes + 1024 for data in frames)


@given(fronts(), st.sampled_from(["float32", "float16"]))
@settings(deadline=None)
def test_fronts_of_any_shape_round_trip(message: Message, codec: str) -> None:
    back = decode(encode(message, codec=codec))
    assert {name: array.shape for name, array in back.tensors.items()} == {
        name: array.shape for name, array in message.tensors.items()
    }
    for name, sent in message.tensors.items():
        got = back.tensors[name]
        assert got.dtype == np.float32
        if codec == "float32":
            assert np.array_equal(got, sent)
        else:
            assert np.allclose(got, sent, rtol=2**-11, atol=max(2.0**-39 * float(np.abs(sent).max()), 2.0**-149))


@given(messages())
def test_float16_round_trip(message: Message) -> None:
    back = decode(encode(message, codec="float16"))
    sent, got = message.tensors["activations"], back.tensors["activations"]
    assert got.dtype == np.float32
    assert np.array_equal(back.tensors["labels"], message.tensors["labels"])
    assert np.allclose(got, sent, rtol=2**-11, atol=max(2.0**-39 * float(np.abs(sent).max()), 2.0**-149))


@pytest.mark.parametrize("kind", list(KINDS))
def test_golden_bytes(kind: str) -> None:
    frozen = (GOLDEN / f"{kind}.cbor").read_bytes()
    assert encode(SAMPLES[kind]) == [frozen]
    assert decode([frozen]) == SAMPLES[kind]


@pytest.mark.parametrize("name", list(VARIANTS))
def test_golden_variants(name: str) -> None:
    message, codec = VARIANTS[name]
    frozen = (GOLDEN / f"{name}.cbor").read_bytes()
    assert encode(message, codec=codec) == [frozen]
    assert decode([frozen]) == message  # eighths are exact in float16, levels in few bits


def test_golden_pack() -> None:
    pack = (GOLDEN / "tensors.cbor").read_bytes()
    tensors = {"conv1.weight": ACTIVATIONS, "s.t": np.array(3, np.float32), "seen": np.array([1, 2])}
    assert pack_tensors(tensors) == pack
    back = unpack_tensors(pack)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], array) for name, array in tensors.items())


def test_golden_files_and_kinds_match() -> None:
    assert SAMPLES.keys() == KINDS.keys()
    assert {path.stem for path in GOLDEN.glob("*.cbor")} == {*KINDS, *VARIANTS, "tensors"}


def test_a_frame_spelled_out() -> None:
    body = bytes.fromhex(
        "a3"  # map of 3
        "626964" "84" "67" + b"missing".hex() + "6172" "6173" "01"  # id: [missing, r, s, 1]
        "666669656c6473" "a1" "66" + b"chunks".hex() + "8102"  # fields: {chunks: [2]}
        "6774656e736f7273" "a0"  # tensors: {}
    )  # fmt: skip
    frame = bytes.fromhex(
        "a9" "6176" "01" "63637263" "1a" + struct.pack(">I", zlib.crc32(body)).hex() + "6372756e" "6172"
        "64626f6479" "58" + bytes([len(body)]).hex() + body.hex() + "646b696e64" "67" + b"missing".hex()
        + "6473697a65" "18" + bytes([len(body)]).hex() + "6473746570" "01" "656368756e6b" "820001"
        "67" + b"session".hex() + "6173"
    )  # fmt: skip
    message = Message("missing", "r", "s", 1, {"chunks": [2]})
    assert encode(message) == [frame]
    assert decode([frame]) == message


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_truncation_and_every_flipped_bit_is_noticed(kind: str) -> None:
    (data,) = encode(SAMPLES[kind])
    for end in range(len(data)):
        assert refusal([data[:end]]) == "truncated"
    assert refusal([data + b"\0"]) == "trailing"
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            refusal([bytes(flipped)])


@given(st.sampled_from(list(KINDS)), st.data())
@settings(max_examples=400)
def test_mutated_frames_never_change_a_message(kind: str, draw: st.DataObject) -> None:
    data = bytearray(encode(SAMPLES[kind])[0])
    for _ in range(draw.draw(st.integers(1, 4))):
        start = draw.draw(st.integers(0, len(data) - 1))
        end = draw.draw(st.integers(start, min(len(data), start + 4)))
        data[start:end] = draw.draw(st.binary(max_size=4))
    try:
        message = decode([bytes(data)])
    except WireError as exc:
        assert exc.reason in REASONS
    else:
        assert message == SAMPLES[kind]


@given(st.binary(max_size=100))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert refusal([data])


@given(st.data())
@settings(max_examples=400)
def test_mutated_bodies_under_a_right_checksum_are_valid_or_refused(draw: st.DataObject) -> None:
    body = bytearray(body_of())
    for _ in range(draw.draw(st.integers(1, 4))):
        start = draw.draw(st.integers(0, len(body) - 1))
        end = draw.draw(st.integers(start, min(len(body), start + 3)))
        body[start:end] = draw.draw(st.binary(max_size=3))
    try:
        message = decode([frame_of(bytes(body))])
    except WireError as exc:
        assert exc.reason in REASONS
    else:
        assert decode(encode(message)) == message


@given(st.binary(max_size=200))
def test_random_bodies_under_a_right_checksum_are_refused(body: bytes) -> None:
    assert refusal([frame_of(body)])


TREES = st.recursive(
    PLAIN
    | st.binary(max_size=20)
    | st.integers(-(2**64), 2**64 - 1)
    | st.builds(typed, st.just([2, 1]), st.just(85), st.just(b"\0" * 8)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "data", "scale", "fields", "front", "labels"]), inner, max_size=3)
        | st.builds(cbor2.CBORTag, st.sampled_from([0, 1, 2, 35, 40, 64, 79, 84, 85, 256]), inner)
    ),
    max_leaves=8,
)


@given(st.sampled_from(["id", "fields", "tensors"]), TREES)
def test_any_tree_in_a_body_is_valid_or_refused(name: str, tree: Any) -> None:
    try:
        decode([frame_of(body_of(**{name: tree}))])
    except WireError as exc:
        assert exc.reason in REASONS


@given(st.sampled_from(["v", "kind", "run", "session", "step", "chunk", "size", "crc", "body"]), TREES)
def test_any_tree_in_a_header_is_refused(name: str, tree: Any) -> None:
    body = body_of()
    try:
        message = decode([frame_of(body, **{name: tree})])
    except WireError as exc:
        assert exc.reason in REASONS
    else:
        assert message == decode([frame_of(body)])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"v": 2}, "version"),
        ({"v": 0}, "version"),
        ({"v": 2**64 - 1}, "version"),
        ({"v": -1}, "schema"),
        ({"v": True}, "schema"),
        ({"v": "1"}, "schema"),
        ({"v": ...}, "schema"),
        ({"v": 2, "crc": ..., "new": 1}, "version"),
        ({"v": 2, "new": cbor2.CBORTag(35, "(")}, "version"),
        ({"v": 2, "new": [[[[{"a": list(range(100))}]]]]}, "version"),
        ({"v": 2, "new": "a" * 2000}, "version"),
        ({"v": 2, "new": cbor2.undefined}, "version"),
        ({"v": cbor2.CBORTag(40, 2)}, "tag"),
        ({"kind": "pickle"}, "kind"),
        ({"kind": "infer"}, "header"),
        ({"run": "r2"}, "header"),
        ({"session": "s2"}, "header"),
        ({"step": 6}, "header"),
        ({"crc": 0}, "crc"),
        ({"crc": -1}, "schema"),
        ({"crc": 2**32}, "schema"),
        ({"crc": 1.5}, "schema"),
        ({"crc": ...}, "schema"),
        ({"new": 1}, "schema"),
        ({"chunk": [0, 0]}, "schema"),
        ({"chunk": [1, 1]}, "schema"),
        ({"chunk": [-1, 1]}, "schema"),
        ({"chunk": [0, 1, 2]}, "schema"),
        ({"chunk": [0, True]}, "schema"),
        ({"chunk": [0, 1.0]}, "schema"),
        ({"chunk": {"0": 1}}, "schema"),
        ({"chunk": [0, 4097]}, "limit"),
        ({"chunk": [0, 2**63]}, "limit"),
        ({"size": 2**60}, "limit"),
        ({"size": 0}, "schema"),
        ({"size": -5}, "schema"),
        ({"size": 5}, "schema"),
        ({"size": 1000}, "schema"),
        ({"body": b"", "size": 0}, "schema"),
        ({"body": "text"}, "schema"),
        ({"body": [1]}, "schema"),
        ({"body": cbor2.CBORTag(24, b"a")}, "tag"),
        ({"body": [[[[1]]]]}, "limit"),
        ({"new": list(range(30))}, "limit"),
        ({"run": "a" * 600}, "limit"),
    ],
)
def test_hostile_headers(changes: dict[str, Any], reason: str) -> None:
    assert refusal([frame_of(body_of(), **changes)]) == reason


FLOAT_DATA = b"\0" * 8
NAN, INFINITY = struct.pack("<ff", 1, float("nan")), struct.pack("<ff", 1, float("inf"))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"data": typed([2, 1], 85, NAN)}, "nonfinite"),
        ({"data": typed([2, 1], 85, INFINITY)}, "nonfinite"),
        ({"data": typed([2, 1], 84, struct.pack("<ee", 1, float("inf"))), "scale": 1.0}, "nonfinite"),
        ({"data": typed([2, 1], 84, struct.pack("<ee", 1, 60000)), "scale": 2.0**127}, "nonfinite"),
        ({"data": typed([2, 1], 84, b"\0" * 4)}, "schema"),
        ({"data": typed([2, 1], 84, b"\0" * 4), "scale": None}, "schema"),
        ({"data": typed([2, 1], 84, b"\0" * 4), "scale": 0.0}, "schema"),
        ({"data": typed([2, 1], 84, b"\0" * 4), "scale": float("nan")}, "schema"),
        ({"data": typed([2, 1], 85, FLOAT_DATA), "scale": 1.0}, "schema"),
        ({"data": typed([2, 1], 85, FLOAT_DATA), "scale": None}, "schema"),
        ({"data": typed([2, 1], 85, FLOAT_DATA), "zero": 1}, "schema"),
        ({"scale": 1.0}, "schema"),
        ({}, "schema"),
        (typed([2, 1], 85, FLOAT_DATA), "schema"),
        ({"data": typed([2, 1], 79, b"\0" * 16)}, "dtype"),
        ({"data": typed([2, 1], 64, b"\0" * 2)}, "dtype"),
        ({"data": typed([2, 1], 81, FLOAT_DATA)}, "tag"),
        ({"data": typed([2, 1], 86, b"\0" * 16)}, "tag"),
        ({"data": typed([2], 85, FLOAT_DATA)}, "shape"),
        ({"data": typed([1, 2], 85, FLOAT_DATA)}, "shape"),
        ({"data": typed([2, 2], 85, FLOAT_DATA)}, "shape"),
        ({"data": typed([-2, -1], 85, FLOAT_DATA)}, "shape"),
        ({"data": typed([float("nan"), 1], 85, FLOAT_DATA)}, "shape"),
        ({"data": typed([2**32, 2**32], 85, FLOAT_DATA)}, "limit"),
    ],
)
def test_hostile_tensors(entry: Any, reason: str) -> None:
    assert refusal([frame_of(body_of(entry))]) == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": ...}, "schema"),
        ({"new": 1}, "schema"),
        ({"fields": [1]}, "schema"),
        ({"fields": {}}, "schema"),
        ({"fields": {"front": 0, "more": cbor2.CBORTag(85, b"")}}, "schema"),
        ({"fields": {"front": 0, "more": cbor2.CBORTag(35, "(")}}, "tag"),
        ({"fields": {"front": 0, "more": cbor2.CBORTag(2, b"\xff" * 100)}}, "tag"),
        ({"fields": {"front": 0, "more": "a" * 70_000}}, "limit"),
        ({"fields": {"front": 0, "more": [0] * 20_000}}, "limit"),
        ({"tensors": []}, "schema"),
        ({"tensors": {}}, "schema"),
        ({"id": ["train", "r1", "s1"]}, "schema"),
        ({"id": "train"}, "schema"),
        ({"id": ["pickle", "r1", "s1", 7]}, "kind"),
        ({"id": ["train", "r1", "s1", 8]}, "header"),
        ({"id": ["infer", "r1", "s1", 7]}, "schema"),
    ],
)
def test_hostile_bodies(changes: dict[str, Any], reason: str) -> None:
    assert refusal([frame_of(body_of(**changes))]) == reason


def test_depth_bombs_and_duplicate_keys() -> None:
    for bomb in (b"\x81" * 5000 + b"\0", b"\xa1\x61a" * 5000 + b"\0", b"\xd8\x28" * 5000 + b"\0"):
        assert refusal([bomb]) in {"limit", "tag"}
        assert refusal([frame_of(bomb)]) == "limit"
    data = frame_of(body_of())
    assert data[:4] == b"\xa9\x61v\x01"
    assert refusal([b"\xaa\x61v\x01" + data[1:]]) == "cbor"
    body = cbor2.dumps({"id": 1})
    assert refusal([frame_of(b"\xa2" + body[1:] * 2)]) == "cbor"


def test_refusing_takes_no_memory() -> None:
    huge = [
        frame_of(body_of(), size=2**60, chunk=[0, 2]),
        b"\xa1\x64body\x5b" + struct.pack(">Q", 2**50) + b"x",
        frame_of(body_of({"data": typed([2**24, 1], 85, FLOAT_DATA)})),
        frame_of(body_of({"data": typed([2**30, 2**30, 2**30], 85, FLOAT_DATA)})),
        frame_of(b"\xa1\x66fields\x9a" + struct.pack(">I", 500_000) + b"\xa0" * 500_000),
        b"\x9a" + struct.pack(">I", 1 << 20) + b"\x80" * (1 << 20),
    ]
    for data in huge:
        tracemalloc.start()
        try:
            refusal([data])
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak_bytes < 2 * len(data) + 300_000


def test_a_packet_above_the_limit_is_refused_unread() -> None:
    assert refusal([b"\xff" * ((1 << 20) + 1025)]) == "limit"
    assert refusal([b"\xff" * 3000], Limits(max_chunk_bytes=1000)) == "limit"


def test_the_limits_of_the_receiver_hold() -> None:
    message = SAMPLES["train"]
    frames = encode(message)
    size = decode_frame(frames[0]).size
    for limits in (
        Limits(max_message_bytes=size - 1),
        Limits(max_chunk_bytes=size - 1),
        Limits(max_tensors=1),
        Limits(max_elements=5),
        Limits(max_dims=3),
        Limits(max_items=20),
        Limits(max_depth=5),
        Limits(max_text_bytes=8),
    ):
        assert refusal(frames, limits) == "limit"
    decode(frames, Limits(max_message_bytes=size, max_chunk_bytes=size, max_tensors=2, max_dims=4, max_depth=6))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Message("pickle", "r", "s", 0), "kind"),
        (Message("refused", "r\n", "s", 0, {"reason": "a"}), "schema"),
        (Message("refused", "r", "s", 0), "schema"),
        (Message("refused", "r", "s", 0, {"reason": "\ud800"}), "cbor"),
        (Message("refused", "r", "s", 0, {"reason": "a" * 70_000}), "limit"),
        (Message("refused", "r", "s", 0, {"reason": "a", "more": [0] * 20_000}), "limit"),
        (
            Message("infer", "r", "s", 0, {"front": 0}, {"activations": ACTIVATIONS * np.float32("nan")}),
            "nonfinite",
        ),
        (Message("infer", "r", "s", 0, {"front": 0}, {"activations": ACTIVATIONS.astype(float)}), "dtype"),
    ],
)
def test_what_would_be_refused_is_not_sent(message: Message, reason: str) -> None:
    with pytest.raises(WireError) as caught:
        encode(message)
    assert caught.value.reason == reason


def test_a_message_above_the_limit_is_not_sent() -> None:
    with pytest.raises(WireError) as caught:
        encode(SAMPLES["train"], limits=Limits(max_message_bytes=100))
    assert caught.value.reason == "limit"


@pytest.mark.parametrize("options", [{"codec": "int8"}, {"chunk_bytes": 0}, {"chunk_bytes": 2 << 20}])
def test_options_that_cannot_serve_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        encode(SAMPLES["train"], **options)


def test_too_many_chunks_are_refused() -> None:
    with pytest.raises(ConfigError, match="raise chunk_bytes"):
        encode(SAMPLES["train"], chunk_bytes=1, limits=Limits(max_chunks=10))


def test_a_body_that_is_not_whole_is_refused() -> None:
    frame = decode_frame(encode(SAMPLES["train"])[0])
    for body in (frame.body[:-1], frame.body + b"\0", b""):
        with pytest.raises(WireError) as caught:
            decode_body(frame, body)
        assert caught.value.reason == "truncated"


def test_frames_show_no_data() -> None:
    frame = decode_frame(encode(SAMPLES["train"])[0])
    assert isinstance(frame, Frame)
    assert "body" not in repr(frame)


def test_decoded_tensors_are_views_of_what_arrived() -> None:
    big = np.ones((64, 64, 16, 16), np.float32)
    frames = encode(Message("infer", "r", "s", 0, {"front": 0}, {"activations": big}), chunk_bytes=1 << 20)
    parsed = [decode_frame(data) for data in frames]
    assembler = Assembler()
    tracemalloc.start()
    try:
        results = [assembler.add(frame) for frame in parsed]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert results[-1] is not None
    assert not results[-1].tensors["activations"].flags.owndata
    assert peak_bytes < 4 * big.nbytes  # the joined body, and the tensor as cbor2 collects it
