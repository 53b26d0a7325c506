"""What is fuzzed: each target takes any bytes and raises where an invariant of the SDK does not hold.

A target returns what became of the input: ``accepted``, or why it was refused, one word for each thing it read.
Whatever else leaves a target (``KeyError``, ``MemoryError``, ...) is a defect of the code under it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import numpy.typing as npt

from edge_sdk import bundle as bundles
from edge_sdk import chunks, codec, topics, wire
from edge_sdk.errors import BundleError, WireError
from edge_sdk.limits import DEFAULT_LIMITS, Limits
from edge_sdk.messages import Message
from tests.fuzz import mutators, seeds

__all__ = ["ACCEPTED", "PEAKS", "TARGETS", "Target", "Violation"]

ACCEPTED = "accepted"
PEAKS: dict[str, int] = {}  # most memory that a thing has taken so far, bytes
HELD = "held"  # a chunk of a message that is not whole yet
_REASONS = {
    *("truncated", "trailing", "cbor", "tag", "version", "kind", "limit", "schema"),
    *("crc", "header", "conflict", "dtype", "shape", "nonfinite", "range"),
}
_DTYPES = {"uint8", "int32", "int64", "float16", "float32"}
_LONGEST_ERROR = 1500  # characters: an error is one line that a log can take

# Small enough that short inputs reach every limit.
_TIGHT = Limits(
    max_message_bytes=6 << 10,
    max_chunk_bytes=3 << 10,
    max_tensors=6,
    max_dims=5,
    max_elements=512,
    max_items=256,
    max_depth=8,
    max_text_bytes=128,
)
_CHUNKED = Limits(max_message_bytes=1 << 10, max_chunk_bytes=1 << 9, max_chunks=12)
_MAX_PARTIAL = 2
_EXPANSION = 64  # a packed byte becomes up to 32 bytes of float32, and a look whether they are finite
_BUNDLE_LIMITS = {"_MAX_MANIFEST_BYTES": 16 << 10, "_MAX_FILE_BYTES": 64 << 10, "_MAX_BUNDLE_BYTES": 128 << 10}


class Violation(AssertionError):
    """An invariant that an input broke."""


@dataclass(frozen=True)
class Target:
    """One door through which bytes come in.

    Attributes:
        run: takes an input; returns one word for each thing that it read in it; raises on a defect.
        seeds: inputs to begin with.
        mutate: makes a new input of an old one (see ``mutators``).
        max_bytes: longest input.
        share: of the inputs of a whole run.
    """

    run: Callable[[bytes], list[str]]
    seeds: Callable[[], tuple[bytes, ...]]
    mutate: mutators.Mutator
    max_bytes: int
    share: float


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise Violation(text)


def _reason(exc: WireError) -> str:
    _require(exc.reason in _REASONS, f"unknown reason {exc.reason!r}")
    _one_line(exc)
    return exc.reason


def _one_line(exc: Exception) -> None:
    text = str(exc)
    _require(text.isprintable() and 0 < len(text) <= _LONGEST_ERROR, f"the error is not one short line: {text!r:.3000}")


@contextmanager
def _at_most(limit_bytes: int, what: str) -> Iterator[None]:
    """The block takes no more memory than that at any instant, whatever it raises."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1] - before
        PEAKS[what] = max(peak, PEAKS.get(what, 0))
        _require(peak <= limit_bytes, f"{what} took {peak} bytes, at most {limit_bytes} are allowed")


def _allowance(size: int, limits: Limits, *, messages: bool = True) -> int:
    """Bytes that reading ``size`` bytes may cost: a few copies, and the objects of the counted CBOR items."""
    copies = 8 + (_EXPANSION if messages else 0)
    return (64 << 10) + copies * size + 320 * min(size, limits.max_items)


# ---------------------------------------------------------------- envelope


def _envelope(data: bytes) -> list[str]:
    """One frame and its body under the limits of the product and under tight ones."""
    wide, tight = _decode(data, DEFAULT_LIMITS), _decode(data, _TIGHT)
    if isinstance(tight, Message):
        _require(tight == wide, "tighter limits changed a message")
    else:
        _require(tight in ("limit", HELD) or tight == wide, f"tighter limits turned {wide!r} into {tight!r}")
    return [ACCEPTED if isinstance(wide, Message) else wide]


def _decode(data: bytes, limits: Limits) -> Message | str:
    with _at_most(_allowance(len(data), limits), "reading a frame"):
        try:
            frame = wire.decode_frame(data, limits)
            if frame.count > 1:
                return HELD
            message = wire.decode_body(frame, frame.body, limits)
        except WireError as exc:
            return _reason(exc)
    _check_message(frame, frame.body, message, limits)
    _check_encoding(message, limits)
    return message


