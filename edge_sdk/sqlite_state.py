"""The device's durable state: three records (identity, front, progress) and one row for each step in flight.

Each method that changes something is one transaction, so after kill -9 the file holds what the last commit held.
``progress`` is part of every commit and has the CRC-32 of the front and of the whole outbox: pages of different
commits that damage brought together are found at the next start, and no step is sent or trained from them.

What is patient data (frames, batches and labels in the outbox) is sealed when a key is given. Without a key it stands
there in plain, and freed pages keep the batches of finished steps until later steps overwrite them: SQLite's
``secure_delete`` would about double the cost of a step and reach neither the write-ahead log nor the retired blocks of
a flash memory, so it is off. The key is the protection. The front's parameters are never sealed.
"""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edge_sdk import cbor
from edge_sdk.codec import pack_tensors, unpack_tensors
from edge_sdk.errors import ConfigError, StateError, WireError
from edge_sdk.front import FrontState
from edge_sdk.limits import DEFAULT_LIMITS
from edge_sdk.noise import KEY_BYTES
from edge_sdk.sealing import Sealer
from edge_sdk.state import OutboxLimits, OutboxStep, device_counters, room_for
from edge_sdk.state_file import DamagedError, StateFile, Statement, record, record_map

__all__ = ["SqliteState", "forget"]

_RESERVED_STEPS = 256
_SYNCHRONOUS = ("off", "normal", "full")
_KEY_CHECK = b"psgl state"


@dataclass(frozen=True)
class _Progress:
    """The record that every commit writes: what is small, and the checksums of what is large."""

    run: str = ""
    version: int = 0
    reserved: int = 0
    front_crc: int = 0
    outbox_crc: int = 0  # sum over the rows, modulo 2^32
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Row:
    position: int
    crc: int
    step: OutboxStep


