"""The write-ahead log: every record whole or not at all, whatever happens in between; damage is seen, never read."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_sdk.errors import ConfigError
from server_sdk.errors import LogError
from server_sdk.log import Damage, Log, Record, scan

HEAD_BYTES = 20
CHANGING = ("open", "writev", "fdatasync", "fsync", "ftruncate", "unlink", "mkdir", "chmod")


class Crash(BaseException):
    """The process is gone: nothing behind it runs that could still touch the disk."""


class CrashAt:
    """Every system call that changes a disk, counted; the n-th does not return.

    Args:
        call: which one, from 1.
        when: ``before`` it, ``after`` it, or ``within`` it (a write that was done by half).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: int, when: str) -> None:
        self.seen: list[str] = []
        self._call, self._when = call, when
        for name in CHANGING:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            self.seen.append(name)
            if len(self.seen) != self._call:
                return real(*arguments, **options)
            if self._when == "within" and name == "writev":
                data = b"".join(arguments[1])
                os.write(arguments[0], data[: len(data) // 2])
            if self._when == "after":
                with suppress(OSError):
                    real(*arguments, **options)
            raise Crash

        return wrapped


def fill(log: Log, count: int) -> None:
    for _ in range(count):
        position = log.next_position
        log.append("step", {"device": f"ward-{position}", "step": position}, body_of(position))


def body_of(position: int) -> bytes:
    return bytes(range(position, position + 40)) * (position % 3)


def fields_of(position: int) -> dict[str, Any]:
    return {"device": f"ward-{position}", "step": position}


def records(log: Log) -> list[Record]:
    return [record for record, _ in log.read(log.first_position)]


def check(log: Log, first: int, last: int) -> None:
    """Holds exactly the records first to last, and goes on."""
    expected = [Record(each, "step", fields_of(each), body_of(each)) for each in range(first, last + 1)]
    assert records(log) == expected and log.next_position == last + 1
    fill(log, 2)
    assert [record.position for record in records(log)] == list(range(first, last + 3))


def segment(folder: Path, first: int = 1) -> Path:
    return folder / f"{first:012}.log"


def offsets(folder: Path) -> list[int]:
    """Where each record of the first segment begins, and its end."""
    places = [item[1] for item in scan(folder) if not isinstance(item, Damage)]
    return [0, *(place.offset + place.length for place in places if place.path == segment(folder))]


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow beyond ``size``: the kernel writes what fits and fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_was_appended_is_read_again_and_its_body_lies_where_the_log_says(tmp_path: Path) -> None:
    written = []
    fields = {"device": "d", "steps": [["d", "s", 1]], "rate": 0.1, "none": None, "raw": b"\x00", "sub": {"ä": True}}
    with_log = Log(tmp_path / "log")
    assert (with_log.next_position, with_log.first_position, with_log.bytes) == (1, 1, 0)
    for body in (b"", b"abc", bytes(70_000)):
        written.append((Record(with_log.next_position, "step", fields, body), with_log.append("step", fields, body)))
    assert list(with_log.read()) == written
    assert list(with_log.read(3)) == written[2:] and list(with_log.read(4)) == []
    for record, place in written:
        assert place.path.read_bytes()[place.offset : place.offset + place.length] == record.body
    assert with_log.bytes == segment(tmp_path / "log").stat().st_size
    with_log.close()
    with_log.close()
    again = Log(tmp_path / "log")
    assert list(again.read()) == written and again.next_position == 4
    again.close()
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "log").iterdir())


