"""How large what comes off the network may be; every limit is checked before memory is taken."""

from __future__ import annotations

from dataclasses import dataclass, fields

from edge_sdk.errors import ConfigError

__all__ = ["DEFAULT_LIMITS", "Limits"]


@dataclass(frozen=True)
class Limits:
    """Bounds on messages, for both directions.

    Attributes:
        max_message_bytes: body of a message, all chunks together.
        max_chunk_bytes: part of a body that one frame carries.
        max_chunks: frames of one message.
        max_tensors: tensors of one message.
        max_dims: dimensions of one tensor.
        max_elements: elements of one tensor.
        max_items: CBOR items of one body (keys, values, containers and tags each count): a byte of
            input can cost 72 bytes of Python objects, and this bounds how many such bytes there are.
        max_depth: nesting of containers and tags.
        max_text_bytes: one text string, UTF-8.

    Raises:
        ConfigError: a limit below 1.
    """

    max_message_bytes: int = 64 << 20
    max_chunk_bytes: int = 1 << 20
    max_chunks: int = 4096
    max_tensors: int = 1024
    max_dims: int = 8
    max_elements: int = 16 << 20
    max_items: int = 16384
    max_depth: int = 16
    max_text_bytes: int = 64 << 10

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{field.name}={value!r}: a limit is an integer of at least 1")


DEFAULT_LIMITS = Limits()
