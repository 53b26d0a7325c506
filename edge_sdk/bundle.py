"""The bundle: one zip file with the graphs, the initial front and a manifest, written by export and read by both sides.

A bundle is data, never code: ``manifest.json``, ONNX graphs and CBOR tensors. Every file is named in the manifest
with its size and SHA-256, and nothing else may be inside. Sizes are checked before anything is unpacked, so that a
damaged or hostile file is refused with one sentence and costs no memory. The bundle's id is the SHA-256 of its
manifest and so stands for every byte of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.codec import unpack_tensors
from edge_sdk.compact import expanded
from edge_sdk.errors import BundleError, WireError
from edge_sdk.manifest import FORMAT, FORMAT_VERSION, Manifest, document_of, parse_manifest
from edge_sdk.signing import SIGNATURE_BYTES, PublicKey, SigningKey
from edge_sdk.vectors import ORDER, unpack_vectors

__all__ = ["FORMAT_VERSION", "Bundle", "Manifest", "load_bundle", "write_bundle"]

MANIFEST = "manifest.json"
INITIAL = "initial.cbor"
PARITY = "parity.cbor"
SIGNATURE = "signature"
ID_DIGITS = 32

_MAX_FILES = 32
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_FILE_BYTES = 128 << 20
_MAX_BUNDLE_BYTES = 256 << 20
_MAX_DIRECTORY_BYTES = 16 << 10
_END_BYTES = 42  # a zip file's last record, and before it the mark that only a large one has
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # an LZMA header alone can ask for 4 GiB
# What zipfile raises, by design or not, on bytes that are no archive.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)
_REMEDY = "export it again with psgl-export build, or copy it again"


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and checked.

    Attributes:
        id: 32 hexadecimal digits that stand for every byte of the bundle.
        manifest: what it says of itself.
        graphs: ONNX bytes by name (``train``, ``infer``, ``prepare``, ``backward``; of a frozen front ``infer``; with
            them ``guide``, where there is one that only decides).
        initial: front tensors by name: ``p.*`` parameters, ``b.*`` statistics, ``s.*`` optimizer state (which a
            frozen front does not have).
        parity: what the graphs were given and gave at export, by name, as ``vectors`` describes it.
    """

    id: str
    manifest: Manifest
    graphs: Mapping[str, bytes] = field(repr=False)
    initial: Mapping[str, npt.NDArray[Any]] = field(repr=False)
    parity: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict, repr=False)