def test_a_segment_is_a_cbor_sequence_with_heads_of_fixed_size(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.append("turn", {"a": 1}, b"xy")
    fill(log, 3)
    log.close()
    data = segment(tmp_path).read_bytes()
    payload = bytes.fromhex("a3 64 6b696e64 64 7475726e 66 6669656c6473 a1 61 61 01 64 626f6479 5a 00000002 7879")
    head = bytes.fromhex("83 1b 0000000000000001 1a") + zlib.crc32((1).to_bytes(8, "big") + payload).to_bytes(4, "big")
    head += b"\x5a" + len(payload).to_bytes(4, "big")
    assert data.startswith(head + payload) and len(head) == HEAD_BYTES
    with segment(tmp_path).open("rb") as file:
        for position in range(1, 5):
            number, crc, inner = cbor2.load(file)
            assert (number, crc) == (position, zlib.crc32(position.to_bytes(8, "big") + inner))
            assert set(cbor2.loads(inner)) == {"kind", "fields", "body"}
        assert not file.read()


def test_segments_follow_each_other_and_old_ones_are_dropped_whole(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.rotate()
    assert [path.name for path in tmp_path.glob("*.log")] == ["000000000001.log"]
    for _ in range(3):
        fill(log, 3)
        log.rotate()
        log.rotate()
    fill(log, 1)
    assert sorted(int(path.stem) for path in tmp_path.glob("*.log")) == [1, 4, 7, 10]
    assert log.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.log"))
    for start in range(1, 12):
        assert [record.position for record, _ in log.read(start)] == list(range(start, 11))
    assert log.drop_before(1) == log.drop_before(3) == 0
    assert log.drop_before(6) == 1 and log.first_position == 4
    assert log.drop_before(100) == 2 and log.first_position == 10
    assert log.bytes == segment(tmp_path, 10).stat().st_size
    for start in (9, 12, 0):
        with pytest.raises(LogError, match="checkpoint of that range"):
            log.read(start)
    log.close()
    log = Log(tmp_path)
    check(log, 10, 10)
    log.close()


def test_reading_shows_what_was_there_and_appending_goes_on_meanwhile(tmp_path: Path) -> None:
    log = Log(tmp_path)
    fill(log, 2)
    reading = log.read()
    fill(log, 1)
    log.rotate()
    fill(log, 1)
    assert [record.position for record, _ in reading] == [1, 2]
    log.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    with pytest.raises(LogError, match="in use"):
        Log(tmp_path / "log")
    log.close()
    Log(tmp_path / "log").close()
    with pytest.raises(LogError, match="closed"):
        log.append("step", {})
    for method in (log.rotate, log.flush, log.read):
        with pytest.raises(LogError, match="closed"):
            method()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LogError, match="make it writable"):
        Log(tmp_path / "file")
    with pytest.raises(LogError, match="make it writable"):
        list(scan(tmp_path / "missing"))
    (tmp_path / "log").mkdir(mode=0o755)
    (tmp_path / "log" / "notes.log").touch()
    log = Log(tmp_path / "log")
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o700
    check(log, 1, 0)
    log.close()


@pytest.mark.parametrize(
    "options",
    [
        *({"sync": sync} for sync in ("often", 0, -1.0, True, float("nan"), 1e9)),
        {"begin": 0},
        {"max_record_bytes": 0},
        {"max_record_bytes": 1 << 32},
    ],
)
def test_options_that_mean_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Log(tmp_path / "log", **options)
    assert not (tmp_path / "log").exists()


def test_a_record_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    log = Log(tmp_path, max_record_bytes=2 << 20)
    fill(log, 1)
    nested: list[Any] = []
    for _ in range(40):
        nested = [nested]
    for fields, body in (
        ({"x": object()}, b""),
        ({1: 2}, b""),
        ({"x": 1 << 70}, b""),
        ({"x": nested}, b""),
        ({"x": b"." * (1 << 20)}, b""),
        ({"x": "."}, bytes(2 << 20)),
    ):
        with pytest.raises(LogError, match=r"record 2 \(step\)"):
            log.append("step", fields, body)
    check(log, 1, 1)
    log.close()


# What a crash may leave


def test_an_append_that_was_cut_off_at_any_byte(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    fill(log, 3)
    log.close()
    data = segment(tmp_path / "log").read_bytes()
    *_, begin, end = offsets(tmp_path / "log")
    for length in range(begin, end + 1):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "log", copy)
        segment(copy).write_bytes(data[:length])
        notes: list[str] = []
        log = Log(copy, on_note=notes.append)
        whole = length == end
        assert bool(notes) == (length not in (begin, end))
        assert all(f"{segment(copy)} cannot be read at byte {begin}" in note for note in notes)
        assert segment(copy).stat().st_size == (end if whole else begin)
        check(log, 1, 3 if whole else 2)
        log.close()
        shutil.rmtree(copy)


@pytest.mark.parametrize(
    "tail", [b"\x00", bytes(5000), b"garbage" * 9, b"\x83\x1b" * 900, b"\x83", bytes([0x83, 0x1B])]
)
@pytest.mark.parametrize("count", [0, 2])
def test_zeros_and_garbage_behind_the_last_record_are_cut_off(tmp_path: Path, tail: bytes, count: int) -> None:
    log = Log(tmp_path)
    fill(log, count)
    log.close()
    with segment(tmp_path).open("ab") as file:
        file.write(tail)
    notes: list[str] = []
    log = Log(tmp_path, on_note=notes.append)
    assert len(notes) == 1 and f"{len(tail)} bytes are cut off" in notes[0]
    check(log, 1, count)
    log.close()


def test_a_torn_body_that_imitates_records_is_cut_off_all_the_same(tmp_path: Path) -> None:
    forger = Log(tmp_path / "forged")
    fill(forger, 6)
    forger.close()
    forged = segment(tmp_path / "forged").read_bytes()
    log = Log(tmp_path / "log")
    fill(log, 2)
    log.append("step", {}, forged * 2)
    log.close()
    data = segment(tmp_path / "log").read_bytes()
    begin = offsets(tmp_path / "log")[2]
    damaged = bytearray(data)
    damaged[-1] ^= 1
    for torn in (data[:-1], data[: -len(forged)], bytes(damaged)):
        segment(tmp_path / "log").write_bytes(torn)
        assert begin < len(torn)
        log = Log(tmp_path / "log")
        check(log, 1, 2)
        log.close()


def head_of(position: int, length: int, crc: int = 0) -> bytes:
    head = b"\x83\x1b" + position.to_bytes(8, "big") + b"\x1a" + crc.to_bytes(4, "big")
    return head + b"\x5a" + length.to_bytes(4, "big")


def test_a_tail_with_an_older_record_or_an_impossible_one_is_cut_off(tmp_path: Path) -> None:
    log = Log(tmp_path)
    fill(log, 3)
    log.close()
    data = segment(tmp_path).read_bytes()
    stale = data[: offsets(tmp_path)[1]]
    for tail in (stale, b"?" + stale, b"?" + head_of(5, 0xFFFFFFFF) + b"\xa3\x64kind", b"?" + head_of(5, 9)):
        segment(tmp_path).write_bytes(data + tail)
        log = Log(tmp_path)
        assert segment(tmp_path).stat().st_size == len(data)
        assert [record.position for record in records(log)] == [1, 2, 3]
        log.close()


@pytest.mark.parametrize("garbage", [(1 << 20) - 13, (1 << 20) - 26, 1 << 20, (2 << 20) - 30])
def test_a_record_behind_much_garbage_is_found_wherever_it_lies(tmp_path: Path, garbage: int) -> None:
    log = Log(tmp_path)
    fill(log, 3)
    log.close()
    data = segment(tmp_path).read_bytes()
    begin = offsets(tmp_path)[2]
    segment(tmp_path).write_bytes(data[:begin] + bytes(garbage) + data[begin:])
    with pytest.raises(LogError, match=f"no head of record 3, and there are records from byte {begin + garbage} on"):
        Log(tmp_path)


def test_a_tail_full_of_imitations_costs_bounded_time_and_is_not_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed = 0
    real = zlib.crc32

    def crc32(data: bytes, value: int = 0) -> int:
        nonlocal summed
        summed += len(data)
        return real(data, value)

    segment(tmp_path).write_bytes(b"?" + (head_of(1, 10_000) + b"\xa3\x64kind") * 4000)
    monkeypatch.setattr(zlib, "crc32", crc32)
    with pytest.raises(LogError, match="there are records from byte"):
        Log(tmp_path, max_record_bytes=20_000)
    assert 50_000 < summed <= 4 * 20_000 + 1000


Scenario = Callable[[Path], None]


def appending(folder: Path) -> None:
    log = Log(folder)
    fill(log, 1)


def appending_synced(folder: Path) -> None:
    log = Log(folder, sync="always")
    fill(log, 1)


def rotating(folder: Path) -> None:
    log = Log(folder, sync="checkpoint")
    log.rotate()
    fill(log, 1)
    log.flush()


def rotating_unsynced(folder: Path) -> None:
    log = Log(folder)
    log.rotate()
    fill(log, 1)


def dropping(folder: Path) -> None:
    log = Log(folder, sync="checkpoint")
    log.rotate()
    log.drop_before(log.next_position)
    fill(log, 1)


def repairing(folder: Path) -> None:
    with max(folder.glob("*.log")).open("ab") as file:
        file.write(b"\x83\x1b torn")
    appending(folder)


@pytest.mark.parametrize("when", ["before", "within", "after"])
@pytest.mark.parametrize(
    "scenario",
    [appending, appending_synced, rotating, rotating_unsynced, dropping, repairing],
    ids=lambda s: s.__name__,
)
def test_a_crash_at_every_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: Scenario, when: str
) -> None:
    log = Log(tmp_path / "before")
    for _ in range(2):
        fill(log, 2)
        log.rotate()
    fill(log, 2)
    log.close()
    ended = set()
    for call in itertools.count(1):
        folder = tmp_path / f"crash-{call}"
        shutil.copytree(tmp_path / "before", folder)
        with monkeypatch.context() as patch:
            crash = CrashAt(patch, call, when)
            try:
                scenario(folder)
            except Crash:
                pass
            else:
                break
        shutil.copytree(folder, tmp_path / "after")  # what the next process finds; the crashed one holds the lock
        log = Log(tmp_path / "after")
        last = log.next_position - 1
        ended.add(last)
        assert last in (6, 7), f"{crash.seen[-1]} lost a record"
        assert log.first_position in ((1, 3, 5, 7, 8) if scenario is dropping else (1,))
        check(log, log.first_position, last)
        log.close()
        shutil.rmtree(tmp_path / "after")
    assert {"writev"} < set(crash.seen), crash.seen
    assert 6 in ended
    assert 7 in ended or when != "after"
    expected = {appending_synced: "fdatasync", rotating: "fsync", dropping: "unlink", repairing: "ftruncate"}
    assert scenario not in expected or expected[scenario] in crash.seen


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_while_the_log_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    for call in itertools.count(1):
        folder = tmp_path / f"crash-{call}"
        with monkeypatch.context() as patch:
            CrashAt(patch, call, when)
            try:
                Log(folder, sync="always").close()
            except Crash:
                pass
            else:
                break
        log = Log(folder)
        check(log, 1, 0)
        log.close()
    assert call > 4