def _check_message(frame: wire.Frame, body: bytes, message: Message, limits: Limits) -> None:
    """The message is what its bytes say, read again by a reader that knows none of the SDK's code."""
    _require(zlib.crc32(body) == frame.crc and len(body) == frame.size, "a body was accepted against its checksum")
    tree = cbor2.loads(body)
    identity = [message.kind, message.run, message.session, message.step]
    _require(tree["id"] == identity and frame.key == (*identity[1:], identity[0]), "header and body differ")
    _require(message.fields.keys() == tree["fields"].keys(), "fields were lost or made up")
    _require(message.tensors.keys() == tree["tensors"].keys(), "tensors were lost or made up")
    for name, array in message.tensors.items():
        entry = tree["tensors"][name]
        sent = _read_codes(entry) if "bits" in entry else _read_tensor(entry["data"])
        if "scale" in entry:
            sent = sent.astype(np.float32) * np.float32(entry["scale"])
        _require(array.dtype == sent.dtype and np.array_equal(array, sent), f"tensor {name!r} was changed")
        _require(array.size <= limits.max_elements and array.ndim <= limits.max_dims, f"{name!r} is above the limits")
        _require(bool(np.isfinite(array).all()), f"tensor {name!r} is not finite")


def _check_encoding(message: Message, limits: Limits) -> None:
    """An accepted message can be sent on, and comes out the same."""
    try:
        frames = wire.encode(message, chunk_bytes=limits.max_chunk_bytes, limits=limits)
    except WireError as exc:
        _require(exc.reason == "limit", f"an accepted message cannot be sent: {exc}")  # float16 came in half the bytes
        return
    assembler = wire.Assembler(limits)
    again = [assembler.add(wire.decode_frame(data, limits)) for data in frames]
    _require(again[-1] == message, "an accepted message changes when it is sent again")


def _read_codes(entry: Mapping[str, Any]) -> npt.NDArray[Any]:
    """A packed tensor, bit by bit."""
    rows, bits, count = _read_tensor(entry["data"]), entry["bits"], int(np.prod(entry["shape"], dtype=object))
    digits = np.unpackbits(rows, axis=1)
    _require(not digits[:, count * bits :].any(), "bits behind a sample's last value were accepted")
    weights = 1 << np.arange(bits - 1, -1, -1)
    codes = digits[:, : count * bits].reshape(len(rows), count, bits) @ weights
    low, high = np.float32(entry["low"]), np.float32(entry["high"])
    values = low + codes.astype(np.float32) * (high - low) / np.float32(2**bits - 1)
    return values.reshape(len(rows), *entry["shape"])


def _read_tensor(value: Any) -> npt.NDArray[Any]:
    dtypes = {64: "u1", 78: "<i4", 79: "<i8", 84: "<f2", 85: "<f4"}
    dims, data = value.value
    return np.frombuffer(data.value, dtypes[data.tag]).reshape(dims)


# ---------------------------------------------------------------- chunk assembler


def _assembler(data: bytes) -> list[str]:
    """Frames of three devices in any order; what comes out was sent by that device, and no state is a dead end."""
    assemblers = [wire.Assembler(_CHUNKED, _MAX_PARTIAL) for _ in range(seeds.DEVICES)]
    sent: list[dict[tuple[chunks.Key, int], set[bytes]]] = [{} for _ in assemblers]
    taken = [0] * len(assemblers)
    outcomes = []
    for device, packet in seeds.split_records(data):
        assembler = assemblers[device]
        try:
            with _at_most(_allowance(len(packet) + _CHUNKED.max_message_bytes, _CHUNKED), "a chunk"):
                frame = wire.decode_frame(packet, _CHUNKED)
                sent[device].setdefault((frame.key, frame.index), set()).add(frame.body)
                taken[device] += len(frame.body)
                body = assembler.whole(frame)
                message = None if body is None else wire.decode_body(frame, body, _CHUNKED)
        except WireError as exc:
            outcomes.append(_reason(exc))
        else:
            outcomes.append(HELD if message is None else ACCEPTED)
            if body is not None and message is not None:
                _check_message(frame, body, message, _CHUNKED)
                _require(_was_sent(frame, body, sent[device]), "a message holds bytes that its device did not send")
                original = seeds.ORIGINALS.get((frame.crc, frame.size))
                _require(original is None or original == message, "a message came out that is not the one sent")
        held = assembler.held_bytes
        _require(held <= _MAX_PARTIAL * _CHUNKED.max_message_bytes, f"{held} bytes are held")
        _require(held <= taken[device], "more is held than arrived")
    for assembler in (assemblers[device] for device in {device for device, _ in seeds.split_records(data)}):
        _require(_recovers(assembler), "a whole message is refused for ever after what came before")
    return outcomes


def _was_sent(frame: wire.Frame, body: bytes, sent: Mapping[tuple[chunks.Key, int], set[bytes]]) -> bool:
    ends = {0}
    for index in range(frame.count):
        pieces = sent.get((frame.key, index), set())
        ends = {end + len(piece) for end in ends for piece in pieces if body.startswith(piece, end)}
    return len(body) in ends


def _recovers(assembler: wire.Assembler) -> bool:
    """A sender that repeats its message after an error gets it through, at the latest the second time."""
    for _ in range(2):
        for packet in seeds.PROBE_FRAMES:
            try:
                if assembler.add(wire.decode_frame(packet, _CHUNKED)) == seeds.PROBE:
                    return True
            except WireError as exc:
                _reason(exc)
    return False


