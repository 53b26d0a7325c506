"""The part of CBOR (RFC 8949) that the protocol speaks, read strictly.

Before cbor2 builds a single object, the bytes are walked once: definite lengths that fit the input, text
keys, a bounded number of items, bounded depth and text, the tags of the caller alone, nothing behind the end.
What is left to cbor2 cannot grow: it holds at most one object per counted item.
"""

from __future__ import annotations

import cbor2

from edge_sdk.errors import WireError
from edge_sdk.limits import Limits

__all__ = ["check", "dumps", "loads", "peek"]

_NO_TAGS: frozenset[int] = frozenset()
_UNSIGNED, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _OTHER = 0, 2, 3, 4, 5, 6, 7
_SIMPLE = (20, 21, 22)  # false, true, null
_FLOATS = (25, 26, 27)  # half, single, double


def dumps(value: object) -> bytes:
    """Encode plain data, ``bytes`` and ``cbor2.CBORTag`` canonically: equal values, equal bytes.

    Raises:
        WireError: reason ``cbor``: a value that has no encoding.
    """
    try:
        return cbor2.dumps(value, canonical=True)
    except (cbor2.CBORError, UnicodeError) as exc:
        raise WireError("cbor", f"cannot be encoded: {_line(exc)}") from exc


def loads(data: bytes, limits: Limits, tags: frozenset[int] = _NO_TAGS) -> object:
    """Decode one item that fills ``data`` to its end.

    Args:
        data: the encoded item.
        limits: ``max_items``, ``max_depth`` and ``max_text_bytes`` are applied.
        tags: tag numbers that may occur; they are returned as ``cbor2.CBORTag``.

    Raises:
        WireError: reasons ``truncated``, ``trailing``, ``tag``, ``limit``, ``cbor``.
    """
    check(data, limits, tags)
    try:
        return cbor2.loads(
            data,
            max_depth=limits.max_depth + 1,
            allow_indefinite=False,
            allow_duplicate_keys=False,
        )
    except (cbor2.CBORError, UnicodeError) as exc:
        raise WireError("cbor", f"not valid CBOR: {_line(exc)}") from exc


def check(data: bytes, limits: Limits, tags: frozenset[int] = _NO_TAGS) -> None:
    """Walk ``data`` without building anything; duplicate keys and invalid UTF-8 are left to ``loads``.

    Raises:
        WireError: as ``loads``.
    """
    end = len(data)
    position = 0
    budget = limits.max_items
    remaining, in_map = 1, False  # items that the innermost open container still lacks
    outer: list[tuple[int, bool]] = []
    while True:
        if not remaining:
            if not outer:
                break
            remaining, in_map = outer.pop()
            continue
        is_key = in_map and remaining % 2 == 0
        remaining -= 1
        if budget <= 0:
            raise WireError("limit", f"more than max_items={limits.max_items} CBOR items: raise the limit or send less")
        budget -= 1
        start = position
        major, info, value, position = _head(data, start)
        if is_key and major != _TEXT:
            raise WireError("cbor", f"not valid CBOR here: a map key must be text, at byte {start}")
        if major < _BYTES:
            continue
        if major in (_BYTES, _TEXT):
            if value > end - position:
                raise _truncated(position)
            if major == _TEXT and value > limits.max_text_bytes:
                raise WireError("limit", f"a text of {value} bytes is above max_text_bytes={limits.max_text_bytes}")
            position += value
        elif major == _OTHER:
            if info not in _SIMPLE and info not in _FLOATS:
                raise WireError("cbor", f"not valid CBOR here: simple value {value} at byte {start}")
        else:
            if major == _TAG:
                if value not in tags:
                    raise WireError("tag", f"CBOR tag {value} is not part of this protocol")
                value = 1
            elif major == _MAP:
                value *= 2
            if len(outer) >= limits.max_depth:
                raise WireError("limit", f"nested deeper than max_depth={limits.max_depth}")
            outer.append((remaining, in_map))
            remaining, in_map = value, major == _MAP
    if position != end:
        raise WireError("trailing", f"{end - position} bytes behind the end of the message")


def peek(data: bytes, names: frozenset[str], limits: Limits) -> dict[str, int | str]:
    """Read single values of a map that may hold anything else, building nothing but them.

    This is for messages of other protocol versions: unknown keys, types and tags are stepped over, never decoded.

    Args:
        data: the encoded map, of definite length; what follows it is not looked at.
        names: keys to look for, in the outermost map alone.
        limits: ``max_items`` bounds the walk whatever lengths are declared, ``max_text_bytes`` the values.

    Returns:
        The values that are unsigned integers or text. Not in it: names that occur twice, and all that lies behind
        damage or beyond the limits.
    """
    found: dict[str, list[int | str | None]] = {}
    try:
        major, _, pairs, position = _head(data, 0)
        budget = limits.max_items if major == _MAP else 0
        for _ in range(min(pairs, budget)):
            name = _scalar(data, position, limits)
            position, budget = _skip(data, position, budget)
            start = position
            position, budget = _skip(data, position, budget)
            if isinstance(name, str) and name in names:
                found.setdefault(name, []).append(_scalar(data, start, limits))
    except WireError:
        pass  # what was read before the damage still tells who spoke
    return {name: value for name, (value, *more) in found.items() if value is not None and not more}


def _head(data: bytes, position: int) -> tuple[int, int, int, int]:
    """Major type, additional information, argument and the position behind them."""
    if position >= len(data):
        raise _truncated(position)
    major, info = data[position] >> 5, data[position] & 31
    position += 1
    if info < 24:
        return major, info, info, position
    if info > 27:
        what = "indefinite lengths are not allowed" if info == 31 else "reserved length"
        raise WireError("cbor", f"not valid CBOR here: {what} at byte {position - 1}")
    behind = position + (1 << (info - 24))
    if behind > len(data):
        raise _truncated(position)
    return major, info, int.from_bytes(data[position:behind], "big"), behind


def _skip(data: bytes, position: int, budget: int) -> tuple[int, int]:
    """The position behind an item (as it is declared), and what is left of the budget of items."""
    remaining = 1
    while remaining:
        if budget <= 0:
            raise WireError("limit", "more CBOR items than the limit")
        budget, remaining = budget - 1, remaining - 1
        major, _, value, position = _head(data, position)
        if major in (_BYTES, _TEXT):
            position += value
        elif major in (_ARRAY, _MAP, _TAG):
            remaining += {_ARRAY: value, _MAP: 2 * value, _TAG: 1}[major]
    return position, budget


def _scalar(data: bytes, position: int, limits: Limits) -> int | str | None:
    """The unsigned integer or text there, or None."""
    major, _, value, position = _head(data, position)
    if major == _UNSIGNED:
        return value
    if major == _TEXT and value <= min(limits.max_text_bytes, len(data) - position):
        try:
            return bytes(data[position : position + value]).decode()
        except UnicodeDecodeError:
            return None
    return None


def _truncated(position: int) -> WireError:
    return WireError("truncated", f"the bytes end inside an item that begins before byte {position}: send them whole")


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:200] or type(exc).__name__
