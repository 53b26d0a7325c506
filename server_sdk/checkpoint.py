"""Checkpoints: all that a training run needs to go on from one position of its log, each one file and one atomic write.

A checkpoint is a safetensors file ``checkpoint-<position, 12 digits>.safetensors``: tensors under ``tensor.<name>``,
blobs as uint8 under ``blob.<name>``, facts as JSON in the metadata. safetensors has no checksum of its own: the
metadata's ``sha256`` is that of the whole file with this digest's 64 characters as zeros: no changed byte goes unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edge_sdk.errors import ConfigError
from server_sdk.errors import CheckpointError

if TYPE_CHECKING:
    import torch  # takes seconds to import: only who reads or writes tensors waits for it

__all__ = ["Checkpoint", "Checkpoints", "checkpoint_files", "facts_of"]

FORMAT, VERSION = "psgl-checkpoint", "1"
MAX_FACTS_BYTES = 1 << 20

_MAX_HEADER_BYTES = 64 << 20
_MAX_BYTES = 64 << 30
_ZEROS = "0" * 64
_NAME = re.compile(r"checkpoint-(\d{12})\.safetensors")
_PARTIAL = ".partial"
_PART_BYTES = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run at one position of its log.

    Attributes:
        position: every record of the log up to and including this one is in it; 0 to 10^12 - 1.
        tensors: weights, optimizer state and the like, by name; any shape and dtype that safetensors has. They are
            read back on the CPU.
        blobs: bytes by name, such as replies as they were sent.
        facts: JSON with text keys, at most 1 MiB.
    """

    position: int
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    blobs: Mapping[str, bytes] = field(repr=False)
    facts: Mapping[str, Any] = field(repr=False)


