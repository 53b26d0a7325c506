"""Frames: a body cut into chunks that fit a broker's packets, and put together again.

A frame is the CBOR map {"v": 1, "kind", "run", "session", "step", "chunk": [i, n], "size", "crc", "body"}:
chunk i of n (from 0) of a body of ``size`` bytes with the CRC-32 (zlib, ITU-T V.42) ``crc``.

Frames of every version are a map of definite length whose "v", "kind", "session" and "step" mean the same, so that
both sides can say why they do not understand each other (docs/wire.md, "Versions").
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from edge_sdk import cbor
from edge_sdk.body import from_body
from edge_sdk.errors import ConfigError, WireError
from edge_sdk.limits import DEFAULT_LIMITS, Limits
from edge_sdk.messages import KINDS, Message, check_identity

__all__ = [
    "VERSION",
    "Assembler",
    "ForeignFrame",
    "Frame",
    "Key",
    "cut",
    "decode_body",
    "decode_frame",
    "foreign_version",
    "unknown_kind",
    "version_conflict",
]

VERSION = 1
_HEADER_BYTES = 1024  # more than any frame without its body
_KEYS = frozenset({"v", "kind", "run", "session", "step", "chunk", "size", "crc", "body"})
# The map, nine keys, nine values and the two numbers of "chunk" are 21 items.
_FRAME_SHAPE = Limits(max_items=24, max_depth=2, max_text_bytes=512)
_NEWER_SHAPE = ("limit", "tag", "cbor")  # why a frame of a later version may be unreadable here
_HEADING = frozenset({"v", "kind", "session", "step"})
_FOREIGN_SHAPE = Limits(max_items=256, max_text_bytes=128)

Key = tuple[str, str, int, str]


@dataclass(frozen=True)
class Frame:
    """One chunk and the header that says where it belongs.

    Attributes:
        kind, run, session, step: as in ``Message``.
        index: number of this chunk, 0 to count - 1.
        count: chunks of the message.
        size: bytes of the whole body.
        crc: CRC-32 of the whole body.
        body: this chunk's bytes.
    """

    kind: str
    run: str
    session: str
    step: int
    index: int
    count: int
    size: int
    crc: int
    body: bytes = field(repr=False)

    @property
    def key(self) -> Key:
        """(run, session, step, kind): what the chunks of one message share."""
        return self.run, self.session, self.step, self.kind


@dataclass(frozen=True)
class ForeignFrame:
    """What can be read of a frame that this side cannot decode.

    Attributes:
        version: of the protocol, 0 or more.
        kind: printable ASCII, at most 128 characters; empty if there is none such.
        session, step: what an answer to it is about, as in ``Message``; both None unless both are well-formed.
    """

    version: int
    kind: str
    session: str | None
    step: int | None


def foreign_version(data: bytes) -> ForeignFrame | None:
    """Read the heading of a frame of another protocol version, whatever else it holds.

    Call it where ``decode_frame`` raised reason ``version``: it always returns a frame then. The walk is bounded (256
    items) and builds nothing but the heading.

    Returns:
        The heading, or None if this is no frame or one of this version.
    """
    frame = _heading(data)
    return None if frame is None or frame.version == VERSION else frame


def unknown_kind(data: bytes) -> ForeignFrame | None:
    """Read the heading of a frame of this version whose kind is not known here.

    Call it where ``decode_frame`` raised reason ``kind``.

    Returns:
        The heading, or None if this is no frame, one of another version or of a known kind.
    """
    frame = _heading(data)
    return None if frame is None or frame.version != VERSION or frame.kind in KINDS else frame


def version_conflict(theirs: Iterable[object], *, here: str, there: str) -> str | None:
    """Say which side is too old to talk to the other.

    Args:
        theirs: the version of a foreign frame, or the field ``speaks`` of a message; what is no version is ignored.
        here, there: what this side and the other are: ``device`` or ``server``.

    Returns:
        One line, or None if the other side speaks this version too (or named none).
    """
    versions = [version for version in theirs if type(version) is int and version >= 0]
    if not versions or VERSION in versions:
        return None
    newest = max(versions)
    older = here if newest > VERSION else there
    return f"the {there} speaks protocol version {newest}, this {here} {VERSION}: upgrade psgl on the {older}"


def cut(message: Message, body: bytes, chunk_bytes: int, limits: Limits = DEFAULT_LIMITS) -> list[bytes]:
    """Cut a body into encoded frames.

    Args:
        message: gives the header.
        body: what ``body.to_body`` returned.
        chunk_bytes: bytes of the body per frame; a frame is at most 1 KiB longer.

    Raises:
        ConfigError: ``chunk_bytes`` outside 1 to ``max_chunk_bytes``, or so small that a message would take
            more than ``max_chunks`` frames.
    """
    if type(chunk_bytes) is not int or not 1 <= chunk_bytes <= limits.max_chunk_bytes:
        raise ConfigError(f"chunk_bytes={chunk_bytes!r} must be from 1 to max_chunk_bytes={limits.max_chunk_bytes}")
    count = -(-len(body) // chunk_bytes)
    if count > limits.max_chunks:
        raise ConfigError(f"{count} chunks are above max_chunks={limits.max_chunks}: raise chunk_bytes={chunk_bytes}")
    header = {
        "v": VERSION,
        "kind": message.kind,
        "run": message.run,
        "session": message.session,
        "step": message.step,
        "size": len(body),
        "crc": zlib.crc32(body),
    }
    return [
        cbor.dumps({**header, "chunk": [i, count], "body": body[i * chunk_bytes : (i + 1) * chunk_bytes]})
        for i in range(count)
    ]


def decode_frame(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Frame:
    """Read one frame; its body is neither complete nor checked yet.

    Args:
        data: the packet's payload.
        limits: ``max_chunk_bytes``, ``max_chunks`` and ``max_message_bytes`` are applied.

    Raises:
        WireError: reasons ``truncated``, ``trailing``, ``tag``, ``cbor``, ``version``, ``kind``, ``schema``,
            ``limit``.
    """
    try:
        if len(data) > limits.max_chunk_bytes + _HEADER_BYTES:
            raise WireError("limit", f"a frame of {len(data)} bytes is above max_chunk_bytes={limits.max_chunk_bytes}")
        content = cbor.loads(bytes(data), _FRAME_SHAPE)
    except WireError as exc:
        foreign = foreign_version(data) if exc.reason in _NEWER_SHAPE else None
        if foreign is not None:
            raise _other_version(foreign.version) from exc
        raise
    if not isinstance(content, dict) or type(content.get("v")) is not int or content["v"] < 0:
        raise WireError("schema", "a frame must be a map with its version in 'v'")
    if content["v"] != VERSION:
        raise _other_version(content["v"])
    if content.keys() != _KEYS:
        raise WireError("schema", f"a frame must have exactly the keys {', '.join(sorted(_KEYS))}")
    kind, run, session, step = check_identity(*(content[name] for name in ("kind", "run", "session", "step")))
    chunk, size, crc, body = (content[name] for name in ("chunk", "size", "crc", "body"))
    if not isinstance(chunk, list) or len(chunk) != 2 or not all(type(number) is int for number in chunk):
        raise WireError("schema", "chunk must be [i, n]")
    if type(size) is not int or type(crc) is not int or not isinstance(body, bytes):
        raise WireError("schema", "size and crc must be integers and body bytes")
    index, count = chunk
    if not 0 <= crc < 2**32 or not 0 <= index < count or not body or size < 1:
        raise WireError("schema", "chunk, size, crc or body of a frame is out of range")
    if size > limits.max_message_bytes or count > limits.max_chunks or len(body) > limits.max_chunk_bytes:
        raise WireError("limit", f"a message of {size} bytes in {count} chunks is above the limits")
    if len(body) + count - 1 > size or (count == 1 and len(body) != size):
        raise WireError("schema", f"{count} chunks cannot make {size} bytes when one has {len(body)}")
    return Frame(kind, run, session, step, index, count, size, crc, body)


def _heading(data: bytes) -> ForeignFrame | None:
    values = cbor.peek(data, _HEADING, _FOREIGN_SHAPE)
    version, kind = values.get("v"), values.get("kind")
    if not isinstance(version, int):
        return None
    shown = kind if isinstance(kind, str) and kind.isascii() and kind.isprintable() else ""
    try:
        _, _, session, step = check_identity("refused", "", values.get("session"), values.get("step"))
    except WireError:
        return ForeignFrame(version, shown, None, None)
    return ForeignFrame(version, shown, session, step)


def _other_version(version: int) -> WireError:
    return WireError("version", f"protocol version {version}, this side speaks {VERSION}: upgrade the older side")


def decode_body(frame: Frame, body: bytes, limits: Limits = DEFAULT_LIMITS) -> Message:
    """Decode a whole body under the header of its frames.

    Raises:
        WireError: reasons ``truncated``, ``crc``, ``header`` (not the header that was sent), and those of
            ``body.from_body``.
    """
    if len(body) != frame.size:
        raise WireError("truncated", f"{len(body)} bytes of a body of {frame.size}")
    if zlib.crc32(body) != frame.crc:
        raise WireError("crc", f"checksum of step {frame.step} ({frame.kind}) does not match: send it again")
    message = from_body(body, limits)
    if (message.run, message.session, message.step, message.kind) != frame.key:
        raise WireError(
            "header", f"the header of step {frame.step} ({frame.kind}) was changed on the way: send it again"
        )
    return message


class _Partial:
    """The chunks of one message that have arrived."""

    def __init__(self, frame: Frame) -> None:
        self.header = frame.count, frame.size, frame.crc
        self.chunks: dict[int, bytes] = {}
        self.held_bytes = 0


class Assembler:
    """Puts messages together from chunks in any order; one per device and direction, not thread-safe.

    At most ``max_partial`` messages are kept unfinished; the one that was longest without a chunk gives way
    to a new one (its sender repeats what got no reply). Only what has arrived takes memory, at most
    ``max_partial * max_message_bytes``.

    Args:
        limits: applied to whole messages.
        max_partial: unfinished messages to keep.

    Attributes:
        dropped: unfinished messages that gave way.

    Raises:
        ConfigError: ``max_partial`` below 1.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS, max_partial: int = 4) -> None:
        if max_partial < 1:
            raise ConfigError(f"max_partial={max_partial} must be at least 1")
        self._limits = limits
        self._max_partial = max_partial
        self._partials: dict[Key, _Partial] = {}  # the least recently touched first
        self.dropped = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of the chunks that wait for the rest of their message."""
        return sum(partial.held_bytes for partial in self._partials.values())

    def missing(self, key: Key) -> list[int]:
        """Numbers of the chunks that an unfinished message still lacks; empty if none of it is kept."""
        partial = self._partials.get(key)
        return [] if partial is None else [i for i in range(partial.header[0]) if i not in partial.chunks]

    def add(self, frame: Frame) -> Message | None:
        """Take one frame, and return its message if that was the last chunk missing.

        Raises:
            WireError: reasons of ``whole`` and of ``decode_body``.
        """
        body = self.whole(frame)
        return None if body is None else decode_body(frame, body, self._limits)

    def whole(self, frame: Frame) -> bytes | None:
        """Take one frame, and return the body of its message if that was the last chunk missing.

        A chunk that is already there changes nothing. On any error the unfinished message is forgotten, so
        that sending all of it again succeeds. The body is not checked: ``decode_body`` does.

        Raises:
            WireError: reasons ``limit``, ``conflict`` (chunks that contradict each other).
        """
        if frame.size > self._limits.max_message_bytes or frame.count > self._limits.max_chunks:
            raise WireError("limit", f"a message of {frame.size} bytes in {frame.count} chunks is above the limits")
        if frame.count == 1:
            return frame.body
        partial = self._partials.pop(frame.key, None) or _Partial(frame)
        known = partial.chunks.get(frame.index)
        if partial.header != (frame.count, frame.size, frame.crc) or (known is not None and known != frame.body):
            raise WireError(
                "conflict", f"chunks of step {frame.step} ({frame.kind}) differ: send the whole message again"
            )
        if known is None:
            partial.chunks[frame.index] = frame.body
            partial.held_bytes += len(frame.body)
            if partial.held_bytes + frame.count - len(partial.chunks) > frame.size:
                raise WireError("conflict", f"chunks of step {frame.step} ({frame.kind}) are longer than their size")
        if len(partial.chunks) == frame.count:
            return b"".join(partial.chunks[i] for i in range(frame.count))
        while len(self._partials) >= self._max_partial:
            del self._partials[next(iter(self._partials))]
            self.dropped += 1
        self._partials[frame.key] = partial
        return None
