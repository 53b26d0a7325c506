"""The wire contract, version 1: messages to frames and back. RFC 8949 (CBOR), RFC 8746 (typed arrays).

    encode                         Message -> body -> frames -> packets
    decode_frame, Assembler.add    packets -> frames -> body -> Message

messages.py says what may be sent, body.py, codec.py and packing.py how it is written, chunks.py how it is cut, and
cbor.py how little of CBOR is accepted.

Whatever the bytes, decoding returns the message that was sent or raises ``WireError``. Its ``reason`` is one
of ``truncated trailing cbor tag version kind limit schema crc header conflict dtype shape nonfinite range``,
and ``topic`` from ``topics.parse``.
"""

from __future__ import annotations

from edge_sdk.body import to_body
from edge_sdk.chunks import (
    VERSION,
    Assembler,
    ForeignFrame,
    Frame,
    cut,
    decode_body,
    decode_frame,
    foreign_version,
    unknown_kind,
    version_conflict,
)
from edge_sdk.limits import DEFAULT_LIMITS, Limits
from edge_sdk.messages import KINDS, Kind, Message, TensorRule
from edge_sdk.packing import Packing

__all__ = [
    "DEFAULT_LIMITS",
    "KINDS",
    "VERSION",
    "Assembler",
    "ForeignFrame",
    "Frame",
    "Kind",
    "Limits",
    "Message",
    "Packing",
    "TensorRule",
    "decode_body",
    "decode_frame",
    "encode",
    "foreign_version",
    "unknown_kind",
    "version_conflict",
]


def encode(
    message: Message,
    *,
    codec: str | Packing = "float32",
    chunk_bytes: int = 65536,
    limits: Limits = DEFAULT_LIMITS,
) -> list[bytes]:
    """Encode a message as frames, one packet each; equal messages give equal bytes.

    Args:
        message: checked against ``KINDS`` before anything is encoded.
        codec: how float32 tensors travel: ``float32`` as they are, ``float16`` scaled, in half the bytes; a
            ``Packing`` puts activations into few bits a value.
        chunk_bytes: bytes of the body per frame. A frame is up to 1 KiB longer: keep that below the broker's
            largest packet.
        limits: those of the receiver.

    Raises:
        WireError: a message that must not be sent; ``reason`` as for decoding.
        ConfigError: unknown codec, or a chunk size that cannot serve.
    """
    return cut(message, to_body(message, codec, limits), chunk_bytes, limits)