class Checkpoints:
    """The folder of a run's checkpoints. One process at a time may write, which the lock of the run's log sees to.

    Args:
        folder: made if it is not there, for its owner alone.
        keep: how many of the newest are kept, at least 1.
        on_note: is told, in one line, what was set aside or could not be deleted.

    Raises:
        CheckpointError: the folder cannot be used.
        ConfigError: ``keep`` below 1.
    """

    def __init__(self, folder: Path, *, keep: int = 2, on_note: Callable[[str], None] = lambda text: None) -> None:
        if keep < 1:
            raise ConfigError(f"keep={keep}: keep at least one checkpoint")
        self._folder = folder
        self._keep = keep
        self._on_note = on_note
        with _disk_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_mode & 0o077:
                folder.chmod(0o700)

    def write(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint and then delete the oldest beyond ``keep``.

        It is on the disk, under its name, when this returns. On any error, and at a crash at any instant, the older
        ones are as they were; what a crash left of an earlier write is removed first.

        Raises:
            CheckpointError: a full, read-only or failing disk; a position before the newest one's; contents that
                safetensors or JSON cannot hold.
        """
        kept = self.positions()
        if not max(kept, default=0) <= checkpoint.position < 10**12:
            raise CheckpointError(
                f"a checkpoint at position {checkpoint.position} cannot follow the one at {max(kept, default=0)} in "
                f"{self._folder}: give each run a folder of its own"
            )
        data = _encode(checkpoint)
        path = self._folder / f"checkpoint-{checkpoint.position:012}.safetensors"
        partial = path.with_name(path.name + _PARTIAL)
        with _disk_errors(self._folder):
            for leftover in self._folder.glob(f"checkpoint-*{_PARTIAL}"):
                leftover.unlink()
            try:
                _write_synced(partial, data)
                partial.replace(path)
                _sync_folder(self._folder)
            except OSError:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise
        for old, position in checkpoint_files(self._folder)[: -self._keep]:
            try:
                old.unlink()
            except OSError as exc:
                self._on_note(f"the old checkpoint {position} cannot be deleted: {exc.strerror or exc}")
        return path

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that can be read; None if there is none.

        A damaged one is renamed to ``<name>.damaged`` and said by ``on_note``.

        Raises:
            CheckpointError: the newest undamaged one has a format or version that this SDK does not read, or the disk
                cannot be read.
        """
        with _disk_errors(self._folder):
            for path, position in reversed(checkpoint_files(self._folder)):
                try:
                    return _read(path, position)
                except _DamagedError as exc:
                    aside = path.with_name(path.name + ".damaged")
                    path.replace(aside)
                    self._on_note(f"{path} is damaged ({exc}): it is set aside as {aside.name}")
        return None

    def positions(self) -> tuple[int, ...]:
        """Positions of all that are kept, ascending.

        Raises:
            CheckpointError: the folder cannot be read.
        """
        return tuple(position for _, position in checkpoint_files(self._folder))


def checkpoint_files(folder: Path) -> list[tuple[Path, int]]:
    """(path, position) of each checkpoint of a folder by name, ascending; nothing is opened.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    with _disk_errors(folder):
        matches = ((path, _NAME.fullmatch(path.name)) for path in folder.iterdir())
        return sorted(((path, int(match[1])) for path, match in matches if match), key=lambda file: file[1])


def facts_of(path: Path) -> Mapping[str, Any]:
    """The facts of one checkpoint, after its whole file was checked; loads no tensor and no torch.

    Raises:
        CheckpointError: it cannot be read, is damaged, or of another format or version.
    """
    match = _NAME.fullmatch(path.name)
    with _disk_errors(path), path.open("rb") as file:
        try:
            return _check(file, int(match[1]) if match else -1)
        except _DamagedError as exc:
            raise CheckpointError(f"{path} is damaged ({exc}): use another checkpoint") from exc


class _DamagedError(Exception):
    """What was found wrong with a file."""


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise CheckpointError(
            f"{path} cannot be used for checkpoints: {exc.strerror or exc}: free space on its disk or make it writable"
        ) from exc


def _encode(checkpoint: Checkpoint) -> bytearray:
    import safetensors.torch
    import torch

    facts = _facts_text(checkpoint.facts)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "position": str(checkpoint.position),
        "facts": facts,
        "sha256": _ZEROS,
    }
    tensors = {}
    storages: set[int] = set()
    try:
        for name, tensor in checkpoint.tensors.items():
            dense = tensor.detach().to("cpu").contiguous()
            storage = dense.untyped_storage().data_ptr()
            # safetensors refuses tensors that share memory: tied weights are written twice
            tensors[f"tensor.{name}"] = dense.clone() if storage in storages else dense
            storages.add(storage)
        for name, blob in checkpoint.blobs.items():
            # frombuffer takes no empty buffer, and warns of a read-only one
            kept = torch.frombuffer(bytearray(blob), dtype=torch.uint8) if blob else torch.empty(0, dtype=torch.uint8)
            tensors[f"blob.{name}"] = kept
        data = bytearray(safetensors.torch.save(tensors, metadata))
    except (ValueError, TypeError, RuntimeError, KeyError, safetensors.SafetensorError) as exc:
        detail = " ".join(str(exc).split())[:200]
        raise CheckpointError(f"the checkpoint at position {checkpoint.position} cannot be encoded: {detail}") from exc
    (header_bytes,) = struct.unpack_from("<Q", data)
    at = data.index(_digest_text(_ZEROS), 8, 8 + header_bytes) + len('"sha256":"')
    data[at : at + 64] = hashlib.sha256(data).hexdigest().encode()
    return data


def _facts_text(facts: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(dict(facts), allow_nan=False)
        same = json.loads(text) == facts
    except (ValueError, TypeError, RecursionError) as exc:
        raise CheckpointError(f"the facts of a checkpoint must be JSON: {exc}") from exc
    if not same:
        raise CheckpointError("the facts of a checkpoint must be JSON: text keys, lists instead of tuples")
    if len(text) > MAX_FACTS_BYTES:
        raise CheckpointError(f"the facts of a checkpoint have {len(text)} bytes: put what is large into a blob")
    return text


def _digest_text(digest: str) -> bytes:
    # Inside a JSON string the quotes would stand behind backslashes: this occurs as a key of the metadata alone.
    return f'"sha256":"{digest}"'.encode()


def _write_synced(path: Path, data: bytearray) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _check(file: BinaryIO, position: int) -> Mapping[str, Any]:
    """Facts of an open checkpoint whose digest is right; every size is compared with the file's before it is used.

    Raises:
        _DamagedError: it is not what was written.
        CheckpointError: it is, by another SDK.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    header_bytes = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= header_bytes <= min(size - 8, _MAX_HEADER_BYTES) or size > _MAX_BYTES:
        raise _DamagedError(f"{size} bytes with a header of {header_bytes}")
    header = file.read(header_bytes)
    try:
        metadata = json.loads(header)["__metadata__"]
        digest = metadata["sha256"]
        marked = _digest_text(digest)
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise _DamagedError("no header of a checkpoint") from exc
    check = hashlib.sha256(start + header.replace(marked, _digest_text(_ZEROS)))
    while part := file.read(_PART_BYTES):
        check.update(part)
    if check.hexdigest() != digest:
        raise _DamagedError("it does not match its checksum")
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{file.name} is of format {metadata.get('format')!r} version {metadata.get('version')!r}, this SDK reads "
            f"{FORMAT!r} version {VERSION}: use the SDK that wrote it"
        )
    if metadata.get("position") != str(position):
        raise _DamagedError(f"it is of position {metadata.get('position')}, its name is not")
    facts: dict[str, Any] = json.loads(metadata["facts"])
    return facts


def _read(path: Path, position: int) -> Checkpoint:
    import safetensors.torch

    with path.open("rb") as file:
        facts = _check(file, position)
        file.seek(0)
        everything = safetensors.torch.load(file.read())
    tensors = {name.removeprefix("tensor."): each for name, each in everything.items() if name.startswith("tensor.")}
    blobs = {
        name.removeprefix("blob."): each.numpy().tobytes()
        for name, each in everything.items()
        if name.startswith("blob.")
    }
    return Checkpoint(position, tensors, blobs, facts)
