from __future__ import annotations

import json
import struct
import subprocess
import sys
import tracemalloc

import cbor2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_sdk import cbor
from edge_sdk.errors import ConfigError, WireError
from edge_sdk.limits import Limits

LIMITS = Limits(max_items=200, max_depth=6, max_text_bytes=100)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


def refusal(data: bytes, limits: Limits = LIMITS, tags: frozenset[int] = frozenset()) -> str:
    with pytest.raises(WireError) as caught:
        cbor.loads(data, limits, tags)
    assert "\n" not in str(caught.value)
    return caught.value.reason


@given(VALUES)
def test_round_trip_and_every_truncation(value: object) -> None:
    data = cbor.dumps(value)
    roomy = Limits(max_depth=40)
    assert cbor.loads(data, roomy) == value
    for end in range(len(data)):
        assert refusal(data[:end], roomy) == "truncated"
    assert refusal(data + b"\x00", roomy) == "trailing"


@given(st.dictionaries(st.text(max_size=4), st.integers(), max_size=5))
def test_encoding_does_not_depend_on_the_order_of_keys(value: dict[str, int]) -> None:
    assert cbor.dumps(value) == cbor.dumps(dict(reversed(value.items())))


@given(st.binary(max_size=60))
@example(b"\xd8\x23\x61(")  # tag 35: a regular expression that does not compile
def test_random_bytes_are_decoded_or_refused(data: bytes) -> None:
    try:
        cbor.loads(data, LIMITS, frozenset({40, 85}))
    except WireError as exc:
        assert "\n" not in str(exc)


@pytest.mark.parametrize("tag", [*range(6), 21, 22, 23, 24, 25, 28, 29, 30, 32, 35, 36, 37, 41, 64, 81, 82, 86])
@pytest.mark.parametrize("content", ["a", "2020-01-01", b"\x01", 1, [1, 2]])
def test_no_other_tag_reaches_a_decoder(tag: int, content: object) -> None:
    inner = cbor2.dumps(content)
    head = bytes([0xC0 | tag]) if tag < 24 else bytes([0xD8, tag])
    assert refusal(head + inner, tags=frozenset({40, 85})) == "tag"
    assert refusal(b"\x81" + head + inner) == "tag"


@pytest.mark.parametrize("tag", [100, 256, 258, 260, 261, 1004, 43000, 55799, 2**32, 2**64 - 1])
def test_no_other_wide_tag_reaches_a_decoder(tag: int) -> None:
    for width, code in ((2, ">H"), (4, ">I"), (8, ">Q")):
        if tag < 256**width:
            head = bytes([0xD9 + {2: 0, 4: 1, 8: 2}[width]]) + struct.pack(code, tag)
            assert refusal(head + b"\x61a", tags=frozenset({40})) == "tag"


def test_an_allowed_tag_is_returned_as_a_tag_however_it_is_written() -> None:
    expected = cbor2.CBORTag(40, 1)
    for head in (b"\xd8\x28", b"\xd9\x00\x28", b"\xda\x00\x00\x00\x28"):
        assert cbor.loads(head + b"\x01", LIMITS, frozenset({40})) == expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (b"\x9b" + struct.pack(">Q", 2**60), "truncated"),
        (b"\x9a" + struct.pack(">I", 2**31) + b"\x00" * 5, "truncated"),
        (b"\xbb" + struct.pack(">Q", 2**60), "truncated"),
        (b"\x5b" + struct.pack(">Q", 2**50) + b"x", "truncated"),
        (b"\x5b" + struct.pack(">Q", 2**64 - 1) + b"x", "truncated"),
        (b"\x7b" + struct.pack(">Q", 2**50) + b"x", "truncated"),
        (b"\x7b" + struct.pack(">Q", 2**63) + b"x", "truncated"),
        (b"\x81" * 7 + b"\x00", "limit"),
        (b"\xd8\x28" * 7 + b"\x00", "limit"),
        (b"\x81" * 100_000, "limit"),
        (b"\x78\x65" + b"a" * 101, "limit"),
        (b"\x98\xc8" + b"\x00" * 200, "limit"),
        (b"\x9f\x01\xff", "cbor"),
        (b"\xbf\x61a\x01\xff", "cbor"),
        (b"\x5f\x41a\xff", "cbor"),
        (b"\x7f\x61a\xff", "cbor"),
        (b"\xff", "cbor"),
        (b"\x1c", "cbor"),
        (b"\x3e", "cbor"),
        (b"\xdd", "cbor"),
        (b"\xf7", "cbor"),
        (b"\xe0", "cbor"),
        (b"\xf8\x14", "cbor"),
        (b"\xf8\xff", "cbor"),
        (b"\xa1\x01\x02", "cbor"),
        (b"\xa1\x41a\x02", "cbor"),
        (b"\xa1\x80\x02", "cbor"),
        (b"\xa1\xd8\x28\x61a\x02", "cbor"),
        (b"\xa2\x61a\x01\x61a\x02", "cbor"),
        (b"\xa2\x61a\x01\x78\x01a\x02", "cbor"),
        (b"\x61\xff", "cbor"),
        (b"\x63\xed\xa0\x80", "cbor"),
        (b"\x01\x02", "trailing"),
    ],
)
def test_what_is_not_strict_is_refused_without_taking_memory(data: bytes, reason: str) -> None:
    tracemalloc.start()
    try:
        assert refusal(data, tags=frozenset({40})) == reason
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 200_000


