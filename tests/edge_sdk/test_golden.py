"""docs/wire.md, the frozen messages and the code say the same; a second CBOR implementation is the judge.

``cbor_diag`` (Rust) shares no code with cbor2: it turns CBOR into diagnostic notation (RFC 8949 section 8), which is
read here with a parser of a few lines, and back.
"""

from __future__ import annotations

import inspect
import math
import re
import struct
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import cbor_diag
import numpy as np
import pytest

from edge_sdk import topics, wire
from edge_sdk.chunks import VERSION, version_conflict
from edge_sdk.client import EdgeClient
from edge_sdk.codec import unpack_tensors
from edge_sdk.errors import WireError
from edge_sdk.packing import BITS, PACKED_KEYS
from edge_sdk.wire import (
    DEFAULT_LIMITS,
    KINDS,
    Assembler,
    ForeignFrame,
    Limits,
    Message,
    decode_frame,
    encode,
    foreign_version,
)

TESTS = Path(__file__).parent.parent
GOLDEN = {path.stem: path.read_bytes() for path in sorted((TESTS / "golden").glob("*.cbor"))}
FRAMES = {name: data for name, data in GOLDEN.items() if name != "tensors"}
DOCUMENT = (TESTS.parent / "docs" / "wire.md").read_text()


# ------------------------------------------------------------ a reader of diagnostic notation


class Tagged(tuple[int, Any]):
    """(tag, content)"""


TOKEN = re.compile(
    r"""\s*(?: (?P<bytes>h'[0-9a-f]*') | (?P<text>"(?:[^"\\]|\\.)*") | (?P<tag>\d+(?=\()) | (?P<word>true|false|null)
        | (?P<float>-?\d+\.\d+(?:e[+-]?\d+)?)(?:_\d)? | (?P<integer>-?\d+)(?:_\d)? | (?P<mark>[\[\]{}:,()]) )""",
    re.VERBOSE,
)
WORDS = {"true": True, "false": False, "null": None}


def read_diagnostic(text: str) -> Any:
    """Values, with every container, tag and byte string as it is written."""
    tokens = []
    position = 0
    while position < len(text):
        match = TOKEN.match(text, position)
        assert match and match.lastgroup, text[position : position + 40]
        tokens.append((match.lastgroup, match[match.lastgroup]))
        position = match.end()
    value, rest = _value(tokens)
    assert not rest
    return value


def _value(tokens: list[tuple[str, str]]) -> tuple[Any, list[tuple[str, str]]]:
    (kind, text), tokens = tokens[0], tokens[1:]
    if kind == "bytes":
        return bytes.fromhex(text[2:-1]), tokens
    if kind == "text":
        assert "\\" not in text
        return text[1:-1], tokens
    if kind == "word":
        return WORDS[text], tokens
    if kind in ("float", "integer"):
        return (float if kind == "float" else int)(text), tokens
    if kind == "tag":
        (content,), tokens = _items(tokens[1:], ")")
        return Tagged((int(text), content)), tokens
    if text == "[":
        return _items(tokens, "]")
    assert text == "{"
    items, tokens = _items(tokens, "}")
    assert len({key for key, _ in items}) == len(items)
    return dict(items), tokens


def _items(tokens: list[tuple[str, str]], end: str) -> tuple[list[Any], list[tuple[str, str]]]:
    items: list[Any] = []
    while tokens[0][1] != end:
        value, tokens = _value(tokens)
        if end == "}":
            assert tokens[0][1] == ":"
            key = value
            value, tokens = _value(tokens[1:])
            value = (key, value)
        items.append(value)
        if tokens[0][1] == ",":
            tokens = tokens[1:]
    return items, tokens[1:]


def second_opinion(data: bytes) -> Any:
    return read_diagnostic(cbor_diag.cbor2diag(data, pretty=False))


ELEMENTS = {64: "B", 79: "q", 84: "e", 85: "f"}
DTYPES = {64: np.uint8, 79: np.int64, 84: np.float32, 85: np.float32}


def packed_elements(entry: Any) -> tuple[list[int], list[float]]:
    """The same of an entry with ``bits``, digit by digit."""
    tag, ((samples, size), (inner, data)) = entry["data"]
    assert (tag, inner, len(data)) == (40, 64, samples * size)
    bits, low, high = entry["bits"], np.float32(entry["low"]), np.float32(entry["high"])
    count = math.prod(entry["shape"])
    assert size == math.ceil(count * bits / 8)
    numbers = []
    for start in range(0, len(data), size):
        digits = "".join(f"{byte:08b}" for byte in data[start : start + size])
        codes = [int(digits[at : at + bits], 2) for at in range(0, count * bits, bits)]
        assert "1" not in digits[count * bits :]
        numbers += [float(low + np.float32(code) * (high - low) / np.float32(2**bits - 1)) for code in codes]
    return [samples, *entry["shape"]], numbers


