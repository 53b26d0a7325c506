"""Inputs to begin with: the frozen messages of tests/golden and one valid thing of every kind."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import cbor2
import numpy as np

from edge_sdk.bundle import FORMAT_VERSION, Manifest
from edge_sdk.codec import pack_tensors
from edge_sdk.interface import Cost, Interface, TensorType
from edge_sdk.messages import KINDS, Kind, Message, TensorRule
from edge_sdk.wire import Packing, decode_frame, encode

__all__ = [
    "DEVICES",
    "MESSAGES",
    "ORIGINALS",
    "PROBE",
    "PROBE_FRAMES",
    "bundle_files",
    "frames",
    "join_records",
    "packs",
    "sequences",
    "split_records",
    "topic_names",
    "zip_of",
]

DEVICES = 3
_CHUNK = 150
_GOLDEN = Path(__file__).resolve().parent.parent / "golden"
_VALUES = {int: 3, float: 0.5, str: "text", bool: True, dict: {"a": 1}, list: [0, 2]}


def _tensor(name: str, rule: TensorRule) -> tuple[str, Any]:
    shape = (2, 3, 2, 2)[: rule.ndim[1]] if rule.batched else (3,)
    array = np.arange(np.prod(shape)).reshape(shape) / 8
    return name.replace("*", "p.w"), (array % 2).astype(rule.dtype)


def _example(name: str, kind: Kind, step: int) -> Message:
    fields = {field: _VALUES[expected] for field, expected in {**kind.required, **kind.optional}.items()}
    return Message(name, "r1", "s1", step, fields, dict(_tensor(*item) for item in kind.tensors.items()))


MESSAGES = tuple(_example(name, kind, step) for step, (name, kind) in enumerate(KINDS.items()))
PROBE = Message("infer", "r1", "probe", 1, {"front": 0}, {"activations": np.ones((4, 20), np.float32)})
PROBE_FRAMES = tuple(encode(PROBE, chunk_bytes=_CHUNK))


def _originals() -> dict[tuple[int, int], Message]:
    found = {}
    for message in (*MESSAGES, PROBE):
        frame = decode_frame(encode(message)[0])
        found[frame.crc, frame.size] = message
    return found


ORIGINALS = _originals()  # by checksum and size of the body


@cache
def frames() -> tuple[bytes, ...]:
    """Whole messages of one frame, in every codec, and single chunks."""
    golden = [path.read_bytes() for path in sorted(_GOLDEN.glob("*.cbor")) if path.stem != "tensors"]
    codecs = ("float32", "float16", Packing(1), Packing(2, -1.0, 1.0), Packing(4), Packing(8))
    made = [frame for message in MESSAGES for codec in codecs for frame in encode(message, codec=codec)]
    return (*golden, *made, PROBE_FRAMES[0])


def join_records(records: Iterable[tuple[int, bytes]]) -> bytes:
    """(device, packet) pairs as one input of the assembler's target."""
    return b"".join(struct.pack("<BH", device, len(packet)) + packet for device, packet in records)


def split_records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The opposite of ``join_records``; any bytes give some pairs."""
    position = 0
    while position + 3 <= len(data):
        device, length = struct.unpack_from("<BH", data, position)
        yield device % DEVICES, data[position + 3 : position + 3 + length]
        position += 3 + length


@cache
def sequences() -> tuple[bytes, ...]:
    """Chunked messages: in order, backwards, of several devices in turn, with repeats, mixed, unfinished."""
    cuts = [encode(message, chunk_bytes=_CHUNK) for message in MESSAGES]
    made = [join_records((0, packet) for packet in cut) for cut in cuts]
    made += [join_records((1, packet) for packet in reversed(cut * 2)) for cut in cuts]
    woven = zip(*([*cut, *PROBE_FRAMES][:4] for cut in cuts[:DEVICES]), strict=False)
    made.append(join_records((device, packet) for group in woven for device, packet in enumerate(group)))
    made += [join_records((2, p) for p in (*a[:1], *b[:-1], *a[1:])) for a, b in pairwise(cuts)]
    large = [replace(PROBE, step=step, tensors={"activations": np.ones((8, 28), np.float32)}) for step in range(2, 6)]
    made.append(join_records((0, packet) for one in large for packet in encode(one, chunk_bytes=400)[:-1]))
    return tuple(made)


@cache
def packs() -> tuple[bytes, ...]:
    """Packed tensors of every dtype and of 0 to 6 dimensions."""
    dtypes = ("uint8", "int32", "int64", "float16", "float32")
    every = {f"p.{dtype}": np.arange(1, 5).astype(dtype).reshape(2, 2) for dtype in dtypes}
    dims = {f"d{n}": np.ones((1,) * n, np.float32) for n in range(7)}
    return (_GOLDEN / "tensors.cbor").read_bytes(), pack_tensors(every), pack_tensors(dims), pack_tensors({})


def zip_of(files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """The files in a zip archive, equal bytes for equal files."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = method
            archive.writestr(info, data)
    return target.getvalue()


