"""Records as bytes, the segment files that hold them, and reading them back without trusting a byte.

A log is a folder of segments ``<position of the first record, 12 digits>.log``. A segment is a CBOR sequence (RFC
8742) of records, so any CBOR tool reads it. A record is the array [position, crc, payload] under a head of fixed size:
position counts from 1 through all segments without a gap, payload is the bytes of the map {"kind": text, "fields":
plain data, "body": bytes}, and crc is the CRC-32 (zlib, ITU-T V.42) of the position's 8 bytes, big-endian, and of the
payload behind them: the head of one record before the payload of another is no record.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from edge_sdk import cbor
from edge_sdk.errors import WireError
from edge_sdk.limits import Limits
from server_sdk.errors import LogError

__all__ = [
    "MAX_RECORD_BYTES",
    "Damage",
    "Items",
    "Place",
    "Record",
    "Segment",
    "disk_errors",
    "encode",
    "read_segment",
    "read_segments",
    "scan",
    "segments_of",
]

MAX_RECORD_BYTES = 65 << 20

_MAX_FIELDS_BYTES = 1 << 20
_LIMITS = Limits(max_items=1 << 18, max_text_bytes=_MAX_FIELDS_BYTES)
# 83: array of 3; 1b: 8-byte number; 1a: 4-byte number; 5a: byte string with a 4-byte length
_HEAD = struct.Struct(">BBQBIBI")
_HEAD_PATTERN = re.compile(rb"\x83\x1b(.{8})\x1a(.{4})\x5a(.{4})\xa3\x64kind", re.DOTALL)
_PATTERN_BYTES = _HEAD.size + 6
_BODY_PATTERN = re.compile(rb"(?=\x64body\x5a(.{4}))", re.DOTALL)
_BODY_HEAD_BYTES = 10
_NAME = re.compile(r"\d{12}\.log")
_WINDOW_BYTES = 1 << 20


@dataclass(frozen=True)
class Record:
    """One entry of the log.

    Attributes:
        position: number of the record, from 1.
        kind: what it says (``step``, ``round``, ...).
        fields: plain data: text, numbers, booleans, None, bytes, and lists and maps of these.
        body: what a device sent, as it came.
    """

    position: int
    kind: str
    fields: Mapping[str, Any]
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Place:
    """Where a record's body lies: ``length`` bytes of ``path`` from ``offset`` on. The body ends its record."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Damage:
    """Where a log cannot be read on.

    Attributes:
        path: the segment.
        offset: byte of it where the unreadable record begins.
        why: what is wrong there.
        torn: no readable record follows it and its segment is the last: a write that did not end.
    """

    path: Path
    offset: int
    why: str
    torn: bool

    def __str__(self) -> str:
        """One line."""
        return f"{self.path} cannot be read at byte {self.offset}: {self.why}"


@dataclass(frozen=True)
class Segment:
    """One file of a log.

    Attributes:
        path: of the file.
        first: position of its first record, also while it has none.
        size: bytes of it that count.
    """

    path: Path
    first: int
    size: int