# Disks that fail


@pytest.mark.parametrize("room", [0, 1, 19, 20, 50])
def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path, room: int) -> None:
    log = Log(tmp_path)
    fill(log, 3)
    size = log.bytes
    with file_limit(size + room):
        with pytest.raises(LogError, match="free space"):
            log.append("step", {}, bytes(5000))
        assert log.bytes == segment(tmp_path).stat().st_size == size
    check(log, 1, 3)
    log.close()


def test_a_disk_that_will_not_even_cut_off_what_it_wrote_by_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    log = Log(tmp_path)
    fill(log, 3)
    size = log.bytes
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", fail)
        with file_limit(size + 30), pytest.raises(LogError, match="File too large"):
            log.append("step", {}, bytes(5000))
        assert segment(tmp_path).stat().st_size == size + 30
        for change in (lambda: fill(log, 1), log.rotate):
            with pytest.raises(LogError, match="Input/output error"):
                change()
        assert [record.position for record in records(log)] == [1, 2, 3]
    check(log, 1, 3)
    log.close()


def test_a_system_that_takes_little_at_a_time_and_one_that_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writev = os.writev
    log = Log(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", lambda file, views: writev(file, [b"".join(views)[:7]]))
        fill(log, 3)
        patch.setattr(os, "writev", lambda file, views: 0)
        with pytest.raises(LogError, match="takes no more"):
            fill(log, 1)
    check(log, 1, 3)
    log.close()


def test_an_append_that_was_interrupted_is_gone_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path)
    fill(log, 2)
    for when in ("before", "within", "after"):
        with monkeypatch.context() as patch:
            CrashAt(patch, 1, when)
            with pytest.raises(Crash):
                fill(log, 1)
    check(log, 1, 2)
    log.close()


