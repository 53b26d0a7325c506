"""The write-ahead log: every message and every decision of the server, appended before it takes effect.

``server_sdk/segments.py`` says how it lies on the disk; this file writes it.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_sdk.errors import ConfigError
from server_sdk.errors import LogError
from server_sdk.segments import (
    MAX_RECORD_BYTES,
    Damage,
    Place,
    Record,
    Segment,
    disk_errors,
    encode,
    read_segment,
    read_segments,
    scan,
    segments_of,
)

__all__ = ["Damage", "Log", "Place", "Record", "remove", "scan"]


class Log:
    """The log as its one writer holds it. Opening cuts off a torn end and goes on behind the last whole record.

    All methods may be called from any thread. Folder and files are for their owner alone (modes 0700 and 0600).

    Args:
        folder: made if it is not there.
        sync: what a power loss may take; the kill of the process takes no appended record under any of them.
            ``never``: whatever the system has not written yet, commonly the last 30 s. A number: group commit, a
            background fdatasync at most every so many milliseconds, so the appends of that time and of one
            fdatasync. ``always``: nothing, ``append`` waits for the disk. ``checkpoint``: all since ``flush``.
        begin: every record before this position is in a checkpoint. A log that ends before it (an empty folder, or
            a power loss took its end) goes on at this position.
        max_record_bytes: largest payload that is written or read.
        on_note: is told, in one line, what was repaired, and that the background fdatasync failed.

    Raises:
        LogError: the folder cannot be used, is open in another process, or is damaged elsewhere than at its end.
            Opening reads the last segment alone; the others show their damage when they are read.
        ConfigError: an unknown ``sync``, or a number out of range.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sync: str | float = "never",
        begin: int = 1,
        max_record_bytes: int = MAX_RECORD_BYTES,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        if begin < 1 or not 1 <= max_record_bytes < 1 << 32:
            raise ConfigError(f"begin={begin}, max_record_bytes={max_record_bytes}: use 1 or more, below 4 GiB")
        self._folder = folder
        self._policy = sync
        self._interval_s = _interval_s(sync)
        self._max_record_bytes = max_record_bytes
        self._on_note = on_note
        self._guard = threading.Condition()
        self._segments: list[Segment] = []  # the last one's size stands in _end
        self._end = (begin, 0)  # the next record's position, bytes of the current segment; changes in one assignment
        self._unfinished = False  # an append may have left bytes behind the last whole record
        self._unsynced = True
        self._entry_unsynced = True
        self._sync_failed = ""
        self._stop = threading.Event()
        self._file = -1
        with disk_errors(folder):
            self._folder_file, self._lock_file = _locked(folder)
        try:
            with disk_errors(folder):
                self._open(begin)
            if sync != "never":
                self._flush()
        except BaseException:
            self._release()
            raise
        self._syncer: threading.Thread | None = None
        if self._interval_s:
            self._syncer = threading.Thread(target=self._sync_in_background, name="log-sync", daemon=True)
            self._syncer.start()

    def _open(self, begin: int) -> None:
        self._segments = segments_of(self._folder)
        if not self._segments:
            self._create(begin)
            return
        current = self._segments[-1]
        position, size = current.first, 0
        for item in read_segment(current, current.first, self._max_record_bytes, last=True):
            if isinstance(item, Damage):
                if not item.torn:
                    raise _damaged(item)
                self._on_note(f"{item}: it was never written whole, its {current.size - size} bytes are cut off")
                break
            record, place = item
            position, size = record.position + 1, place.offset + place.length
        self._file = os.open(current.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        if size < current.size:
            os.ftruncate(self._file, size)
        self._end = position, size
        if position < begin:
            self._on_note(f"{self._folder} ends at record {position - 1}, before the checkpoint: it goes on at {begin}")
            self._create(begin)

    @property
    def next_position(self) -> int:
        """Position that the next record gets."""
        return self._end[0]

    @property
    def first_position(self) -> int:
        """Position of the oldest record that is kept; ``next_position`` if there is none."""
        with self._guard:
            return self._segments[0].first

    @property
    def bytes(self) -> int:
        """Bytes of all segments."""
        with self._guard:
            return sum(segment.size for segment in self._segments[:-1]) + self._end[1]

    def append(self, kind: str, fields: Mapping[str, Any], body: builtins.bytes = b"") -> Place:
        """Write one record behind the last.

        Args:
            kind: what it says.
            fields: see ``Record``; encoded at most 1 MiB.
            body: kept as it is.

        Returns:
            Where the body lies.

        Raises:
            LogError: it was not written, and the log is as it was: a full or read-only disk, or a record that could
                not be read again. After a failed ``flush`` or background fdatasync every append fails, since the
                system may have dropped what it could not write.
        """
        with self._guard:
            self._check_usable()
            position, size = self._end
            start = encode(position, kind, fields, body, self._max_record_bytes)
            path = self._segments[-1].path
            with disk_errors(path):
                self._cut_unfinished()
                self._unfinished = True
                try:
                    _write(self._file, start, body)
                    if self._policy == "always":
                        self._sync()
                except OSError:
                    with suppress(OSError):
                        self._cut_unfinished()
                    raise
            place = Place(path, size + len(start), len(body))
            self._end = position + 1, place.offset + place.length
            self._unfinished = False
            self._unsynced = self._policy != "always"
            if self._interval_s:
                self._guard.notify()
            return place

    def read(self, start: int = 1) -> Iterator[tuple[Record, Place]]:
        """Read what was appended before this call, one record in memory at a time.

        Args:
            start: position of the first record to read, from ``first_position`` to ``next_position``.

        Raises:
            LogError: at once if ``start`` is not in that range, later where the log is damaged; no record is passed
                over.
        """
        with self._guard:
            self._check_open()
            position, size = self._end
            segments = [*self._segments[:-1], replace(self._segments[-1], size=size)]
        if not segments[0].first <= start <= position:
            raise LogError(
                f"{self._folder} holds the records from {segments[0].first} on, the next is {position}; {start} was "
                "asked for: start from a checkpoint of that range"
            )
        return self._read(segments, start)

    def _read(self, segments: list[Segment], start: int) -> Iterator[tuple[Record, Place]]:
        with disk_errors(self._folder):
            for item in read_segments(segments, start, self._max_record_bytes, live=False):
                if isinstance(item, Damage):
                    raise _damaged(item)
                yield item

    def rotate(self) -> None:
        """Begin a new segment, unless the current one is empty.

        Raises:
            LogError: a full or read-only disk; the log goes on in the current segment.
        """
        with self._guard:
            self._check_usable()
            with disk_errors(self._folder):
                self._cut_unfinished()
                if not self._end[1]:
                    return
                if self._unsynced or self._policy != "never":
                    self._flush()  # a later flush reaches the new segment alone
                self._create(self._end[0])
                if self._policy != "never":
                    self._flush()

    def drop_before(self, position: int) -> int:
        """Delete the segments whose records all lie before a position, oldest first; never the current one.

        Returns:
            How many were deleted.

        Raises:
            LogError: a file cannot be deleted; it and the later ones are kept.
        """
        with self._guard:
            self._check_open()
            dropped = 0
            with disk_errors(self._folder):
                while len(self._segments) > 1 and self._segments[1].first <= position:
                    self._segments[0].path.unlink(missing_ok=True)
                    del self._segments[0]
                    dropped += 1
                if dropped and self._policy != "never":
                    os.fsync(self._folder_file)
            return dropped

    def flush(self) -> None:
        """Wait until everything appended is on the disk, whatever ``sync`` says.

        Raises:
            LogError: the disk failed; the log takes no more records, see ``append``.
        """
        with self._guard:
            self._check_usable()
            self._flush()

    def close(self) -> None:
        """Flush (unless ``sync`` is ``never``), release the files and the lock; may be called again.

        Raises:
            LogError: the flush failed; the files are released.
        """
        with self._guard:
            if self._file < 0:
                return
            try:
                if self._policy != "never" and not self._sync_failed:
                    self._flush()
            finally:
                self._release()
                self._stop.set()
                self._guard.notify_all()
        if self._syncer:
            self._syncer.join()

    def _check_open(self) -> None:
        if self._file < 0:
            raise LogError(f"the log {self._folder} was closed: open it again")

    def _check_usable(self) -> None:
        self._check_open()
        if self._sync_failed:
            raise LogError(
                f"the log {self._folder} did not reach the disk ({self._sync_failed}) and takes no more records: "
                "check the disk, then start again"
            )

    def _create(self, first: int) -> None:
        path = self._folder / f"{first:012}.log"
        created = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        if self._file >= 0:
            self._segments[-1] = replace(self._segments[-1], size=self._end[1])
            os.close(self._file)
        self._file = created
        self._segments.append(Segment(path, first, 0))
        self._end = first, 0
        self._entry_unsynced = True

    def _cut_unfinished(self) -> None:
        if self._unfinished:
            os.ftruncate(self._file, self._end[1])
            self._unfinished = False

    def _sync(self) -> None:
        os.fdatasync(self._file)
        if self._entry_unsynced:
            os.fsync(self._folder_file)
            self._entry_unsynced = False

    def _flush(self) -> None:
        self._unsynced = False
        with disk_errors(self._folder):
            try:
                self._sync()
            except OSError as exc:
                self._sync_failed = exc.strerror or str(exc)
                raise

    def _sync_in_background(self) -> None:
        while not self._stop.wait(self._interval_s):
            with self._guard:
                self._guard.wait_for(lambda: self._unsynced or self._file < 0)
                if self._file < 0:
                    return
                self._unsynced = False
                current = os.dup(self._file)
            try:
                os.fdatasync(current)  # outside the guard: appends go on meanwhile
            except OSError as exc:
                self._sync_failed = exc.strerror or str(exc)
                self._on_note(f"the log {self._folder} did not reach the disk: {self._sync_failed}")
            finally:
                os.close(current)

    def _release(self) -> None:
        for each in (self._file, self._folder_file, self._lock_file):
            if each >= 0:
                os.close(each)
        self._file = self._folder_file = self._lock_file = -1


def remove(folder: Path) -> None:
    """Delete a log with all its records; nothing happens if there is none.

    Raises:
        LogError: another process uses it, or the disk refuses.
    """
    if not folder.is_dir():
        return
    with disk_errors(folder):
        held = _locked(folder)
        try:
            shutil.rmtree(folder)
        finally:
            for each in held:
                os.close(each)


def _interval_s(sync: str | float) -> float:
    if isinstance(sync, str) and sync in ("never", "always", "checkpoint"):
        return 0.0
    if isinstance(sync, int | float) and not isinstance(sync, bool) and math.isfinite(sync) and 0 < sync <= 60_000:
        return sync / 1000
    raise ConfigError(f"sync is {sync!r}: use never, always, checkpoint or a number of milliseconds up to 60000")


def _damaged(damage: Damage) -> LogError:
    return LogError(
        f"{damage}: restore {damage.path.parent} from a copy, or move it away to go on from the newest checkpoint alone"
    )


def _locked(folder: Path) -> tuple[int, int]:
    """Make the folder and take its lock; returns descriptors of folder and lock."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)
    # A file of its own: network file systems lock no folders.
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), lock
    except BlockingIOError as exc:
        os.close(lock)
        raise LogError(f"the log {folder} is in use: stop the other server or give this one another folder") from exc
    except OSError:
        os.close(lock)
        raise


def _write(file: int, *parts: builtins.bytes) -> None:
    """One system call, more only if the system takes less than all."""
    views = [memoryview(part) for part in parts if part]
    while views:
        written = os.writev(file, views)
        if not written:
            raise OSError(errno.EIO, "the disk takes no more bytes")
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if views:
            views[0] = views[0][written:]
