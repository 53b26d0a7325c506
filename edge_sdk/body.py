"""The body of a message: the CBOR map {"id": [kind, run, session, step], "fields": {...}, "tensors": {...}}.

A tensor is {"data": typed array}, for float16 with its "scale", or packed in few bits (``packing``). The identity of
the frames' header stands here again because the checksum covers the body alone: a step number that a bit flip has
changed must not pass as another step.
"""

from __future__ import annotations

from edge_sdk import cbor
from edge_sdk.codec import TENSOR_TAGS, compress, expand, from_typed_array, to_typed_array
from edge_sdk.errors import WireError
from edge_sdk.limits import DEFAULT_LIMITS, Limits
from edge_sdk.messages import KINDS, Message, check_identity, check_message, check_names
from edge_sdk.packing import Packing, read_packed, to_packed_entry

__all__ = ["from_body", "to_body"]


def to_body(message: Message, codec: str | Packing = "float32", limits: Limits = DEFAULT_LIMITS) -> bytes:
    """Encode a message; equal messages give equal bytes.

    Args:
        message: checked as in ``check_message``.
        codec: ``float32``, ``float16`` for half the bytes (see ``codec.compress``), or a ``Packing`` of the tensors
            that may be packed; the others go as float32 then.
        limits: the body can be read under these.

    Raises:
        WireError: the message must not be sent.
        ConfigError: unknown codec.
    """
    message = check_message(message, limits)
    tensors: dict[str, dict[str, object]] = {}
    for name, array in message.tensors.items():
        if isinstance(codec, Packing) and _is_packable(message.kind, name):
            tensors[name] = to_packed_entry(name, array, codec)
            continue
        sent, scale = compress(array, "float32" if isinstance(codec, Packing) else codec)
        tensors[name] = {"data": to_typed_array(name, sent)} | ({} if scale is None else {"scale": scale})
    identity = [message.kind, message.run, message.session, message.step]
    body = cbor.dumps({"id": identity, "fields": message.fields, "tensors": tensors})
    if len(body) > limits.max_message_bytes:
        raise WireError("limit", f"a body of {len(body)} bytes is above max_message_bytes: send smaller batches")
    cbor.check(body, limits, TENSOR_TAGS)
    return body


def from_body(body: bytes, limits: Limits = DEFAULT_LIMITS) -> Message:
    """Decode a body that is complete and whose checksum is right.

    Raises:
        WireError: every reason of the protocol but those of frames.
    """
    if len(body) > limits.max_message_bytes:
        raise WireError("limit", f"a body of {len(body)} bytes is above max_message_bytes={limits.max_message_bytes}")
    content = cbor.loads(body, limits, TENSOR_TAGS)
    if not isinstance(content, dict) or content.keys() != {"id", "fields", "tensors"}:
        raise WireError("schema", 'a body must be the map {"id", "fields", "tensors"}')
    identity, fields, entries = content["id"], content["fields"], content["tensors"]
    if not isinstance(identity, list) or len(identity) != 4:
        raise WireError("schema", "id must be [kind, run, session, step]")
    if not isinstance(fields, dict) or not isinstance(entries, dict):
        raise WireError("schema", "fields and tensors must be maps")
    kind, run, session, step = check_identity(*identity)
    check_names(kind, entries, limits)
    tensors = {}
    for name, entry in entries.items():
        if isinstance(entry, dict) and "bits" in entry:
            if not _is_packable(kind, name):
                raise WireError("dtype", f"tensor {name!r} of {kind!r} is packed: send it as float32")
            rows, codes = read_packed(name, entry, limits)
            tensors[name] = codes.expand(rows)
            continue
        if not isinstance(entry, dict) or not {"data"} <= entry.keys() <= {"data", "scale"}:
            raise WireError("schema", f'tensor {name!r} must be the map {{"data", "scale"}}, or one with "bits"')
        if "scale" in entry and entry["scale"] is None:
            raise WireError("schema", f"tensor {name!r}: the scale must be a float")
        tensors[name] = expand(name, from_typed_array(name, entry["data"], limits), entry.get("scale"))
    return check_message(Message(kind, run, session, step, fields, tensors), limits)


def _is_packable(kind: str, name: str) -> bool:
    rule = KINDS[kind].tensors.get(name)
    return rule is not None and rule.packable