Items = Generator[tuple[Record, Place] | Damage, None, int | None]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn every OSError into the log's own.

    Raises:
        LogError: the disk is full, read-only or failing.
    """
    try:
        yield
    except OSError as exc:
        raise LogError(
            f"the log {path} cannot be used: {exc.strerror or exc}: free space on its disk or make it writable"
        ) from exc


def segments_of(folder: Path) -> list[Segment]:
    """The segments of a log as they are on the disk, oldest first.

    Raises:
        OSError: the folder cannot be read.
    """
    segments = []
    for path in sorted(folder.iterdir()):
        if _NAME.fullmatch(path.name) and int(path.stem) > 0:
            with suppress(FileNotFoundError):  # dropped by the server meanwhile
                segments.append(Segment(path, int(path.stem), path.stat().st_size))
    return segments


def encode(position: int, kind: str, fields: Mapping[str, Any], body: bytes, max_record_bytes: int) -> bytes:
    """A record up to its body, which follows as it is.

    Args:
        position: from 1.
        kind: what it says.
        fields: see ``Record``; encoded at most 1 MiB.
        body: taken into lengths and checksum.
        max_record_bytes: largest payload.

    Raises:
        LogError: a record that could not be read again.
    """
    try:
        encoded = cbor.dumps(dict(fields))
        cbor.check(encoded, _LIMITS)
        inner = b"\xa3\x64kind" + cbor.dumps(kind) + b"\x66fields" + encoded + b"\x64body\x5a"
    except WireError as exc:
        raise LogError(f"record {position} ({kind}) cannot be kept: {exc}") from exc
    if len(encoded) > _MAX_FIELDS_BYTES:
        raise LogError(f"record {position} ({kind}) has {len(encoded)} bytes of fields: put data into its body")
    size = len(inner) + 4 + len(body)
    if size > max_record_bytes:
        raise LogError(
            f"record {position} ({kind}) of {size} bytes is above max_record_bytes={max_record_bytes}: raise the limit"
        )
    inner += len(body).to_bytes(4, "big")
    crc = zlib.crc32(body, zlib.crc32(inner, _crc_of(position)))
    return _HEAD.pack(0x83, 0x1B, position, 0x1A, crc, 0x5A, size) + inner


def scan(
    folder: Path, start: int = 1, *, max_record_bytes: int = MAX_RECORD_BYTES
) -> Iterator[tuple[Record, Place] | Damage]:
    """Read a log without its lock and without repair, also while a server writes it.

    Args:
        folder: of the log.
        start: position of the first record to read; where earlier segments were dropped, the oldest record kept.
        max_record_bytes: largest payload that is read.

    Returns:
        The records and, where the log cannot be read on, a ``Damage`` as the last item. One that is ``torn`` may
        be a write that goes on.

    Raises:
        LogError: the folder or a file in it cannot be read.
    """
    with disk_errors(folder):
        yield from read_segments(segments_of(folder), start, max_record_bytes, live=True)


def read_segments(segments: Sequence[Segment], start: int, max_record_bytes: int, *, live: bool) -> Items:
    """Read records from ``start`` on; a ``Damage`` ends it.

    Args:
        segments: oldest first.
        start: position of the first record to read.
        max_record_bytes: largest payload that is read.
        live: a writer may drop the oldest segments meanwhile, which is then no error.

    Raises:
        OSError: a file cannot be read.
    """
    begin = max((index for index, segment in enumerate(segments) if segment.first <= start), default=0)
    expected: int | None = None
    for index, segment in enumerate(segments[begin:], begin):
        if expected not in (None, segment.first):
            yield Damage(segment.path, 0, f"it begins with record {segment.first}, not {expected}", False)
            return None
        try:
            last = index == len(segments) - 1
            expected = yield from read_segment(segment, start, max_record_bytes, last=last)
        except FileNotFoundError:
            if not live:
                raise
            expected = None
            continue
        if expected is None:
            return None
    return expected


def read_segment(segment: Segment, start: int, max_record_bytes: int, *, last: bool) -> Items:
    """Read one segment's records from ``start`` on; a ``Damage`` ends it.

    Args:
        segment: the file.
        start: position of the first record to read; the payloads before it are not looked at.
        max_record_bytes: largest payload that is read.
        last: whether it is the last of its log, whose end may be torn.

    Returns:
        Position behind the last record, None after a damage.

    Raises:
        OSError: the file cannot be read.
    """
    offset, expected = 0, segment.first
    with segment.path.open("rb") as file:
        while offset < segment.size:
            crc, length = _parse_head(file.read(_HEAD.size), expected) or (0, -1)
            end = offset + _HEAD.size + length
            whole = length >= 0 and end <= segment.size and length <= max_record_bytes
            if whole and expected < start:
                file.seek(end)
                offset, expected = end, expected + 1
                continue
            payload = file.read(length) if whole else b""
            if not whole or len(payload) != length or zlib.crc32(payload, _crc_of(expected)) != crc:
                yield _diagnose(file, segment, offset, expected, max_record_bytes, last=last)
                return None
            record = _decode(expected, payload)
            if record is None:
                yield Damage(segment.path, offset, "its checksum is right, but it is no record of this log", False)
                return None
            yield record, Place(segment.path, end - len(record.body), len(record.body))
            offset, expected = end, expected + 1
    return expected


def _parse_head(head: bytes, expected: int) -> tuple[int, int] | None:
    """CRC and length of the payload, None if this is not the head of that record."""
    if len(head) < _HEAD.size:
        return None
    array, wide, position, narrow, crc, text, length = _HEAD.unpack(head)
    fits = (array, wide, narrow, text) == (0x83, 0x1B, 0x1A, 0x5A) and position == expected
    return (crc, length) if fits else None


def _decode(position: int, payload: bytes) -> Record | None:
    try:
        content = cbor.loads(payload, _LIMITS)
    except WireError:
        return None
    if not isinstance(content, dict) or tuple(content) != ("kind", "fields", "body"):
        return None
    kind, fields, body = content.values()
    if not isinstance(kind, str) or not isinstance(fields, dict) or not isinstance(body, bytes):
        return None
    return Record(position, kind, fields, body)


def _diagnose(
    file: BinaryIO, segment: Segment, offset: int, expected: int, max_record_bytes: int, *, last: bool
) -> Damage:
    """Tell the torn end of a log from damage before its end.

    Bodies come from devices and may imitate records: where a record's head and the lengths inside its payload agree,
    nothing within it is taken for a record.
    """
    file.seek(offset)
    head = _parse_head(file.read(_HEAD.size), expected)
    search, why = offset, f"no head of record {expected}"
    if head:
        length = head[1]
        end = offset + _HEAD.size + length
        inner = file.read(min(length, _MAX_FIELDS_BYTES + _WINDOW_BYTES))
        bodies = ((each.start(), int.from_bytes(each[1], "big")) for each in _BODY_PATTERN.finditer(inner))
        agrees = any(at + _BODY_HEAD_BYTES + size == length for at, size in bodies)
        search = end if agrees else offset + 1
        if end > segment.size:
            why = f"record {expected} has {segment.size - offset} bytes of {_HEAD.size + length}"
        elif length > max_record_bytes and agrees:
            why = f"record {expected} of {length} bytes is above max_record_bytes={max_record_bytes}: raise the limit"
            return Damage(segment.path, offset, why, False)
        else:
            why = f"record {expected} does not match its checksum"
    good = _good_record(file, search, segment.size, expected, max_record_bytes)
    if good is not None:
        why += f", and there are records from byte {good} on"
    return Damage(segment.path, offset, why, torn=last and good is None)


def _good_record(file: BinaryIO, offset: int, size: int, expected: int, max_record_bytes: int) -> int | None:
    """Offset of the first whole record at or behind ``offset`` that is not older than ``expected``."""
    budget = 4 * max_record_bytes  # imitations cost time: this many bytes are checked, then one is believed
    while size - offset >= _PATTERN_BYTES:
        file.seek(offset)
        window = file.read(min(_WINDOW_BYTES, size - offset))
        at = -1
        while (at := window.find(b"\x83\x1b", at + 1)) >= 0:
            match = _HEAD_PATTERN.match(window, at)
            if match is None:
                continue
            position, crc, length = (int.from_bytes(part, "big") for part in match.groups())
            begin = offset + at + _HEAD.size
            if not expected <= position <= expected + size or length > min(size - begin, max_record_bytes):
                continue
            budget -= length
            if budget < 0 or _crc_in(file, begin, length, position) == crc:
                return offset + at
        if len(window) < _PATTERN_BYTES:
            return None  # the file is shorter than it was
        offset += len(window) - _PATTERN_BYTES + 1
    return None


def _crc_of(position: int) -> int:
    return zlib.crc32(position.to_bytes(8, "big"))


def _crc_in(file: BinaryIO, offset: int, length: int, position: int) -> int:
    file.seek(offset)
    crc = _crc_of(position)
    while length and (part := file.read(min(length, _WINDOW_BYTES))):
        crc = zlib.crc32(part, crc)
        length -= len(part)
    return crc