def test_a_segment_that_cannot_be_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    log = Log(tmp_path)
    fill(log, 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(LogError, match="Read-only"):
            log.rotate()
    fill(log, 1)
    segment(tmp_path, 5).write_bytes(b"of another writer")
    with pytest.raises(LogError, match="File exists"):
        log.rotate()
    assert segment(tmp_path, 5).read_bytes() == b"of another writer"
    segment(tmp_path, 5).unlink()
    log.rotate()
    fill(log, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail)
        with pytest.raises(LogError, match="Read-only"):
            log.drop_before(5)
    assert log.first_position == 1
    check(log, 1, 5)
    log.close()


# Damage


def test_any_changed_byte_before_the_last_record_is_named(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    fill(log, 3)
    log.close()
    path = segment(tmp_path / "log")
    data = path.read_bytes()
    begins = offsets(tmp_path / "log")
    for at in range(begins[2]):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        begin = max(each for each in begins if each <= at)
        with pytest.raises(LogError, match=rf"{path} cannot be read at byte {begin}: .* records from byte"):
            Log(tmp_path / "log")
        assert path.read_bytes() == damaged, "nothing is repaired"


def test_the_head_of_one_record_before_the_payload_of_another_is_no_record(tmp_path: Path) -> None:
    log = Log(tmp_path)
    fill(log, 5)
    log.close()
    data = segment(tmp_path).read_bytes()
    begins = offsets(tmp_path)
    for kept in range(2, 14):  # bytes of the head of record 2 before what follows them in record 3
        segment(tmp_path).write_bytes(data[: begins[1] + kept] + data[begins[2] + kept :])
        with pytest.raises(LogError, match=f"at byte {begins[1]}:"):
            Log(tmp_path)


def test_damage_in_an_older_segment_is_named_when_it_is_read(tmp_path: Path) -> None:
    log = Log(tmp_path)
    for _ in range(3):
        fill(log, 2)
        log.rotate()
    path = segment(tmp_path, 3)
    data = path.read_bytes()
    for damaged in (data[:-1], data[:10], data + b"\0", data[:-1] + b"?"):
        path.write_bytes(damaged)
        if len(damaged) > len(data):
            continue  # bytes behind what was appended are no part of it for its own writer
        reading = log.read()
        assert [next(reading)[0].position for _ in range(2)] == [1, 2]
        with pytest.raises(LogError, match=f"{path} cannot be read at byte .*restore"):
            list(reading)
        assert [record.position for record, _ in log.read(5)] == [5, 6]
        told = list(scan(tmp_path))[-1]
        assert isinstance(told, Damage) and not told.torn, "only the last segment has a torn end"
    log.close()
    path.write_bytes(data + b"\0")
    log = Log(tmp_path)
    with pytest.raises(LogError, match=f"{path} cannot be read at byte {len(data)}"):
        list(log.read())
    log.close()


def test_a_segment_that_is_missing(tmp_path: Path) -> None:
    log = Log(tmp_path)
    for _ in range(3):
        fill(log, 2)
        log.rotate()
    log.close()
    segment(tmp_path, 3).unlink()
    log = Log(tmp_path)
    with pytest.raises(LogError, match=f"{segment(tmp_path, 5)} cannot be read at byte 0: it begins with record 5"):
        list(log.read())
    assert [record.position for record, _ in log.read(5)] == [5, 6]
    log.close()


def test_lengths_are_compared_before_memory_is_taken(tmp_path: Path) -> None:
    log = Log(tmp_path)
    fill(log, 2)
    log.close()
    begin = offsets(tmp_path)[1]
    with segment(tmp_path).open("r+b") as file:
        file.seek(begin + HEAD_BYTES - 4)
        file.write(b"\xff\xff\xff\xff")
        file.truncate(100 << 20)  # sparse
    tracemalloc.start()
    damage = [item for item in scan(tmp_path) if isinstance(item, Damage)]
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
    assert damage[0].offset == begin


def test_a_record_above_this_servers_limit_is_not_taken_for_torn(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.append("step", {}, bytes(5000))
    log.close()
    with pytest.raises(LogError, match="above max_record_bytes=1000: raise the limit"):
        Log(tmp_path, max_record_bytes=1000)
    log = Log(tmp_path)
    assert len(records(log)) == 1
    log.close()


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff",
        b"\x01",
        cbor2.dumps({"kind": "step"}),
        cbor2.dumps({"body": b"", "fields": {}, "kind": "step"}),
        cbor2.dumps({"kind": 1, "fields": {}, "body": b""}),
        cbor2.dumps({"kind": "s", "fields": [], "body": b""}),
        cbor2.dumps({"kind": "s", "fields": {}, "body": "text"}),
    ],
)
def test_a_record_of_another_writer_is_refused_and_never_cut_off(tmp_path: Path, payload: bytes) -> None:
    crc = zlib.crc32((1).to_bytes(8, "big") + payload)
    segment(tmp_path).write_bytes(head_of(1, len(payload), crc) + payload)
    with pytest.raises(LogError, match="no record of this log"):
        Log(tmp_path)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    folder = tmp_path_factory.mktemp("sample")
    log = Log(folder / "log")
    fill(log, 4)
    log.rotate()
    fill(log, 4)
    whole = records(log)
    log.close()
    return folder, whole


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_never_gives_a_wrong_record(sample: tuple[Path, list[Record]], data: st.DataObject) -> None:
    source, whole = sample
    folder = source / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source / "log", folder)
    path = segment(folder, data.draw(st.sampled_from([1, 5])))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        match data.draw(st.sampled_from(["change", "insert", "delete", "repeat"])):
            case "change":
                content[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=30))
            case "delete":
                del content[at : at + data.draw(st.integers(1, 80))]
            case "repeat":
                content[at:at] = content[data.draw(st.integers(0, at)) : at]
    path.write_bytes(content)
    *seen, last = [*scan(folder), None]
    found = [item for item in (*seen, last) if item is not None]
    read = [item[0] for item in found if not isinstance(item, Damage)]
    assert read == whole[: len(read)]
    assert len(read) == len(whole) or (isinstance(found[-1], Damage) or path.name.startswith("000000000005"))
    try:
        log = Log(folder)
    except LogError:
        return
    try:
        read = [record for record, _ in log.read()]
    except LogError as error:
        assert str(path) in str(error) or str(segment(folder, 5)) in str(error)
    else:
        assert read == whole[: log.next_position - 1] and log.next_position >= 5
    log.close()