@pytest.mark.parametrize("item", [b"\x80", b"\xa0", b"\x00", b"\x40", b"\x60", b"\xf6"])
def test_many_small_items_are_refused_before_they_become_objects(item: bytes) -> None:
    data = b"\x9a" + struct.pack(">I", 1 << 20) + item * (1 << 20)
    tracemalloc.start()
    try:
        assert refusal(data) == "limit"
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 100_000


def test_native_memory_stays_bounded() -> None:
    """tracemalloc does not see what a native decoder takes: look at the process."""
    program = """
import json, resource, struct
from edge_sdk import cbor
from edge_sdk.errors import WireError
from edge_sdk.limits import Limits
sizes = [struct.pack(">Q", 1 << power) for power in range(64)]
bombs = [bytes([major << 5 | 27]) + size for major in (2, 3, 4, 5) for size in sizes]
bombs += [b"\\x9a" + struct.pack(">I", 1 << 22) + b"\\xa0" * (1 << 22)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reasons = set()
for bomb in bombs:
    try:
        cbor.loads(bomb, Limits())
        reasons.add("accepted")
    except WireError as exc:
        reasons.add(exc.reason)
print(json.dumps([sorted(reasons), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    reasons, grown_kib = json.loads(done.stdout)
    assert reasons == ["limit", "truncated"]
    assert grown_kib < 16 << 10


def test_limits_are_exact() -> None:
    assert cbor.loads(b"\x98\xc7" + b"\x00" * 199, LIMITS) == [0] * 199
    assert cbor.loads(b"\x81" * 6 + b"\x00", LIMITS) == [[[[[[0]]]]]]
    assert cbor.loads(b"\x78\x64" + b"a" * 100, LIMITS) == "a" * 100


@pytest.mark.parametrize("value", [object(), "\ud800", {"a": object()}])
def test_what_has_no_encoding_is_refused(value: object) -> None:
    with pytest.raises(WireError) as caught:
        cbor.dumps(value)
    assert caught.value.reason == "cbor"


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_limits_must_be_positive_integers(value: object) -> None:
    with pytest.raises(ConfigError, match="max_depth"):
        Limits(max_depth=value)  # type: ignore[arg-type]


NAMES = frozenset({"v", "kind", "step"})


@given(st.dictionaries(st.sampled_from(["v", "kind", "step", "other"]) | st.text(max_size=5), VALUES, max_size=6))
def test_peek_reads_what_loads_reads(content: dict[str, object]) -> None:
    """Whatever else the map holds, tags that ``loads`` refuses included."""
    data = cbor2.dumps({"x": cbor2.CBORTag(35, "("), **content, "y": cbor2.undefined})
    wanted = {
        name: value
        for name, value in content.items()
        if name in NAMES and (isinstance(value, str) or (type(value) is int and 0 <= value < 2**64))
    }
    assert cbor.peek(data, NAMES, Limits()) == wanted


@given(st.binary(max_size=80) | st.binary(max_size=80).map(lambda rest: b"\xa4\x61v" + rest))
def test_peek_takes_any_bytes(data: bytes) -> None:
    for name, value in cbor.peek(data, NAMES, LIMITS).items():
        assert name in NAMES
        assert type(value) in (int, str)


def test_peek_looks_at_the_outermost_map_alone() -> None:
    for value in ({"a": {"v": 2}}, [{"v": 2}], ["v", 2], "v", {"a": "v", "b": 2}, {"v": [2]}, {"v": {"v": 2}}):
        assert cbor.peek(cbor.dumps(value), NAMES, LIMITS) == {}
    assert cbor.peek(cbor2.dumps(cbor2.CBORTag(24, {"v": 2})), NAMES, LIMITS) == {}
    assert cbor.peek(cbor2.dumps({b"v": 2, 1: 2, "kind": "a"}), NAMES, LIMITS) == {"kind": "a"}


@pytest.mark.parametrize("value", [-1, 2.0, True, None, b"2", cbor2.CBORTag(2, b"\1"), cbor2.CBORTag(40, 2), 2**64])
def test_peek_takes_unsigned_integers_and_text_alone(value: object) -> None:
    assert cbor.peek(cbor2.dumps({"v": value, "step": 1}), NAMES, LIMITS) == {"step": 1}


def test_peek_stops_at_damage_and_keeps_what_it_read() -> None:
    whole = b"\xa3\x61v\x02\x64kind\x61a\x64step\x18\x07"
    assert cbor.peek(whole, NAMES, LIMITS) == {"v": 2, "kind": "a", "step": 7}
    assert cbor.peek(whole + b"behind", NAMES, LIMITS) == {"v": 2, "kind": "a", "step": 7}
    assert cbor.peek(whole[:-1], NAMES, LIMITS) == {"v": 2, "kind": "a"}
    assert cbor.peek(whole[:4], NAMES, LIMITS) == {"v": 2}
    assert cbor.peek(whole[:3], NAMES, LIMITS) == {}
    assert cbor.peek(b"", NAMES, LIMITS) == {}
    assert cbor.peek(b"\xbf\x61v\x02\xff", NAMES, LIMITS) == {}
    assert cbor.peek(b"\xa2\x61v\x02\x61x\x5b" + b"\xff" * 8, NAMES, LIMITS) == {"v": 2}
    assert cbor.peek(b"\xa2\x64kind\x61\xff\x61v\x02", NAMES, LIMITS) == {"v": 2}
    assert cbor.peek(b"\xa3\x61v\x02\x61v\x01\x64step\x01", NAMES, LIMITS) == {"step": 1}


def test_peek_is_bounded_by_its_limits() -> None:
    def found(items: int, text: str = "a", **limits: int) -> set[str]:
        data = cbor.dumps({"kind": text, "x": [0] * items, "z": 0, "step": 1})
        at_the_end = data[:1] + data[1:].replace(b"\x64step\x01", b"") + b"\x64step\x01"
        return set(cbor.peek(at_the_end, NAMES, Limits(**limits)))

    assert found(10, max_items=18) == {"kind", "step"}  # 8 keys and values, 10 items in one of them
    assert found(10, max_items=17) == {"kind"}
    assert found(0, "a" * 8, max_text_bytes=8) == {"kind", "step"}
    assert found(0, "a" * 9, max_text_bytes=8) == {"step"}


@pytest.mark.parametrize("size", [2**16, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("major", [2, 3, 4, 5])
def test_peek_takes_no_memory_and_no_time_for_declared_lengths(major: int, size: int) -> None:
    bomb = bytes([major << 5 | 27]) + struct.pack(">Q", size)
    tracemalloc.start()
    try:
        assert cbor.peek(b"\xa2\x61v\x02\x61x" + bomb + b"\x00" * 100_000, NAMES, Limits(max_items=256)) == {"v": 2}
        assert cbor.peek(bomb + b"\x61v\x02", NAMES, Limits(max_items=256)) == ({"v": 2} if major == 5 else {})
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 250_000