class SqliteState:
    """``State`` across all lives of the device's process. Use it from one thread at a time.

    Outbox and front are kept in memory too, so that reading them costs nothing. With ``synchronous="normal"`` a write
    costs one transaction without fsync: what was committed outlives kill -9; after a power cut the last commits may
    be missing, but no step number is drawn again. ``"full"`` keeps every commit across a power cut; ``"off"`` leaves
    it to the operating system what reaches the disk and when.

    Args:
        path: the database; its folder is created. ``<path>.lock`` and ``<path>-wal`` stand beside it while it is open.
        front: the front to start from; used only where the database is new.
        bundle: id of the bundle that the front belongs to.
        fleet: the device's fleet.
        device: the device's name.
        related: ids of bundles whose state goes over to ``bundle`` when it is opened, as by ``change_bundle``: a device
            may have stopped between its store's change and its state's.
        limits: of the outbox; not stored.
        key: 32 bytes that seal the outbox (see ``sealing.load_key``). Rows that stand there in plain are sealed now
            and the file is written anew, so that it holds no trace of them.
        synchronous: SQLite's setting: ``off``, ``normal`` or ``full``.
        on_note: called with one sentence when a damaged or empty file gave way to a new state, or a state went over to
            ``bundle``.

    Raises:
        StateError: another process uses the database; it belongs to another bundle, fleet or device, is of a newer
            psgl or of another program; it is sealed and the key is missing or wrong; the disk is full or read-only.
        ConfigError: an unknown ``synchronous``, a key of another length, or no ``cryptography`` package.
    """

    def __init__(
        self,
        path: Path | str,
        front: FrontState,
        *,
        bundle: str,
        fleet: str,
        device: str,
        related: Collection[str] = (),
        limits: OutboxLimits | None = None,
        key: bytes | None = None,
        synchronous: Literal["off", "normal", "full"] = "normal",
        on_note: Callable[[str], None],
    ) -> None:
        if synchronous not in _SYNCHRONOUS:
            raise ConfigError(f"synchronous is {synchronous!r}: use {', '.join(_SYNCHRONOUS)}")
        self._limits = limits or OutboxLimits()
        self._sealer = None if key is None else Sealer(key)
        self._identity: dict[str, Any] = {}
        self._noise_key = b""
        self._front = front
        self._rows: dict[int, _Row] = {}
        self._sizes: dict[int, int] = {}
        self._progress = _Progress()
        self._step = 0
        owner = {"bundle": bundle, "fleet": fleet, "device": device}
        self._file = StateFile(Path(path))
        try:
            self._open(owner, related, synchronous, on_note)
        except BaseException:
            self.close()
            raise

    @property
    def limits(self) -> OutboxLimits:
        """Bounds of the outbox."""
        return self._limits

    @property
    def session(self) -> str:
        """16 hexadecimal digits: one life of this database."""
        return str(self._identity["session"])

    @property
    def noise_key(self) -> bytes:
        """32 secret bytes, sealed like the outbox. See ``State.noise_key``."""
        return self._noise_key

    @property
    def run(self) -> str:
        """Id of the training run, empty before the first."""
        return self._progress.run

    @property
    def front(self) -> FrontState:
        """The front as of the last finished step."""
        return self._front

    @property
    def outbox(self) -> tuple[OutboxStep, ...]:
        """The steps in flight, oldest first."""
        return tuple(row.step for row in self._rows.values())

    @property
    def counters(self) -> Mapping[str, int]:
        """The client's numbers as of the last commit."""
        return dict(self._progress.counters)

    def begin_run(self, run: str, front: FrontState) -> tuple[int, ...]:
        """Start over for a run, in one transaction. See ``State.begin_run``."""
        return self._start_over(run, front)

    def change_bundle(self, bundle: str, front: FrontState) -> tuple[int, ...]:
        """Go over to another bundle, in one transaction. See ``State.change_bundle``."""
        identity = {**self._identity, "bundle": bundle}
        dropped = self._start_over("", front, self._record_of_identity(identity))
        self._identity = identity
        return dropped

    def _start_over(self, run: str, front: FrontState, *further: Statement) -> tuple[int, ...]:
        dropped = tuple(self._rows)
        packed = _pack_front(front)
        kept = device_counters(self._progress.counters)
        progress = replace(self._progress, run=run, outbox_crc=0, counters=kept)
        progress = replace(progress, version=front.version, front_crc=zlib.crc32(packed))
        self._file.commit(("DELETE FROM outbox", ()), record("front", packed), _record_of(progress), *further)
        self._progress, self._front = progress, front
        self._rows.clear()
        self._sizes.clear()
        return dropped

    def note(self, counters: Mapping[str, int]) -> None:
        """Set these counters, in a transaction of their own. See ``State.note``."""
        progress = replace(self._progress, counters=self._progress.counters | _whole_numbers(counters))
        self._file.commit(_record_of(progress))
        self._progress = progress

    def next_step(self) -> int:
        """Draw the next step number, from 1; numbers are reserved 256 at a time, and a restart skips what is left."""
        if self._step >= self._progress.reserved:
            progress = replace(self._progress, reserved=self._progress.reserved + _RESERVED_STEPS)
            self._file.commit(_record_of(progress))
            self._file.checkpoint()  # out of the log, which a power cut or damage may shorten
            self._progress = progress
        self._step += 1
        return self._step

    def begin(self, step: OutboxStep, counters: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """Put a step into the outbox, in one transaction. See ``State.begin``."""
        if step.step in self._rows:
            raise ConfigError(f"step {step.step} is in flight: draw a new number")
        dropped = room_for(step, self._sizes, self._limits)
        after = self._progress.counters | _whole_numbers(counters)
        if dropped:
            after["dropped"] = after.get("dropped", 0) + len(dropped)
        payload = self._seal(step.step, _pack_step(step))
        position = max((row.position for row in self._rows.values()), default=0) + 1
        crc = _row_crc(position, step.step, step.kind, payload, sealed=self._sealer is not None)
        gone = [self._rows[number] for number in dropped]
        total = (self._progress.outbox_crc + crc - sum(row.crc for row in gone)) % 2**32
        progress = replace(self._progress, outbox_crc=total, counters=after)
        self._file.commit(
            *(_deletion_of(row) for row in gone),
            (
                "INSERT INTO outbox (position, step, kind, crc, payload) VALUES (?, ?, ?, ?, ?)",
                (position, step.step, step.kind, crc, payload),
            ),
            _record_of(progress),
        )
        self._forget_rows(dropped)
        self._keep_row(_Row(position, crc, step))
        self._progress = progress
        return dropped

    def finish(self, step: int, front: FrontState | None = None, counters: Mapping[str, int] | None = None) -> None:
        """Remove a step and take over its front and counters, in one transaction. See ``State.finish``."""
        row = self._rows.get(step)
        if row is None:
            raise ConfigError(f"step {step} is not in flight")
        progress = replace(
            self._progress,
            outbox_crc=(self._progress.outbox_crc - row.crc) % 2**32,
            counters=self._progress.counters | _whole_numbers(counters),
        )
        statements = [_deletion_of(row)]
        if front is not None:
            packed = _pack_front(front)
            statements.append(record("front", packed))
            progress = replace(progress, version=front.version, front_crc=zlib.crc32(packed))
        self._file.commit(*statements, _record_of(progress))
        self._forget_rows((step,))
        self._progress, self._front = progress, front or self._front

    def close(self) -> None:
        """Write the log into the database and let another process have it; may be called again."""
        self._file.close()

    def _open(
        self, owner: Mapping[str, str], related: Collection[str], synchronous: str, on_note: Callable[[str], None]
    ) -> None:
        path, initial = self._file.path, self._front
        try:
            if self._file.open(synchronous):
                with self._file.reading():
                    self._load(owner, related)
                if (before := self._identity["bundle"]) != owner["bundle"]:
                    self.change_bundle(owner["bundle"], initial)
                    on_note(
                        f"the state {path} was of bundle {before}: it goes on with {owner['bundle']} from its front"
                    )
                return
            if path.exists():
                on_note(f"the state {path} was empty: a new one is begun")
        except DamagedError as exc:
            kept = self._file.set_aside()
            on_note(f"the state {path} was damaged ({exc}): it is kept as {kept}, a new one is begun")
        packed = _pack_front(self._front)
        progress = _Progress(version=self._front.version, front_crc=zlib.crc32(packed))
        self._noise_key = secrets.token_bytes(KEY_BYTES)
        identity = {**owner, "session": secrets.token_hex(8), "scrubbed": True}
        written = self._record_of_identity(identity)
        self._file.create(synchronous, written, record("front", packed), _record_of(progress))
        self._identity, self._progress = identity, progress

    def _load(self, owner: Mapping[str, str], related: Collection[str]) -> None:
        identity = self._file.get_map("identity")
        self._check_owner(identity, owner, related)
        self._check_key(identity)
        session, sealed = identity["session"], bool(identity["key_check"])
        progress = _Progress(**self._file.get_map("progress"))
        packed = self._file.get("front")
        front = FrontState(progress.version, unpack_tensors(packed))
        query = "SELECT position, step, kind, crc, payload FROM outbox ORDER BY position"
        rows = [self._read_row(session, values, sealed=sealed) for values in self._file.connection.execute(query)]
        total = sum(row.crc for row in rows) % 2**32
        if (zlib.crc32(packed), total) != (progress.front_crc, progress.outbox_crc):
            raise DamagedError("parts of different commits")
        self._noise_key = self._read_noise_key(session, identity["noise_key"], sealed=sealed)
        self._identity, self._front, self._progress, self._step = identity, front, progress, progress.reserved
        for row in rows:
            self._keep_row(row)
        if self._sealer is not None and not sealed:
            self._identity["scrubbed"] = False
            self._seal_all()
        if self._sealer is not None and not self._identity["scrubbed"]:
            self._file.rewrite()
            self._identity["scrubbed"] = True
            self._file.commit(self._record_of_identity(self._identity))

    def _check_owner(self, identity: Mapping[str, Any], owner: Mapping[str, str], related: Collection[str]) -> None:
        for name, wanted in owner.items():
            if identity[name] != wanted and not (name == "bundle" and identity[name] in related):
                raise StateError(
                    f"the state {self._file.path} belongs to {name} {identity[name]!r}, not to {wanted!r}: "
                    "give another file, or start afresh with --fresh"
                )

    def _check_key(self, identity: Mapping[str, Any]) -> None:
        if not identity["key_check"]:
            return
        remedy = "give the key it was sealed with, or start afresh with --fresh and lose the steps in flight"
        if self._sealer is None:
            raise StateError(f"the state {self._file.path} is sealed and no key is configured: {remedy}")
        try:
            self._sealer.open(identity["key_check"], _about(identity["session"], "identity"))
        except StateError as exc:
            raise StateError(f"the state {self._file.path} is sealed with another key: {remedy}") from exc

    def _read_noise_key(self, session: str, kept: bytes, *, sealed: bool) -> bytes:
        if sealed and self._sealer is not None:
            try:
                kept = self._sealer.open(kept, _about(session, "noise"))
            except StateError as exc:
                raise DamagedError("seal of the noise key") from exc
        if len(kept) != KEY_BYTES:
            raise DamagedError("length of the noise key")
        return kept

    def _read_row(self, session: str, values: tuple[Any, ...], *, sealed: bool) -> _Row:
        position, step, kind, crc, payload = values
        if not isinstance(payload, bytes) or crc != _row_crc(position, step, kind, payload, sealed=sealed):
            raise DamagedError(f"checksum of step {step}")
        if sealed and self._sealer is not None:
            try:
                payload = self._sealer.open(payload, _about(session, step))
            except StateError as exc:
                raise DamagedError(f"seal of step {step}") from exc
        return _Row(position, crc, _unpack_step(step, kind, payload))

    def _keep_row(self, row: _Row) -> None:
        self._rows[row.step.step] = row
        self._sizes[row.step.step] = row.step.size

    def _forget_rows(self, steps: tuple[int, ...]) -> None:
        for step in steps:
            del self._rows[step], self._sizes[step]

    def _record_of_identity(self, identity: Mapping[str, Any]) -> Statement:
        check, noise_key = b"", self._noise_key
        if self._sealer is not None:
            check = self._sealer.seal(_KEY_CHECK, _about(identity["session"], "identity"))
            noise_key = self._sealer.seal(noise_key, _about(identity["session"], "noise"))
        return record_map("identity", {**identity, "key_check": check, "noise_key": noise_key})

    def _seal(self, step: int, payload: bytes) -> bytes:
        return payload if self._sealer is None else self._sealer.seal(payload, _about(self.session, step))

    def _seal_all(self) -> None:
        """Seal the rows that stand there in plain; what freed pages keep of them is left to ``rewrite``."""
        statements = []
        for number, row in self._rows.items():
            payload = self._seal(number, _pack_step(row.step))
            crc = _row_crc(row.position, number, row.step.kind, payload, sealed=True)
            values = (crc, payload, row.position)
            statements.append(("UPDATE outbox SET crc = ?, payload = ? WHERE position = ?", values))
            self._rows[number] = replace(row, crc=crc)
        self._progress = replace(self._progress, outbox_crc=sum(row.crc for row in self._rows.values()) % 2**32)
        self._file.commit(*statements, self._record_of_identity(self._identity), _record_of(self._progress))


def forget(path: Path | str) -> None:
    """Remove a database with its side files, for a fresh start; what was set aside as damaged stays.

    Raises:
        StateError: a process uses it, or the folder cannot be written.
    """
    path = Path(path)
    if not path.parent.exists():
        return
    file = StateFile(path)
    try:
        file.remove()
    finally:
        file.close()


def _record_of(progress: _Progress) -> Statement:
    return record_map("progress", vars(progress))


def _deletion_of(row: _Row) -> Statement:
    return "DELETE FROM outbox WHERE position = ?", (row.position,)


def _about(session: str, what: int | str) -> bytes:
    return f"{session}|{what}".encode()


def _row_crc(position: int, step: int, kind: str, payload: bytes, *, sealed: bool) -> int:
    """CRC-32 of a row; of a sealed payload only nonce and tag, because the tag authenticates the rest."""
    head = zlib.crc32(f"{position}|{step}|{kind}|{len(payload)}|".encode())
    return zlib.crc32(payload[-16:], zlib.crc32(payload[:12], head)) if sealed else zlib.crc32(payload, head)


def _whole_numbers(counters: Mapping[str, int] | None) -> dict[str, int]:
    for name, value in (counters or {}).items():
        if not isinstance(value, int | np.integer) or not -(2**63) <= value < 2**63:
            raise ConfigError(f"counter {name!r} is {value!r}: a counter is a whole number of 64 bits")
    return {name: int(value) for name, value in (counters or {}).items()}


def _pack_front(front: FrontState) -> bytes:
    try:
        return pack_tensors(front.tensors)
    except WireError as exc:
        raise StateError(f"this front cannot be kept: {exc}") from exc


def _pack_step(step: OutboxStep) -> bytes:
    """Length of the header (4 bytes, little endian), header as CBOR, frames, batch, labels."""
    arrays = (step.x, step.label)
    header = cbor.dumps(
        {
            "frames": [len(frame) for frame in step.frames],
            "arrays": [None if array is None else list(array.shape) for array in arrays],
        }
    )
    given = [
        np.ascontiguousarray(array, dtype)
        for array, dtype in zip(arrays, ("<f4", "<i8"), strict=True)
        if array is not None
    ]
    return b"".join((len(header).to_bytes(4, "little"), header, *step.frames, *(array.data for array in given)))


def _unpack_step(step: int, kind: str, payload: bytes) -> OutboxStep:
    position = 4 + int.from_bytes(payload[:4], "little")
    header: Any = cbor.loads(payload[4:position], DEFAULT_LIMITS)
    frames = []
    for size in header["frames"]:
        frames.append(payload[position : position + size])
        position += size
    arrays: list[npt.NDArray[Any] | None] = []
    for shape, dtype in zip(header["arrays"], ("<f4", "<i8"), strict=True):
        if shape is None:
            arrays.append(None)
            continue
        view = np.ndarray(shape, dtype, payload, position)
        arrays.append(view.astype(view.dtype.newbyteorder("=")))  # a copy: the payload's bytes need not be aligned
        position += view.nbytes
    return OutboxStep(step, kind, tuple(frames), *arrays)
