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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from edge_sdk.codec import unpack_tensors
from edge_sdk.errors import BundleError, ConfigError, WireError
from edge_sdk.noise import NOISE_KINDS
from edge_sdk.packing import BITS, Packing

__all__ = ["FORMAT_VERSION", "Bundle", "Manifest", "load_bundle", "write_bundle"]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INITIAL = "initial.cbor"

_FORMAT = "psgl-bundle"
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
_INFER = ("infer",)
_TRAINING = ("train", "infer", "prepare", "backward")

_Choice = TypeVar("_Choice", str, int)


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        profile: its name, for instance ``paper`` or ``hardened``.
        input_shape: (C, H, W) or (C, T) of one sample, float32 in [0, 1].
        classes: name of each class, in label order.
        cut_shape: shape of one sample's activations; one number for a vector.
        optimizer: ``sgd`` or ``adam``, built into the backward graph.
        learning_rate: its base rate; each reply of the server scales it by a factor in [0, 1].
        normalisation: of the perturbation's map, ``sign`` or ``max``; None where the profile has no perturbation.
        epsilon: L-infinity budget of the perturbation, in units of the input's range.
        perturb_towards: ``guide``: the guide's own decision says which class the perturbation attacks, in training as
            at test; ``label``: the true label does, where the device has it.
        noise: standard deviation of the noise that the device adds to its activations, 0 for none.
        noise_kind: its distribution, ``gaussian`` or ``laplace``.
        frozen: the front is never trained: the bundle holds the ``infer`` graph alone.
        bits: of an activation on the wire, 1, 2, 4 or 8; 0 sends floats as the device's codec says.
        span: lowest and highest value that ``bits`` can say, exactly float32; None: those of each message.
        bound: no activation is larger than this in magnitude before the noise, 0 for no bound.
        max_batch: largest number of samples in one step.
        input_range: sensor values that become 0 and 1, for samples that are signed integers; None: such are refused.
        server: what only the server needs (model reference, streams, hash of the back's weights).
        versions: of the tools that made it.
    """

    profile: str
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    cut_shape: tuple[int, ...]
    optimizer: str
    learning_rate: float
    normalisation: str | None = None
    epsilon: float = 0.0
    perturb_towards: str = "guide"
    noise: float = 0.0
    noise_kind: str = "gaussian"
    frozen: bool = False
    bits: int = 0
    span: tuple[float, float] | None = None
    bound: float = 0.0
    max_batch: int = 256
    input_range: tuple[float, float] | None = None
    server: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs that the bundle holds."""
        return _INFER if self.frozen else _TRAINING

    @property
    def packing(self) -> Packing | None:
        """How activations are packed, or None where they go as floats.

        Raises:
            ConfigError: ``bits`` and ``span`` are none that can be.
        """
        if not self.bits:
            return None
        return Packing(self.bits) if self.span is None else Packing(self.bits, *self.span)


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and checked.

    Attributes:
        id: 32 hexadecimal digits that stand for every byte of the bundle.
        manifest: what it says of itself.
        graphs: ONNX bytes by name (``train``, ``infer``, ``prepare``, ``backward``; of a frozen front ``infer``).
        initial: front tensors by name: ``p.*`` parameters, ``b.*`` statistics, ``s.*`` optimizer state (which a
            frozen front does not have).
    """

    id: str
    manifest: Manifest
    graphs: Mapping[str, bytes] = field(repr=False)
    initial: Mapping[str, npt.NDArray[Any]] = field(repr=False)


def write_bundle(path: str | Path, manifest: Manifest, files: Mapping[str, bytes]) -> str:
    """Write a bundle in one atomic step.

    Args:
        path: the file to write; a file that stands there is replaced.
        manifest: what the bundle says of itself.
        files: ``initial.cbor`` and the manifest's ``graphs``, ``infer.onnx`` and so on, by name.

    Returns:
        The bundle's id.

    Raises:
        BundleError: a name, a size or a missing graph would make the bundle unreadable, or the disk refuses.
    """
    path = Path(path)
    for name, data in files.items():
        if not _NAME.fullmatch(name) or name == MANIFEST or len(data) > _MAX_FILE_BYTES:
            raise BundleError(
                f"{name!r} cannot be part of a bundle: short lower-case names, at most {_MAX_FILE_BYTES} bytes"
            )
    if sum(map(len, files.values())) + _MAX_MANIFEST_BYTES > _MAX_BUNDLE_BYTES:
        raise BundleError(f"a bundle holds at most {_MAX_BUNDLE_BYTES} bytes in all: choose smaller front layers")
    for needed in _needed(manifest):
        if needed not in files:
            raise BundleError(f"a bundle needs {needed}")
    for graph in _TRAINING:
        if manifest.frozen and graph not in manifest.graphs and f"{graph}.onnx" in files:
            raise BundleError(f"a bundle with a frozen front holds no {graph}.onnx")
    document = {
        "format": _FORMAT,
        "version": FORMAT_VERSION,
        **asdict(manifest),
        "files": {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in sorted(files.items())},
    }
    text = json.dumps(document, indent=1, sort_keys=True).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as temporary:
            try:
                with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
                    for name, data in ((MANIFEST, text), *sorted(files.items())):
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


def load_bundle(path: str | Path) -> Bundle:
    """Read a bundle and check every byte of it against its manifest.

    Raises:
        BundleError: the file is missing, cut off, changed, of another version or unreasonably large.
    """
    path = Path(path)
    remedy = "export it again with psgl-export build, or copy it again"
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            text, document, contents = _read(archive, path)
            manifest = _parse(document, path)
            for needed in _needed(manifest):
                if needed not in contents:
                    raise BundleError(f"{path} lacks {needed}: export it again")
    except FileNotFoundError as exc:
        raise BundleError(f"there is no bundle at {path}: make one with psgl-export build") from exc
    except _DAMAGE as exc:
        raise BundleError(f"{path} is not a whole bundle ({_short(exc)}): {remedy}") from exc
    except OSError as exc:
        raise BundleError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    try:
        initial = unpack_tensors(contents[INITIAL])
    except WireError as exc:
        raise BundleError(f"{path}: {INITIAL} is not readable ({exc}): {remedy}") from exc
    for name, array in initial.items():
        if name[:2] not in ("p.", "b.", "s.") or array.dtype != np.float32 or not np.isfinite(array).all():
            raise BundleError(f"{path}: initial tensor {name!r} is not a finite float32 front tensor: {remedy}")
        if manifest.frozen and name[:2] == "s.":
            raise BundleError(f"{path}: a frozen front has an optimizer's {name!r}: {remedy}")
    return Bundle(_bundle_id(text), manifest, {graph: contents[f"{graph}.onnx"] for graph in manifest.graphs}, initial)


def _needed(manifest: Manifest) -> tuple[str, ...]:
    """Files without which a bundle is of no use."""
    return *(f"{graph}.onnx" for graph in manifest.graphs), INITIAL


def _bundle_id(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()[:32]


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


def _read(archive: zipfile.ZipFile, path: Path) -> tuple[bytes, dict[str, Any], dict[str, bytes]]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) != len(archive.infolist()) or len(entries) > _MAX_FILES or MANIFEST not in entries:
        raise BundleError(f"{path} is not a bundle: it needs one {MANIFEST} and at most {_MAX_FILES} files")
    for name, entry in entries.items():
        if entry.compress_type not in _METHODS:
            raise BundleError(f"{path}: {name[:80]!r} is compressed in a way that no bundle is: do not use it")
        if not _NAME.fullmatch(name):
            raise BundleError(f"{path} holds a file with the name {name[:80]!r}, which no bundle has: do not use it")
    text = _unpack(archive, entries[MANIFEST], _MAX_MANIFEST_BYTES, path)
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"{path}: {MANIFEST} is not JSON: export the bundle again") from exc
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise BundleError(f"{path} is not a bundle of this SDK: make one with psgl-export build")
    if document.get("version") != FORMAT_VERSION:
        raise BundleError(
            f"{path} is a bundle of version {_short(repr(document.get('version')))}, this SDK reads version "
            f"{FORMAT_VERSION}: export it again with the psgl-export of this version, or upgrade psgl on this machine"
        )
    files = document.get("files")
    if not isinstance(files, dict) or set(files) != set(entries) - {MANIFEST}:
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


def _parse(document: Mapping[str, Any], path: Path) -> Manifest:
    try:
        manifest = Manifest(
            profile=_text(document["profile"]),
            input_shape=_shape(document["input_shape"]),
            classes=tuple(_text(name) for name in _list(document["classes"])),
            cut_shape=_shape(document["cut_shape"]),
            optimizer=_text(document["optimizer"]),
            learning_rate=_number(document["learning_rate"]),
            normalisation=None if document["normalisation"] is None else _text(document["normalisation"]),
            epsilon=_number(document["epsilon"]),
            perturb_towards=_text(document["perturb_towards"]),
            noise=_number(document["noise"]),
            noise_kind=_one_of(document["noise_kind"], NOISE_KINDS),
            frozen=_flag(document["frozen"]),
            bits=_one_of(document["bits"], (0, *BITS)),
            span=_span(document["span"]),
            bound=_number(document["bound"]),
            max_batch=_count(document["max_batch"]),
            input_range=_range(document.get("input_range")),
            server=_map(document["server"]),
            versions=_map(document["versions"]),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise BundleError(f"{path}: {MANIFEST} is incomplete ({_short(exc)}): export the bundle again") from exc
    if len(manifest.classes) < 2:
        raise BundleError(f"{path}: a bundle needs at least two classes: export it again")
    try:
        _ = manifest.packing
    except ConfigError as exc:
        raise BundleError(f"{path}: activations cannot be packed so ({exc}): export the bundle again") from exc
    return manifest


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is not a text")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list")
    return value


def _map(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a map")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")
    return value


def _one_of(value: object, choices: tuple[_Choice, ...]) -> _Choice:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    raise ValueError(f"{value!r} is none of {choices}")


def _span(value: object) -> tuple[float, float] | None:
    if value is None:
        return None
    low, high = _list(value)
    if type(low) is not float or type(high) is not float:
        raise ValueError(f"{value!r} is not a span")
    return low, high


def _range(value: object) -> tuple[float, float] | None:
    if value is None:
        return None
    numbers = [each for each in _list(value) if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(numbers) != 2 or len(_list(value)) != 2 or not np.isfinite(numbers).all() or numbers[0] >= numbers[1]:
        raise ValueError(f"{value!r} is not a range")
    return float(numbers[0]), float(numbers[1])


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
        raise ValueError(f"{value!r} is not a count")
    return value


def _shape(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= 4:
        raise ValueError(f"{value!r} is not a shape")
    return tuple(_count(size) for size in value)