# Onto the disk


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[list[str]]:
    calls: list[str] = []
    with monkeypatch.context() as patch:
        for name in names:
            real = getattr(os, name)
            patch.setattr(os, name, lambda file, name=name, real=real: (calls.append(name), real(file))[1])
        yield calls


@pytest.mark.parametrize(
    ("sync", "opened", "appended", "rotated", "dropped", "flushed"),
    [
        ("never", [], [], ["fdatasync", "fsync"], [], ["fdatasync", "fsync"]),
        (
            "always",
            ["fdatasync", "fsync"],
            ["fdatasync"] * 3,
            ["fdatasync", "fdatasync", "fsync"],
            ["fsync"],
            ["fdatasync"],
        ),
        ("checkpoint", ["fdatasync", "fsync"], [], ["fdatasync", "fdatasync", "fsync"], ["fsync"], ["fdatasync"]),
    ],
)
def test_what_each_policy_asks_of_the_disk(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sync: str,
    opened: list[str],
    appended: list[str],
    rotated: list[str],
    dropped: list[str],
    flushed: list[str],
) -> None:
    with counted(monkeypatch, "fdatasync", "fsync") as calls:
        log = Log(tmp_path, sync=sync)
        assert calls == opened
        calls.clear()
        fill(log, 3)
        assert calls == appended
        calls.clear()
        log.rotate()
        assert calls == rotated
        calls.clear()
        log.drop_before(4)
        assert calls == dropped
        calls.clear()
        log.flush()
        assert calls == flushed
        calls.clear()
        fill(log, 1)
        log.flush()
        calls.clear()
        log.rotate()
        assert calls == ([] if sync == "never" else rotated)
        calls.clear()
        log.close()
        assert calls == ([] if sync == "never" else ["fdatasync"])