def described(manifest: Manifest) -> Manifest:
    """The manifest with the least that it can say of its graphs."""

    def tensor(name: str, *shape: int) -> TensorType:
        return TensorType(name, "float32", ("N", *shape))

    noise = [tensor("noise", *manifest.cut_shape)] if manifest.noise else []
    forward = (tensor("x", *manifest.input_shape), *noise)
    gradient = (tensor("gradient", *manifest.cut_shape), TensorType("rate", "float32", ()))
    inner = (TensorType("r.0", "bool", (None, 2)),)
    inputs = {"infer": forward, "train": forward, "prepare": inner, "backward": gradient}
    gives = (tensor("activations", *manifest.cut_shape),)
    outputs = {"infer": gives, "train": gives, "prepare": inner, "backward": inner}
    interfaces = {name: Interface(18, inputs[name], outputs[name]) for name in manifest.graphs}
    return replace(manifest, interfaces=interfaces, costs={name: Cost(3, 2, 1) for name in manifest.graphs})


_PAPER = described(Manifest("paper", (1, 8, 8), ("a", "b"), (4, 2, 2), "sgd", 0.1, "sign", 0.2))
_FROZEN = described(
    Manifest(
        *("frozen", (1, 8, 8), ("a", "b"), (4,), "sgd", 0.1),
        **{"noise": 1.0, "frozen": True, "bits": 4, "span": (-3.0, 3.0), "bound": 1.0},
    )
)


def _bundle_parts(manifest: Manifest = _PAPER, **extra: bytes) -> dict[str, bytes]:
    initial = pack_tensors({"p.w": np.ones((2, 2), np.float32), "b.m": np.zeros(2, np.float32)})
    graphs = {f"{name}.onnx": name.encode() * 9 for name in manifest.graphs}
    parity = pack_tensors({"given.x": np.zeros((2, 1, 8, 8), np.float32), "infer.activations": np.zeros(4, np.float32)})
    files = {
        "initial.cbor": initial,
        "parity.cbor": parity,
        **graphs,
        **{name.replace("_", "."): data for name, data in extra.items()},
    }
    hashes = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()}
    document = {"format": "psgl-bundle", "version": FORMAT_VERSION, **asdict(manifest), "files": hashes}
    return {"manifest.json": json.dumps(document).encode(), **files}


@cache
def bundle_files() -> tuple[bytes, ...]:
    """A valid bundle in each compression that zip knows, and archives that grow when they are unpacked."""
    parts = _bundle_parts()
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    made = [zip_of(parts, method) for method in methods]
    made += [zip_of(_bundle_parts(_FROZEN)), zip_of(_bundle_parts(_FROZEN, train_onnx=b"train"))]
    made.append(zip_of(_bundle_parts(train_onnx=b"\0" * (1 << 20))))
    made.append(zip_of(_bundle_parts(**{f"x{n}_onnx": b"\0" * 60_000 for n in range(20)})))
    made.append(zip_of({**parts, "manifest.json": b" " * (1 << 20)}))
    bomb = zip_of(_bundle_parts(train_onnx=b"\0" * (1 << 20)))
    made.append(bomb.replace(struct.pack("<I", 1 << 20), struct.pack("<I", 100)))  # declares less than it holds
    made.append(zip_of({**parts, "initial.cbor": cbor2.dumps([[]] * 4000)}))
    made.append(zip_of({**parts, "parity.cbor": cbor2.dumps({"infer.y": [[]] * 4000})}))
    return tuple(made)


@cache
def topic_names() -> tuple[bytes, ...]:
    """Every topic of the protocol and some neighbours."""
    ends = ("up/d-1/state", "up/d-1/step", "down/d-1/step", "down/all/model", "up/all/step", "up/d/model", "up//step")
    return tuple(f"psgl/v1/ward/{end}".encode() for end in ends)
