"""The file under the device's durable state: a SQLite database in WAL mode (https://www.sqlite.org/wal.html).

It is held by one process at a time and readable by its owner alone. SQLite checks the structure of its pages, not
their content, so every value that is kept here comes with a CRC-32. This file knows nothing of steps and fronts.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edge_sdk import cbor
from edge_sdk.errors import StateError, WireError
from edge_sdk.limits import DEFAULT_LIMITS

__all__ = ["SCHEMA_VERSION", "DamagedError", "StateFile", "Statement", "record", "record_map"]

SCHEMA_VERSION = 2

Statement = tuple[str, tuple[Any, ...]]

_APPLICATION_ID = 0x5053474C  # "PSGL"
_FORMATS = (b"\1\1", b"\2\2")  # of writing and reading (bytes 18, 19): SQLite only reads what it does not know
_SIDE_FILES = ("-wal", "-shm", "-journal")

_PAGE_BYTES = 16384  # a batch takes few pages, a small commit few bytes
_WAL_BYTES = 16 << 20  # of log before its pages go into the database: many steps share the fsyncs of that
_SETTINGS = (
    f"page_size = {_PAGE_BYTES}",
    "locking_mode = EXCLUSIVE",
    "journal_mode = WAL",
    f"wal_autocheckpoint = {_WAL_BYTES // _PAGE_BYTES}",
    f"journal_size_limit = {_WAL_BYTES}",
    "cache_size = -8192",
    "secure_delete = OFF",
)
_SCHEMA = (
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
    "CREATE TABLE record (name TEXT PRIMARY KEY, crc INTEGER NOT NULL, value BLOB NOT NULL)",
    "CREATE TABLE outbox (position INTEGER PRIMARY KEY, step INTEGER NOT NULL, kind TEXT NOT NULL,"
    " crc INTEGER NOT NULL, payload BLOB NOT NULL)",
)

# What says nothing about the file's content; anything else that SQLite raises while it reads the file is damage.
_UNWRITABLE = "it cannot be written: make the file and its folder writable"
_HELD = "another program has it open: stop that one"
_REMEDIES = {
    sqlite3.SQLITE_FULL: "the disk is full: free some space",
    sqlite3.SQLITE_IOERR: "the disk reports an error: check it and its free space",
    sqlite3.SQLITE_READONLY: _UNWRITABLE,
    sqlite3.SQLITE_CANTOPEN: _UNWRITABLE,
    sqlite3.SQLITE_PERM: _UNWRITABLE,
    sqlite3.SQLITE_BUSY: _HELD,
    sqlite3.SQLITE_LOCKED: _HELD,
    sqlite3.SQLITE_PROTOCOL: _HELD,
}


class DamagedError(Exception):
    """The file's content cannot be trusted; whoever loads the file sets it aside."""