def elements(value: Any, scale: float | None = None) -> tuple[list[int], list[float]]:
    """Dimensions and elements of a typed array, by struct alone."""
    tag, (dimensions, (inner, data)) = value
    assert tag == 40
    code = ELEMENTS[inner]
    numbers = struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data)
    return dimensions, [number if scale is None else number * scale for number in numbers]


# ------------------------------------------------------------ the frozen messages


def decode(*frames: bytes) -> Message:
    assembler = Assembler()
    (message,) = [done for data in frames if (done := assembler.add(decode_frame(data))) is not None]
    return message


@pytest.mark.parametrize("name", FRAMES)
def test_a_second_implementation_reads_the_same(name: str) -> None:
    frame = second_opinion(FRAMES[name])
    ours = decode_frame(FRAMES[name])
    assert frame == {
        **{"v": 1, "kind": ours.kind, "run": ours.run, "session": ours.session, "step": ours.step},
        **{"chunk": [ours.index, ours.count], "size": ours.size, "crc": ours.crc, "body": ours.body},
    }
    assert zlib.crc32(frame["body"]) == frame["crc"]
    body = second_opinion(frame["body"])
    assert body.keys() == {"id", "fields", "tensors"}
    message = decode(FRAMES[name])
    assert body["id"] == [message.kind, message.run, message.session, message.step]
    assert body["fields"] == message.fields
    assert body["tensors"].keys() == message.tensors.keys()
    for tensor, entry in body["tensors"].items():
        array = message.tensors[tensor]
        if "bits" in entry:
            assert entry.keys() == {"data", "bits", "shape", "low", "high"} and array.dtype == np.float32
            assert (list(array.shape), array.reshape(-1).tolist()) == packed_elements(entry)
            continue
        assert entry.keys() == ({"data", "scale"} if entry["data"][1][1][0] == 84 else {"data"})
        dimensions, numbers = elements(entry["data"], entry.get("scale"))
        assert list(array.shape) == dimensions
        assert array.dtype == DTYPES[entry["data"][1][1][0]]
        assert array.reshape(-1).tolist() == numbers


def test_a_second_implementation_reads_packed_tensors() -> None:
    ours = unpack_tensors(GOLDEN["tensors"])
    theirs = second_opinion(GOLDEN["tensors"])
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert (list(array.shape), array.reshape(-1).tolist()) == elements(theirs[name])


def test_the_frozen_messages_cover_all_there_is() -> None:
    messages = [decode(data) for data in FRAMES.values()]
    for kind, rules in KINDS.items():
        present = [message for message in messages if message.kind == kind]
        for name in {**rules.required, **rules.optional} if kind != "state" else {"speaks", "round", "evaluation"}:
            assert any(name in message.fields for message in present), (kind, name)
        for pattern, rule in rules.tensors.items():
            assert any(name.startswith(pattern.rstrip("*")) for message in present for name in message.tensors)
            if not rule.least:
                assert any(not message.tensors for message in present), kind


def written_by_hand(body: str, frame: str) -> bytes:
    encoded = cbor_diag.diag2cbor(body)
    text = frame.replace("CRC", str(zlib.crc32(encoded))).replace("SIZE", str(len(encoded)))
    return bytes(cbor_diag.diag2cbor(text.replace("BODY", f"h'{encoded.hex()}'")))


TRAIN = """{
    "tensors": {"labels": {"data": 40_1([[2_2], 79(h'0100000000000000 0300000000000000')])},
                "activations": {"data": 40([[2, 1], 84(h'003c 00c0')]), "scale": 0.5_3}},
    "fields": {"a field of tomorrow": {"x": [null, true, -1.5_3]}, "front": 12_3},
    "id": ["train", "r", "s", 5_1]
}"""
HEADER = """{"session": "s", "chunk": [0, 1], "v": 1_0, "kind": "train", "run": "r", "step": 5, "crc": CRC_2,
    "size": SIZE, "body": BODY}"""


