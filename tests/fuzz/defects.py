"""Defects to plant, one at a time, that prove the fuzzer: a search that cannot fail shows nothing."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import cbor2

from edge_sdk import body, cbor, chunks, codec, topics
from edge_sdk.limits import Limits

__all__ = ["DEFECTS"]


class _AnyChecksum(int):
    def __ne__(self, other: object) -> bool:
        return False


def _no_checksum() -> None:
    """Bodies pass whatever their checksum says."""
    vars(chunks)["zlib"] = SimpleNamespace(crc32=lambda data: _AnyChecksum(zlib.crc32(data)))


def _early_allocation() -> None:
    """Memory is taken for the size that a tensor declares, before it is compared with the bytes that came."""
    read = codec.from_typed_array

    def allocate_first(name: str, value: Any, limits: Limits) -> Any:
        match value:
            case cbor2.CBORTag(value=[[*dims], _]) if all(type(dim) is int and dim > 0 for dim in dims):
                bytearray(min(math.prod(dims), 64 << 20))
        return read(name, value, limits)

    vars(body)["from_typed_array"] = vars(codec)["from_typed_array"] = allocate_first


def _endless() -> None:
    """A tag that the protocol does not know is waited out."""
    check = cbor.check

    def wait(data: bytes, limits: Limits, tags: frozenset[int] = frozenset()) -> None:
        while b"\xd8\x23" in data:  # tag 35
            pass
        check(data, limits, tags)

    vars(cbor)["check"] = wait


def _unbounded() -> None:
    """Unfinished messages are kept, however many there are."""
    begin = chunks.Assembler.__init__

    def keep_all(self: chunks.Assembler, limits: Limits, max_partial: int = 4) -> None:
        begin(self, limits, 1000)

    vars(chunks)["Assembler"].__init__ = keep_all


def _foreign_error() -> None:
    """An error of another kind gets out."""
    check = topics.check_name

    def look_up(name: str) -> str:
        return {"": ""}[name] if len(name) > 64 else check(name)

    vars(topics)["check_name"] = look_up


DEFECTS: Mapping[str, Callable[[], None]] = {
    "no-checksum": _no_checksum,
    "early-allocation": _early_allocation,
    "endless": _endless,
    "unbounded": _unbounded,
    "foreign-error": _foreign_error,
}