# ---------------------------------------------------------------- codec


def _codec(data: bytes) -> list[str]:
    """Packed tensors; what is read packs again to the same arrays."""
    with _at_most(_allowance(len(data), DEFAULT_LIMITS, messages=False), "unpacking"):
        try:
            tensors = codec.unpack_tensors(data)
        except WireError as exc:
            return [_reason(exc)]
    tree = cbor2.loads(data)
    _require(tensors.keys() == tree.keys(), "tensors were lost or made up")
    for name, array in tensors.items():
        sent = _read_tensor(tree[name])
        _require(array.dtype.name in _DTYPES and not array.flags.writeable, f"tensor {name!r} is {array.dtype}")
        _require(array.dtype == sent.dtype and array.shape == sent.shape, f"tensor {name!r} was changed")
        _require(array.tobytes() == sent.tobytes(), f"tensor {name!r} was changed")
    again = codec.unpack_tensors(codec.pack_tensors(tensors))
    same = all(again[name].tobytes() == array.tobytes() for name, array in tensors.items())
    _require(same and again.keys() == tensors.keys(), "packing again changes the tensors")
    return [ACCEPTED]


# ---------------------------------------------------------------- bundle


def _bundle(data: bytes) -> list[str]:
    """A bundle file; what is read was named in its manifest with its size and hash."""
    for name, value in _BUNDLE_LIMITS.items():
        setattr(bundles, name, value)
    file = _bundle_file()
    os.truncate(file, 0)
    os.pwrite(file, data, 0)
    path = Path(f"/proc/self/fd/{file}")
    allowance = 2 * sum(_BUNDLE_LIMITS.values()) + 6 * len(data) + 60 * _BUNDLE_LIMITS["_MAX_MANIFEST_BYTES"]
    with _at_most(allowance + (1 << 20), "loading a bundle"):
        try:
            bundle = bundles.load_bundle(path)
        except BundleError as exc:
            _one_line(exc)
            cause = exc.__cause__
            return [f"BundleError from {type(cause).__name__}" if cause else "BundleError"]
    _check_bundle(path, bundle)
    return [ACCEPTED]


def _check_bundle(path: Path, bundle: bundles.Bundle) -> None:
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    text = files.pop("manifest.json")
    document = json.loads(text)
    _require(bundle.id == hashlib.sha256(text).hexdigest()[:32], "the id does not stand for the manifest")
    stated = {name: (entry["bytes"], entry["sha256"]) for name, entry in document["files"].items()}
    found = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    _require(stated == found, "a file is not what the manifest says")
    _require(all(bundle.graphs[name] == files[f"{name}.onnx"] for name in bundle.graphs), "a graph was changed")
    initial = {name: _read_tensor(value) for name, value in cbor2.loads(files["initial.cbor"]).items()}
    _require(initial.keys() == bundle.initial.keys(), "initial tensors were lost or made up")
    for name, array in bundle.initial.items():
        _require(array.dtype == np.float32 and bool(np.isfinite(array).all()), f"{name!r} is no finite float32")
        _require(np.array_equal(array, initial[name]), f"initial tensor {name!r} was changed")
    manifest = bundle.manifest
    _require(list(manifest.classes) == document["classes"], "the classes are not those of the manifest")
    _require(list(manifest.input_shape) == document["input_shape"], "the shape is not that of the manifest")
    _require(dict(manifest.server) == document["server"], "the server's part is not that of the manifest")


@cache
def _bundle_file() -> int:
    """A file without a name, in memory, that goes when the process ends."""
    return os.memfd_create("bundle")


# ---------------------------------------------------------------- topics


def _topics(data: bytes) -> list[str]:
    """A topic as a transport hands it over; what is accepted can be built again from its parts."""
    text = data.decode("utf-8", "replace")
    try:
        topic = topics.parse(text)
    except WireError as exc:
        _require(exc.reason == "topic", f"unknown reason {exc.reason!r}")
        _one_line(exc)
        return [exc.reason]
    build = {
        ("up", "state"): topics.up_state,
        ("up", "step"): topics.up_step,
        ("down", "step"): topics.down_step,
    }
    if topic.channel == "model":
        again = topics.down_model(topic.fleet)
    else:
        again = build[topic.direction, topic.channel](topic.fleet, topic.device)
    _require(again == text, f"{topic} is not {text!r}")
    return [ACCEPTED]


TARGETS: Mapping[str, Target] = {
    "envelope": Target(_envelope, seeds.frames, mutators.frame, 12 << 10, 0.38),
    "assembler": Target(_assembler, seeds.sequences, mutators.sequence, 4 << 10, 0.1),
    "codec": Target(_codec, seeds.packs, mutators.pack, 8 << 10, 0.32),
    "bundle": Target(_bundle, seeds.bundle_files, mutators.bundle, 24 << 10, 0.12),
    "topics": Target(_topics, seeds.topic_names, mutators.plain, 256, 0.08),
}