class StateFile:
    """One database file, held by this process from the beginning until ``close``.

    Args:
        path: the database; its folder is created. ``<path>.lock`` and ``<path>-wal`` stand beside it while it is held.

    Raises:
        StateError: another process holds it, or the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db: sqlite3.Connection | None = None
        self._lock: int | None = None
        with self.errors():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _lock(path)

    def open(self, synchronous: str) -> bool:
        """Open what is there and check its structure.

        Args:
            synchronous: SQLite's setting: ``off``, ``normal`` or ``full``.

        Returns:
            False where there is nothing yet: no file, or one without a table.

        Raises:
            DamagedError: SQLite cannot read it, or its pages contradict each other.
            StateError: it is of another version of psgl or of another program; the disk is full or read-only.
        """
        if not self.path.exists():
            return False
        with self.reading():
            with self.path.open("rb") as stream:  # before SQLite opens it: closing any other descriptor ends its locks
                formats = stream.read(20)[18:]
            if formats not in (b"", *_FORMATS):
                raise DamagedError("unknown format in its header")
            db = self._connect(synchronous)
            (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise DamagedError(" ".join(verdict.split()))
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                return False
            (application,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION_ID:
            raise StateError(f"{self.path} is the database of another program: give the state a file of its own")
        if version != SCHEMA_VERSION:
            remedy = "upgrade psgl" if version > SCHEMA_VERSION else "go on with the psgl that wrote it"
            raise StateError(
                f"the state {self.path} has version {version}, this psgl knows {SCHEMA_VERSION}: {remedy}, "
                "or start afresh with --fresh"
            )
        return True

    def create(self, synchronous: str, *statements: Statement) -> None:
        """Make the file where there is none, open it, and make the tables together with the first records.

        Raises:
            StateError: the disk is full or read-only.
        """
        self._disconnect()
        with self.errors():
            os.close(os.open(self.path, os.O_CREAT, 0o600))  # SQLite gives its side files this mode
            self._connect(synchronous)
        self.commit(*((statement, ()) for statement in _SCHEMA), *statements)

    @property
    def connection(self) -> sqlite3.Connection:
        """The only connection.

        Raises:
            StateError: the file is closed.
        """
        if self._db is None:
            raise StateError(f"the state {self.path} is closed: open it again")
        return self._db

    def commit(self, *statements: Statement) -> None:
        """Execute all of them in one transaction, or none.

        On a full disk the log's room is used once more before giving up: what it holds goes into the database.

        Raises:
            StateError: the disk is full, read-only or damaged; nothing has changed then.
        """
        db = self.connection
        with self.errors():
            try:
                _commit(db, statements)
            except sqlite3.Error as exc:
                if _code(exc) != sqlite3.SQLITE_FULL:
                    raise
                with suppress(sqlite3.Error):
                    db.execute("PRAGMA wal_checkpoint")
                _commit(db, statements)

    def get(self, name: str) -> bytes:
        """Read one record.

        Raises:
            DamagedError: it is missing or its checksum is wrong.
        """
        found = self.connection.execute("SELECT crc, value FROM record WHERE name = ?", (name,)).fetchone()
        if found is None or not isinstance(found[1], bytes) or found[0] != zlib.crc32(found[1]):
            raise DamagedError(f"checksum of {name}")
        return bytes(found[1])

    def get_map(self, name: str) -> dict[str, Any]:
        """Read one record of plain data.

        Raises:
            DamagedError: it is missing or its checksum is wrong.
        """
        content = cbor.loads(self.get(name), DEFAULT_LIMITS)
        if not isinstance(content, dict):
            raise DamagedError(f"{name} is no map")
        return content

    def checkpoint(self) -> None:
        """Write the log's pages into the database and empty the log: nothing that happens to a log undoes them.

        Raises:
            StateError: the disk is full, read-only or damaged.
        """
        with self.errors():
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def rewrite(self) -> None:
        """Write database and log anew, so that neither keeps what was deleted or overwritten.

        Raises:
            StateError: the disk is full, read-only or damaged.
        """
        with self.errors():
            self.connection.execute("VACUUM")
        self.checkpoint()

    def set_aside(self) -> Path:
        """Close a damaged file and rename it and its side files to ``<path>.damaged-<n>``.

        Returns:
            The database's new path.

        Raises:
            StateError: the folder cannot be written.
        """
        self._disconnect()
        number = 1
        while (kept := self._beside(f".damaged-{number}")).exists():
            number += 1
        with self.errors():
            self.path.rename(kept)
            for side in _SIDE_FILES:
                with suppress(FileNotFoundError):
                    self._beside(side).rename(kept.with_name(kept.name + side))
        return kept

    def remove(self) -> None:
        """Remove the file and its side files.

        Raises:
            StateError: the folder cannot be written.
        """
        self._disconnect()
        with self.errors():
            for side in ("", *_SIDE_FILES):
                self._beside(side).unlink(missing_ok=True)

    def close(self) -> None:
        """Write the log into the database and let another process have the file; may be called again."""
        self._disconnect()
        if self._lock is not None:
            lock, self._lock = self._lock, None
            with suppress(OSError):
                self._beside(".lock").unlink(missing_ok=True)
            os.close(lock)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Tell damage from a bad disk while the content is read.

        Raises:
            DamagedError: what SQLite or CBOR raised comes from the content.
            StateError: the disk is full or read-only, or another program has the file open.
        """
        with self.errors():
            try:
                yield
            except sqlite3.Error as exc:
                if _code(exc) in _REMEDIES:
                    raise
                raise DamagedError(str(exc)) from exc
            except WireError as exc:
                raise DamagedError(str(exc)) from exc

    @contextmanager
    def errors(self) -> Iterator[None]:
        """The boundary: what SQLite and the operating system raise becomes a StateError that says what to do.

        Raises:
            StateError: in place of ``sqlite3.Error`` and ``OSError``.
        """
        try:
            yield
        except BlockingIOError as exc:
            raise StateError(
                f"the state {self.path} is in use by another process: stop that one, or give each device its own file"
            ) from exc
        except OSError as exc:
            raise StateError(f"the state {self.path} ({exc.strerror or exc}): {_UNWRITABLE}") from exc
        except sqlite3.Error as exc:
            remedy = _REMEDIES.get(_code(exc), f"it is damaged ({exc}): restart, and it is set aside")
            raise StateError(f"the state {self.path} was not changed, {remedy}") from exc

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def _connect(self, synchronous: str) -> sqlite3.Connection:
        for path in (self.path, self._beside("-wal")):
            with suppress(FileNotFoundError):
                path.chmod(0o600)
        self._db = sqlite3.connect(self.path, isolation_level=None, timeout=0, check_same_thread=False)
        for setting in (*_SETTINGS, f"synchronous = {synchronous}"):
            self._db.execute(f"PRAGMA {setting}")
        return self._db

    def _disconnect(self) -> None:
        if self._db is not None:
            db, self._db = self._db, None
            with suppress(sqlite3.Error):
                db.close()


def record(name: str, value: bytes) -> Statement:
    """The statement that writes one record."""
    return (
        "INSERT INTO record (name, crc, value) VALUES (?, ?, ?)"
        " ON CONFLICT (name) DO UPDATE SET crc = excluded.crc, value = excluded.value",
        (name, zlib.crc32(value), value),
    )


def record_map(name: str, content: Mapping[str, object]) -> Statement:
    """The statement that writes one record of plain data, as CBOR."""
    return record(name, cbor.dumps(content))


def _commit(db: sqlite3.Connection, statements: tuple[Statement, ...]) -> None:
    try:
        db.execute("BEGIN IMMEDIATE")
        for sql, values in statements:
            db.execute(sql, values)
        db.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            if db.in_transaction:
                db.execute("ROLLBACK")
        raise


def _code(exc: Exception) -> int:
    return int(getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF  # the extended code's lowest byte


def _lock(path: Path) -> int:
    """Hold ``<path>.lock`` alone; the operating system gives it free when the process ends, however it ends."""
    beside = path.with_name(path.name + ".lock")
    while True:
        lock = os.open(beside, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), beside.stat()):
                return lock
        except FileNotFoundError:
            pass  # its last owner has just removed it
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