def test_a_frame_written_by_hand_in_another_order_and_other_widths_is_read() -> None:
    message = decode(written_by_hand(TRAIN, HEADER))
    assert (message.kind, message.run, message.session, message.step) == ("train", "r", "s", 5)
    assert message.fields == {"front": 12, "a field of tomorrow": {"x": [None, True, -1.5]}}
    assert np.array_equal(message.tensors["activations"], np.array([[0.5], [-1.0]], np.float32))
    assert np.array_equal(message.tensors["labels"], [1, 3])


@pytest.mark.parametrize(
    ("body", "frame", "reason"),
    [
        (("84(h'003c 00c0')", "85(h'0000803f 0000803f')"), ("", ""), "schema"),
        (("84(h'003c 00c0')", "84(h'007c 00c0')"), ("", ""), "nonfinite"),
        ((', "scale": 0.5_3', ""), ("", ""), "schema"),
        (("0.5_3", "1"), ("", ""), "schema"),
        (("[2_2]", "[2, 1]"), ("", ""), "shape"),
        (("[2, 1]", "[3, 1]"), ("", ""), "shape"),
        (("79(h", "71(h"), ("", ""), "tag"),
        (("-1.5_3", "2(h'01')"), ("", ""), "tag"),
        (("-1.5_3", "Infinity"), ("", ""), "nonfinite"),
        (("-1.5_3", "undefined"), ("", ""), "cbor"),
        (("-1.5_3", "h'00'"), ("", ""), "schema"),
        (('"a field of tomorrow"', "1"), ("", ""), "cbor"),
        (('"front": 12_3', '"front": 12.0'), ("", ""), "schema"),
        (("5_1", "6"), ("", ""), "header"),
        (("null, true", "_ null, true"), ("", ""), "cbor"),
        (("", ""), ('"v": 1_0', '"v": 2'), "version"),
        (("", ""), ('"kind": "train"', '"kind": "teleport"'), "kind"),
        (("", ""), ("CRC_2", "1"), "crc"),
        (("", ""), ("SIZE", "SIZE, 'x': 1"), "cbor"),
        (("", ""), ("SIZE", 'SIZE, "x": 1'), "schema"),
        (("", ""), ("SIZE", 'SIZE, "size": 1'), "cbor"),
        (("", ""), ("[0, 1]", "[0, 2]"), "schema"),
        (("", ""), ('"step": 5', '"step": -1'), "schema"),
        (("", ""), ('"run": "r"', '"run": "\\u00e9"'), "schema"),
    ],
)
def test_what_the_document_forbids_is_refused(body: tuple[str, str], frame: tuple[str, str], reason: str) -> None:
    assert body[0] in TRAIN
    assert frame[0] in HEADER
    data = written_by_hand(TRAIN.replace(*body), HEADER.replace(*frame))
    with pytest.raises(WireError) as caught:
        decode(data)
    assert caught.value.reason == reason


def test_a_frame_of_version_2_is_recognised_as_the_document_says() -> None:
    others = ", ".join(f'"k{number}": {number}' for number in range(120))
    data = bytes(cbor_diag.diag2cbor(f'{{"v": 2, "kind": "train", "session": "s", "step": 7, {others}, "t": 99([1])}}'))
    assert foreign_version(data) == ForeignFrame(2, "train", "s", 7)
    assert rule(62).count("256 items") == 1
    first_items = ", ".join(f'"k{number}": {number}' for number in range(124))  # 248 items before the four names
    late = f'{{{first_items}, "v": 2, "kind": "train", "session": "s", "step": 7}}'
    assert foreign_version(bytes(cbor_diag.diag2cbor(late))) == ForeignFrame(2, "train", "s", 7)
    later = late.replace('"v"', '"x": 1, "v"')
    assert foreign_version(bytes(cbor_diag.diag2cbor(later))) == ForeignFrame(2, "train", None, None)


# ------------------------------------------------------------ the document