def write_bundle(
    path: str | Path, manifest: Manifest, files: Mapping[str, bytes], *, sign_key: SigningKey | None = None
) -> str:
    """Write a bundle in one atomic step.

    Args:
        path: the file to write; a file that stands there is replaced.
        manifest: what the bundle says of itself.
        files: ``initial.cbor``, ``parity.cbor`` and the manifest's ``graphs``, ``infer.onnx`` and so on, by name.
        sign_key: signs the manifest; the id stays the same.

    Returns:
        The bundle's id.

    Raises:
        BundleError: a name, a size or a missing graph would make the bundle unreadable, or the disk refuses.
    """
    path = Path(path)
    for name, data in files.items():
        if not _NAME.fullmatch(name) or name in (MANIFEST, SIGNATURE) or len(data) > _MAX_FILE_BYTES:
            raise BundleError(
                f"{name!r} cannot be part of a bundle: short lower-case names, at most {_MAX_FILE_BYTES} bytes"
            )
    if sum(map(len, files.values())) + _MAX_MANIFEST_BYTES > _MAX_BUNDLE_BYTES:
        raise BundleError(f"a bundle holds at most {_MAX_BUNDLE_BYTES} bytes in all: choose smaller front layers")
    for needed in _needed(manifest):
        if needed not in files:
            raise BundleError(f"a bundle needs {needed}")
    for graph in ORDER:
        if graph not in manifest.graphs and f"{graph}.onnx" in files:
            raise BundleError(f"the manifest knows nothing of {graph}.onnx, or its front is frozen")
    hashes = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in sorted(files.items())}
    document = document_of(manifest, hashes)
    text = json.dumps(document, indent=1, sort_keys=True).encode()
    if len(text) > _MAX_MANIFEST_BYTES:
        raise BundleError(
            f"the manifest is {len(text)} bytes, the limit is {_MAX_MANIFEST_BYTES}: choose a front with fewer layers"
        )
    signed = {} if sign_key is None else {SIGNATURE: sign_key.sign(text)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as temporary:
            try:
                with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
                    for name, data in ((MANIFEST, text), *signed.items(), *sorted(files.items())):
                        # A fixed date keeps equal bundles equal to the byte.
                        info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                        info.compress_type = zipfile.ZIP_DEFLATED
                        archive.writestr(info, data)
                temporary.flush()
                os.fsync(temporary.fileno())
                os.fchmod(temporary.fileno(), 0o644)
                Path(temporary.name).replace(path)
            except BaseException:
                Path(temporary.name).unlink(missing_ok=True)
                raise
    except OSError as exc:
        raise BundleError(f"{path} cannot be written: {exc.strerror or exc}") from exc
    return _bundle_id(text)


def load_bundle(path: str | Path, *, public_key: PublicKey | None = None) -> Bundle:
    """Read a bundle and check every byte of it against its manifest.

    Args:
        path: the file.
        public_key: of who signs bundles: the manifest's signature is checked before anything is made of it. Without a
            key a signature is not looked at.

    Raises:
        BundleError: the file is missing, cut off, changed, of another version or unreasonably large; with a public key
            also not signed, or signed with another.
    """
    path = Path(path)
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            text, document, contents = _read(archive, path, public_key)
            manifest = parse_manifest(document, path)
            for needed in _needed(manifest):
                if needed not in contents:
                    raise BundleError(f"{path} lacks {needed}: export it again")
    except FileNotFoundError as exc:
        raise BundleError(f"there is no bundle at {path}: make one with psgl-export build") from exc
    except _DAMAGE as exc:
        raise BundleError(f"{path} is not a whole bundle ({_short(exc)}): {_REMEDY}") from exc
    except OSError as exc:
        raise BundleError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    initial = _initial(contents[INITIAL], manifest, path)
    try:
        parity = unpack_vectors(contents[PARITY])
    except WireError as exc:
        raise BundleError(f"{path}: {PARITY} is not readable ({exc}): {_REMEDY}") from exc
    graphs = {graph: contents[f"{graph}.onnx"] for graph in manifest.graphs}
    return Bundle(_bundle_id(text), manifest, graphs, initial, parity)


def _initial(data: bytes, manifest: Manifest, path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        initial = expanded(unpack_tensors(data))
    except WireError as exc:
        raise BundleError(f"{path}: {INITIAL} is not readable ({exc}): {_REMEDY}") from exc
    except BundleError as exc:
        raise BundleError(f"{path}: {exc}") from exc
    for name, array in initial.items():
        if name[:2] not in ("p.", "b.", "s.") or array.dtype != np.float32 or not np.isfinite(array).all():
            raise BundleError(f"{path}: initial tensor {name!r} is not a finite float32 front tensor: {_REMEDY}")
        if manifest.frozen and name[:2] == "s.":
            raise BundleError(f"{path}: a frozen front has an optimizer's {name!r}: {_REMEDY}")
    for interface in manifest.interfaces.values():
        for tensor in interface.inputs:
            found = initial.get(tensor.name)
            if tensor.name[:2] in ("p.", "b.", "s.") and (found is None or found.shape != tensor.shape):
                raise BundleError(
                    f"{path}: {INITIAL} has no {tensor.name!r} of the shape that its graphs take: {_REMEDY}"
                )
    return initial


def _needed(manifest: Manifest) -> tuple[str, ...]:
    """Files without which a bundle is of no use."""
    return *(f"{graph}.onnx" for graph in manifest.graphs), INITIAL, PARITY


def _bundle_id(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()[:ID_DIGITS]


def _short(value: object) -> str:
    return " ".join(str(value).split())[:200]


def _check_directory(path: Path) -> None:
    """Refuse a long list of files before ``zipfile`` reads it; a zip file ends with that list's size."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _END_BYTES))
        end = file.read(_END_BYTES)
    large = end[:4] == b"PK\6\7"  # the mark of an archive beyond 4 GiB
    if large or end[-22:-18] != b"PK\5\6" or int.from_bytes(end[-10:-6], "little") > _MAX_DIRECTORY_BYTES:
        raise zipfile.BadZipFile("it does not end with a short list of files")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON (RFC 8259)")


def _read(
    archive: zipfile.ZipFile, path: Path, public_key: PublicKey | None
) -> tuple[bytes, dict[str, Any], dict[str, bytes]]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) != len(archive.infolist()) or len(entries) > _MAX_FILES or MANIFEST not in entries:
        raise BundleError(f"{path} is not a bundle: it needs one {MANIFEST} and at most {_MAX_FILES} files")
    for name, entry in entries.items():
        if entry.compress_type not in _METHODS:
            raise BundleError(f"{path}: {name[:80]!r} is compressed in a way that no bundle is: do not use it")
        if not _NAME.fullmatch(name):
            raise BundleError(f"{path} holds a file with the name {name[:80]!r}, which no bundle has: do not use it")
    text = _unpack(archive, entries[MANIFEST], _MAX_MANIFEST_BYTES, path)
    signature = _unpack(archive, entries[SIGNATURE], SIGNATURE_BYTES, path) if SIGNATURE in entries else None
    if public_key is not None:
        public_key.check(text, signature, path)
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"{path}: {MANIFEST} is not JSON: export the bundle again") from exc
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BundleError(f"{path} is not a bundle of this SDK: make one with psgl-export build")
    if document.get("version") != FORMAT_VERSION:
        raise BundleError(
            f"{path} is a bundle of version {_short(repr(document.get('version')))}, this SDK reads version "
            f"{FORMAT_VERSION}: export it again with the psgl-export of this version, or upgrade psgl on this machine"
        )
    files = document.get("files")
    if not isinstance(files, dict) or set(files) != set(entries) - {MANIFEST, SIGNATURE}:
        raise BundleError(f"{path} does not hold the files that its manifest names: copy or export it again")
    total = sum(entry.file_size for entry in entries.values())
    if total > _MAX_BUNDLE_BYTES:
        raise BundleError(f"{path} declares {total} bytes in all, the limit is {_MAX_BUNDLE_BYTES}: do not use it")
    contents = {}
    for name, stated in files.items():
        data = _unpack(archive, entries[name], _MAX_FILE_BYTES, path)
        if stated != {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}:
            raise BundleError(f"{path}: {name} was changed after export: copy or export the bundle again")
        contents[name] = data
    return text, document, contents


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int, path: Path) -> bytes:
    if entry.file_size > limit:
        raise BundleError(
            f"{path}: {entry.filename} declares {entry.file_size} bytes, the limit is {limit}: do not use it"
        )
    with archive.open(entry) as stream:
        data = stream.read(entry.file_size + 1)
    if len(data) != entry.file_size:
        raise BundleError(f"{path}: {entry.filename} is not as long as declared: copy or export the bundle again")
    return data
