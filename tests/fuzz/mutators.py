"""New inputs from old ones. Half of what they make is well formed up to its checksums, so that it gets past them.

A mutator takes an input, the longest that it may return, a seed, and the fuzzer's own blind mutation of bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import cbor2

from tests.fuzz import seeds

__all__ = ["Blind", "Mutator", "bundle", "frame", "pack", "plain", "sequence"]

Blind = Callable[[bytes, int], bytes]
Mutator = Callable[[bytes, int, int, Blind], bytes]

_NUMBERS = (0, 1, -1, 2, 255, 4096, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), -(2**64))
_FLOATS = (0.0, -0.0, 1.5, 1e-45, 3.4e38, 1e300, math.nan, math.inf, -math.inf)
_TEXTS = ("", "a", "id", "data", "scale", "p.w", "class.x", "activations", "labels", "front", "\n", "é" * 9, "a" * 300)
_TAGS = (0, 1, 2, 24, 25, 28, 29, 30, 35, 36, 40, 64, 68, 78, 79, 80, 84, 85, 86, 256, 258, 55799, 2**32)


def plain(data: bytes, max_size: int, seed: int, blind: Blind) -> bytes:
    """Blind mutation."""
    return blind(data, max_size)


def frame(data: bytes, max_size: int, seed: int, blind: Blind) -> bytes:
    """A frame whose body or header is changed; in half of them size, checksum and count are right again."""
    rng = random.Random(seed)
    if rng.random() < 0.2:
        return blind(data, max_size)
    header = _load(data)
    usable = isinstance(header, dict) and isinstance(header.get("body"), bytes) and header["body"]
    if not usable or rng.random() < 0.25:  # what was refused before is refused again: begin anew now and then
        header = _load(rng.choice(seeds.frames()))
    body = header["body"]
    if rng.random() < 0.75:
        body = blind(body, max_size - 300) if rng.random() < 0.3 else _changed_cbor(body, rng, blind)
    if rng.random() < 0.25:
        header = _changed(header, rng, blind)
    if not isinstance(header, dict):
        return blind(data, max_size)
    if rng.random() < 0.5:
        header |= {"body": body, "size": len(body), "crc": zlib.crc32(body), "chunk": [0, 1]}
    elif rng.random() < 0.5:
        header |= {"body": body}
    return _dump(header, data, max_size, blind)


def sequence(data: bytes, max_size: int, seed: int, blind: Blind) -> bytes:
    """Frames dropped, repeated, moved, given to another device, or changed."""
    rng = random.Random(seed)
    records = list(seeds.split_records(data))
    if not records or rng.random() < 0.15:
        return blind(data, max_size)
    for _ in range(rng.randint(1, 4)):
        index = rng.randrange(len(records))
        device, packet = records[index]
        match rng.randrange(7):
            case 0 if len(records) > 1:
                del records[index]
            case 1:
                records.insert(rng.randrange(len(records) + 1), (device, packet))
            case 2:
                rng.shuffle(records)
            case 3:
                records[index] = (rng.randrange(seeds.DEVICES), packet)
            case 4:
                records[index] = (device, frame(packet, 2000, rng.getrandbits(32), blind))
            case 5:
                records += seeds.split_records(rng.choice(seeds.sequences()))
            case _:
                records[index] = (device, _changed_chunk(packet, rng, blind))
    joined = seeds.join_records(records)
    while len(joined) > max_size:
        del records[rng.randrange(len(records))]
        joined = seeds.join_records(records)
    return joined


def pack(data: bytes, max_size: int, seed: int, blind: Blind) -> bytes:
    """Packed tensors with something changed in their tree, or blindly."""
    rng = random.Random(seed)
    if rng.random() < 0.25:  # what was refused before is refused again: begin anew now and then
        data = rng.choice(seeds.packs())
    changed = blind(data, max_size) if rng.random() < 0.4 else _changed_cbor(data, rng, blind)
    return changed if len(changed) <= max_size else blind(data, max_size)


def bundle(data: bytes, max_size: int, seed: int, blind: Blind) -> bytes:
    """An archive with a changed member, in half of them under right hashes; or changed bytes of the archive itself."""
    rng = random.Random(seed)
    if rng.random() < 0.35:
        return blind(data, max_size)
    if rng.random() < 0.2:  # the directory at the end, where the archive says what is in it
        at = max(0, len(data) - rng.choice((30, 100, 400)))
        return (data[:at] + blind(data[at:], max(8, len(data) - at)))[:max_size]
    files = _unzip(data) or _unzip(seeds.bundle_files()[1])
    name = rng.choice([*files, "manifest.json", "initial.cbor"])
    if name == "manifest.json":
        files[name] = _changed_json(files.get(name, b"{}"), rng, blind)
    elif name == "initial.cbor":
        files[name] = _changed_cbor(files.get(name, b"\xa0"), rng, blind)
    else:
        files[name] = blind(files[name] or b"x", 2000)
    if rng.random() < 0.1:
        files[rng.choice(("../x", "/x", "X", "x" * 70, "é", "a\nb", "ok.onnx"))] = b"more"
    if rng.random() < 0.5:
        files = _with_hashes(files)
    method = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_LZMA))
    archive = seeds.zip_of(files, method)
    return archive if len(archive) <= max_size else blind(data, max_size)


def _changed_chunk(packet: bytes, rng: random.Random, blind: Blind) -> bytes:
    """A chunk with other bytes, another place or another declaration."""
    header = _load(packet)
    if not isinstance(header, dict) or not isinstance(header.get("body"), bytes):
        return blind(packet, 2000)
    name = rng.choice(("body", "chunk", "size", "crc", "step", "session", "kind"))
    match name:
        case "body":
            header[name] = blind(header[name] or b"x", len(header[name]) + rng.choice((0, 0, 8)))
        case "chunk":
            header[name] = [rng.randrange(6), rng.randrange(1, 14)]
        case "size" | "crc":
            header[name] = _number(header.get(name)) + rng.choice((-1, 1, 100))
        case "step":
            header[name] = rng.randrange(4)
        case "session":
            header[name] = rng.choice(("s1", "probe"))
        case _:
            header[name] = rng.choice(("train", "infer", "state"))
    return _dump(header, packet, 2000, blind)


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _load(data: bytes) -> Any:
    try:
        return cbor2.loads(data, max_depth=40)
    except Exception:  # any bytes may come here, and what they are not does not matter
        return None


def _dump(value: Any, data: bytes, max_size: int, blind: Blind) -> bytes:
    try:
        made = cbor2.dumps(value)
    except Exception:  # a tree that has no encoding: change bytes instead
        return blind(data, max_size)
    return made if len(made) <= max_size else blind(data, max_size)


def _changed_cbor(data: bytes, rng: random.Random, blind: Blind) -> bytes:
    tree = _load(data)
    if tree is None:
        return blind(data or b"\xa0", len(data) + 16)
    return _dump(_changed(tree, rng, blind), data or b"\xa0", len(data) + 400, blind)


def _changed_json(data: bytes, rng: random.Random, blind: Blind) -> bytes:
    try:
        tree = _changed(json.loads(data), rng, blind)
        return json.dumps(tree, default=repr).encode()
    except (ValueError, RecursionError, TypeError):
        return blind(data or b"{}", len(data) + 16)


def _changed(tree: Any, rng: random.Random, blind: Blind) -> Any:
    """A copy with one place changed, anywhere in it."""
    inner = rng.random() < 0.85
    if isinstance(tree, dict) and tree and inner:
        tree = dict(tree)
        name = rng.choice(list(tree))
        if rng.random() < 0.1:
            del tree[name]
        elif rng.random() < 0.1:
            tree[rng.choice(_TEXTS)] = rng.choice([*tree.values()])
        else:
            tree[name] = _changed(tree[name], rng, blind)
        return tree
    if isinstance(tree, list | tuple) and tree and inner:  # cbor2 makes tuples of what a tag holds
        tree = list(tree)
        index = rng.randrange(len(tree))
        if rng.random() < 0.1:
            del tree[index]
        elif rng.random() < 0.1:
            tree.insert(index, tree[index])
        else:
            tree[index] = _changed(tree[index], rng, blind)
        return tree
    if isinstance(tree, cbor2.CBORTag) and inner:
        if rng.random() < 0.2:
            return cbor2.CBORTag(rng.choice(_TAGS), tree.value)
        return cbor2.CBORTag(tree.tag, _changed(tree.value, rng, blind))
    if isinstance(tree, bytes) and tree and inner and rng.random() < 0.5:
        at = rng.randrange(len(tree))
        return tree[:at] + bytes([rng.randrange(256)]) + tree[at + 1 :]
    if isinstance(tree, bytes) and tree and inner:
        return blind(tree, len(tree) + rng.choice((0, 0, 0, 4, 64)))
    if isinstance(tree, int) and rng.random() < 0.8:
        return rng.choice((tree - 1, tree + 1, *_NUMBERS))
    return _leaf(rng)


def _leaf(rng: random.Random) -> Any:
    match rng.randrange(9):
        case 0:
            return rng.choice(_FLOATS)
        case 1:
            return rng.choice(_TEXTS)
        case 2:
            return rng.choice((None, True, False))
        case 3:
            return bytes(rng.randrange(40))
        case 4:
            return [rng.choice(_NUMBERS) for _ in range(rng.randrange(9))]
        case 5:
            return {rng.choice(_TEXTS): rng.choice(_NUMBERS)}
        case 6:
            value: Any = 0
            for _ in range(rng.randrange(24)):
                value = [value]
            return value
        case 7:
            return cbor2.CBORTag(rng.choice(_TAGS), rng.choice((0, "x", b"\0" * 8, [[2, 2], 1])))
        case _:
            return rng.choice(_NUMBERS)


def _unzip(data: bytes) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 1 << 20:
                return {}
            return {entry.filename: archive.read(entry) for entry in archive.infolist()[:40]}
    except Exception:  # any bytes may come here, and what they are not does not matter
        return {}


def _with_hashes(files: dict[str, bytes]) -> dict[str, bytes]:
    try:
        document = json.loads(files["manifest.json"])
    except (KeyError, ValueError, RecursionError):
        return files
    if isinstance(document, dict):
        others = {name: data for name, data in files.items() if name != "manifest.json"}
        document["files"] = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in others.items()
        }
        files["manifest.json"] = json.dumps(document, default=repr).encode()
    return files