def test_group_commit_brings_every_append_to_the_disk_with_few_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(tmp_path, sync=5)
    synced = threading.Event()
    sizes: list[int] = []
    real = os.fdatasync

    def fdatasync(file: int) -> None:
        real(file)
        sizes.append(os.fstat(file).st_size)
        synced.set()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fdatasync)
        fill(log, 200)
        while not sizes or sizes[-1] < log.bytes:
            assert synced.wait(10), "the last append never reached the disk"
            synced.clear()
        assert len(sizes) < 150
        while not log._guard._waiters:  # type: ignore[attr-defined]
            os.sched_yield()
        synced.clear()
        fill(log, 1)
        assert synced.wait(10), "an append wakes the idle thread"
        log.rotate()
        fill(log, 1)
    log.close()
    log = Log(tmp_path)
    check(log, 1, 202)
    log.close()


def test_a_disk_that_lost_what_it_took_gets_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    told = threading.Event()
    notes: list[str] = []
    background = Log(tmp_path / "a", sync=1, on_note=lambda text: (notes.append(text), told.set())[0])
    asked = Log(tmp_path / "b")
    fill(asked, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        fill(background, 1)
        assert told.wait(10) and "Input/output error" in notes[0]
        with pytest.raises(LogError, match="Input/output error"):
            asked.flush()
    for log in (background, asked):
        for change in (lambda log=log: fill(log, 1), log.flush, log.rotate):
            with pytest.raises(LogError, match="takes no more records"):
                change()
        log.close()


def test_an_append_that_the_disk_refuses_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = Log(tmp_path, sync="always")
    fill(log, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(LogError, match="free space"):
            fill(log, 1)
    check(log, 1, 2)
    log.close()


def test_a_log_that_ends_before_its_checkpoint_goes_on_behind_it(tmp_path: Path) -> None:
    log = Log(tmp_path / "empty", begin=10)
    assert log.next_position == log.first_position == 10
    fill(log, 1)
    log.close()
    notes: list[str] = []
    log = Log(tmp_path / "empty", begin=11, on_note=notes.append)
    assert not notes
    check(log, 10, 10)
    log.close()
    log = Log(tmp_path / "empty", begin=20, on_note=notes.append)
    assert len(notes) == 1 and "ends at record 12" in notes[0]
    fill(log, 2)
    assert [record.position for record, _ in log.read(20)] == [20, 21]
    with pytest.raises(LogError, match="begins with record 20, not 13"):
        list(log.read(10))
    assert log.drop_before(20) == 1
    check(log, 20, 21)
    log.close()


def test_scanning_takes_no_lock_repairs_nothing_and_stands_segments_that_go(tmp_path: Path) -> None:
    log = Log(tmp_path)
    for _ in range(3):
        fill(log, 2)
        log.rotate()
    with max(tmp_path.glob("*.log")).open("ab") as file:
        file.write(b"\x83\x1b half")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    items = list(scan(tmp_path))
    assert isinstance(items[-1], Damage) and items[-1].torn and len(items) == 7
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    reading = scan(tmp_path)
    first = next(reading)
    assert not isinstance(first, Damage) and first[0].position == 1
    log.drop_before(5)
    assert [item[0].position for item in reading if not isinstance(item, Damage)] == [2, 5, 6]
    log.close()