BLOCKS = re.findall(r"^```(cbor-diag|hex) golden=(\S+)\.cbor\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """The text under a heading, to the next of the same or a higher level."""
    match = re.search(rf"^(#+) {re.escape(title)}$", DOCUMENT, re.MULTILINE)
    assert match, title
    rest = DOCUMENT[match.end() :]
    level = len(match[1])
    return re.split(rf"^#{{1,{level}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """Cells of the tables in a text, without heads."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    heads = {index - 1 for index, line in enumerate(cells) if set("".join(line)) == {"-"}}
    return [line for index, line in enumerate(cells) if index not in heads and index - 1 not in heads]


def named(cell: str) -> str:
    match = re.fullmatch(r"`([^`]+)`", cell)
    assert match, cell
    return match[1]


def rule(number: int) -> str:
    found = re.findall(rf"^- \*\*R{number}\*\* (.*?)(?=^- \*\*R|^$)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, number
    return " ".join(str(found[0]).split())


@pytest.mark.parametrize(("notation", "name", "text"), BLOCKS, ids=[f"{name}-{kind}" for kind, name, _ in BLOCKS])
def test_blocks_are_the_frozen_messages(notation: str, name: str, text: str) -> None:
    if notation == "hex":
        data = bytes.fromhex(re.sub(r"#.*", "", text))
    else:
        data = bytes(cbor_diag.diag2cbor(text))
    assert data == GOLDEN[name]


def test_every_kind_is_shown() -> None:
    shown = {decode(GOLDEN[name]).kind for _, name, _ in BLOCKS}
    assert shown == set(KINDS)
    assert {notation for notation, _, _ in BLOCKS} == {"hex", "cbor-diag"}


TYPES = {int: "uint", float: "float", str: "text", bool: "bool", list: "array", dict: "map"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_and_tensor_is_documented_as_it_is_checked(kind: str) -> None:
    rules = KINDS[kind]
    expected = {
        **{name: [TYPES[value], "yes"] for name, value in rules.required.items()},
        **{name: [TYPES[value], "no"] for name, value in rules.optional.items()},
    }
    for name, tensor in rules.tensors.items():
        low, high = tensor.ndim
        batched = ", batched" if tensor.batched else ""
        many = {0: "any number", 1: "one or more"}[tensor.least] if name.endswith("*") else "yes"
        dimensions = f"{low} to {high} dimensions" if low < high else f"{low} dimension{'s' * (low > 1)}"
        expected[name] = [f"{tensor.dtype}, {dimensions}{batched}", many]
    table = rows(section(f"{kind} ({rules.direction})"))
    assert {named(name): cells for name, *cells, _ in table} == expected
    assert all(meaning for *_, meaning in table)


def test_topics_and_their_kinds() -> None:
    table = re.findall(r"^(psgl/v1/\S+)\s+(\w+) -> \w+\s+(.*)$", section("Topics"), re.MULTILINE)
    spelled = [topic.replace("<fleet>", "f").replace("<device>", "d") for topic, _, _ in table]
    assert spelled == [
        topics.up_state("f", "d"),
        topics.up_step("f", "d"),
        topics.down_step("f", "d"),
        topics.down_model("f"),
    ]
    said = {kind: sender for _, sender, kinds in table for kind in re.findall(r"\w+", kinds) if kind in KINDS}
    assert said == {kind: {"up": "device", "down": "server"}[rules.direction] for kind, rules in KINDS.items()}


def test_limits() -> None:
    table = {named(name): int(value) for name, value, _ in rows(section("7 Limits"))}
    assert table == {each.name: getattr(DEFAULT_LIMITS, each.name) for each in fields(Limits)}
    assert "at most 1024 bytes longer" in section("7 Limits")
    for size, text in ((1024, "not valid CBOR"), (1025, "above max_chunk_bytes")):
        with pytest.raises(WireError, match=text):
            decode_frame(b"\xff" * (DEFAULT_LIMITS.max_chunk_bytes + size))


def test_numbers_in_the_text() -> None:
    chunk = inspect.signature(encode).parameters["chunk_bytes"].default
    assert f"{chunk} bytes" in rule(34)
    longest = max(len(build("f" * 64, "d" * 64)) for build in (topics.up_state, topics.up_step, topics.down_step))
    text = " ".join(section("Broker").split())
    assert f"at most {chunk + 1024 + longest + 64} bytes: {chunk} of body, 1024 of frame, {longest} of topic" in text
    assert f"keeps {inspect.signature(Assembler).parameters['max_partial'].default} for each device" in rule(38)
    client = inspect.signature(EdgeClient).parameters
    assert f"after {client['resend_s'].default:g} s" in rule(48)
    assert f"up to {8 * client['resend_s'].default:g} s" in rule(48)
    assert f"({client['give_up_s'].default:g} s in this SDK)" in rule(52)
    assert f"1 to {DEFAULT_LIMITS.max_chunks} chunk numbers" in section("missing (down)")


def test_the_checksum_of_the_document() -> None:
    assert "`123456789` give `0xCBF43926`" in rule(20)
    assert zlib.crc32(b"123456789") == 0xCBF43926
    register = 0xFFFFFFFF  # bit by bit, as the rule describes it
    for byte in decode_frame(GOLDEN["missing"]).body:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0xEDB88320 if register & 1 else 0)
    assert register ^ 0xFFFFFFFF == decode_frame(GOLDEN["missing"]).crc


def test_frame_and_body_keys() -> None:
    frame = second_opinion(GOLDEN["missing"])
    assert {named(name) for name, *_ in rows(section("4 Frame"))} == frame.keys()
    assert {named(name) for name, *_ in rows(section("5 Body"))} == second_opinion(frame["body"]).keys()


def test_element_tags() -> None:
    table = {int(tag): (dtype, int(size)) for tag, dtype, size, _ in rows(section("6 Tensors").split("### ")[0])}
    sizes = {79: ("int64", 8), 85: ("float32", 4), 84: ("float16", 2), 78: ("int32", 4), 64: ("uint8", 1)}
    assert table == sizes
    half = """84(h'003c 00c0')]), "scale": 0.5_3"""
    assert half in TRAIN
    for tag, (_, size) in table.items():
        typed = f"{tag}(h'{'00' * 2 * size}')])" + (', "scale": 1.0' if tag == 84 else "")
        frame = written_by_hand(TRAIN.replace(half, typed), HEADER)
        if tag in (84, 85):
            assert decode(frame).tensors["activations"].dtype == np.float32
            continue
        with pytest.raises(WireError) as caught:
            decode(frame)
        assert caught.value.reason == "dtype"


def test_the_keys_of_a_packed_tensor_and_who_may_be_packed() -> None:
    assert {named(name) for name, *_ in rows(section("Few bits"))} == PACKED_KEYS
    packable = {(kind, name) for kind, rules in KINDS.items() for name, each in rules.tensors.items() if each.packable}
    said = re.findall(r"`(\w+)`", rule(30))
    assert {("train", "activations"), ("store", "activations"), ("infer", "activations")} == packable
    assert said[:4] == ["activations", "train", "store", "infer"]
    for bits in BITS:
        assert str(bits) in next(meaning for name, _, meaning in rows(section("Few bits")) if named(name) == "bits")


STATEMENTS = {
    41: "answered by exactly one",
    55: "gets none",
    62: "in every version",
}  # facts, which bind without a verb of RFC 2119


def test_rules_are_numbered_without_gaps_and_each_binds() -> None:
    numbers = [int(number) for number in re.findall(r"^- \*\*R(\d+)\*\*", DOCUMENT, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert f"numbered R1 to R{len(numbers)}" in " ".join(DOCUMENT.split())
    binding = re.compile(r"\b(MUST|SHOULD|MAY)\b")
    for number in numbers:
        assert binding.search(rule(number)) or STATEMENTS[number] in rule(number), number
    for number in map(int, re.findall(r"\bR(\d+)\b", DOCUMENT)):
        assert number in numbers


def test_the_state_diagram_and_the_table_agree() -> None:
    text = section("11 The device's states")
    arrows = set(re.findall(r"^    (\w+) --> (\w+)", text, re.MULTILINE))
    table = set()
    for states, _, _, after in rows(text):
        for state in states.split(", "):
            if state != "any":
                table.add((state, after))
    loops = {(state, after) for state, after in table if state == after}
    assert table - loops == arrows - {("waiting", "waiting")}
    assert ("waiting", "waiting") in loops


def test_reasons() -> None:
    table = {named(reason): then for reason, _, then in rows(section("13 Refusals"))}
    assert set(table) == {
        *("run", "shape", "range", "labels", "bundle", "version", "kind"),
        *("nonfinite", "schema", "dtype", "limit", "cbor", "tag", "trailing"),
        *("training", "decision", "finished", "rate", "fronts", "turn"),
    }
    assert set(table.values()) == {"ready", "halted", "done"}
    for path in (TESTS.parent / "server_sdk").glob("*.py"):
        assert set(re.findall(r'"reason": "(\w+)"', path.read_text())) <= set(table), path
    counted = section("13 Refusals").split("counted under one of these reasons:")[1].split(".")[0]
    described = re.search(r"of ``([^`]+)``", wire.__doc__ or "")
    assert described
    assert set(re.findall(r"`(\w+)`", counted)) == {*described[1].split(), "topic"}


def test_versions() -> None:
    assert VERSION == 1
    assert DOCUMENT.startswith(f"# The wire protocol, version {VERSION}\n")
    assert version_conflict([2], here="device", there="server") in rule(65).replace("`", "")


def test_links_lead_to_headings() -> None:
    headings = re.findall(r"^#+ (.*)$", DOCUMENT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for link in re.findall(r"\]\(#([^)]+)\)", DOCUMENT):
        assert link in anchors, link
