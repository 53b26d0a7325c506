"""The file under the state: who may have it, what it is, what happens to it when it is damaged."""

from __future__ import annotations

import fcntl
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from edge_sdk.errors import StateError
from edge_sdk.state_file import SCHEMA_VERSION, DamagedError, StateFile, record_map

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "er" / "state.db"


@pytest.fixture
def file(path: Path) -> Iterator[StateFile]:
    made = StateFile(path)
    assert not made.open("off")
    made.create("off", record_map("progress", {"run": "a"}))
    yield made
    made.close()


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_everything_is_readable_by_its_owner_alone(file: StateFile, path: Path) -> None:
    files = {each.name: mode_of(each) for each in path.parent.iterdir()}
    assert files == {"state.db": 0o600, "state.db-wal": 0o600, "state.db.lock": 0o600}
    assert mode_of(path.parent) == 0o700


def test_closing_leaves_one_file(file: StateFile, path: Path) -> None:
    file.close()
    file.close()
    assert [each.name for each in path.parent.iterdir()] == ["state.db"]


def test_a_file_that_others_could_read_is_closed_to_them(file: StateFile, path: Path) -> None:
    file.close()
    path.chmod(0o644)
    again = StateFile(path)
    with closing(again):
        assert again.open("off")
        assert mode_of(path) == 0o600


def test_a_second_opener_is_refused_at_once(file: StateFile, path: Path) -> None:
    with pytest.raises(StateError, match="in use by another process"):
        StateFile(path)
    file.close()
    StateFile(path).close()


FULL_DISK = """
import os
import sys
from pathlib import Path
from edge_sdk.errors import StateError
from edge_sdk.state_file import StateFile, record

folder = Path(sys.argv[1])
file = StateFile(folder / "state.db")
file.create("normal")
for number in range(3):  # until there are pages for the old and the new one
    file.commit(record("front", bytes(400_000 + number)))
    file.checkpoint()
with (folder / "filler").open("wb", 0) as filler:
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    filler.write(bytes(free - 600_000))
for number in range(40):
    file.commit(record("front", bytes([number]) * 400_000))
    assert file.get("front") == bytes([number]) * 400_000
try:
    file.commit(record("other", bytes(800_000)))
except StateError as exc:
    print(exc)
assert file.get("front") == bytes([39]) * 400_000
file.commit(record("front", b"39"))
"""


def test_a_full_disk_leaves_room_for_what_there_was(tmp_path: Path) -> None:
    """On a file system of its own, which only some places allow to mount."""
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    script = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" -c "$3" "$1"'
    if subprocess.run([*mount, script, "sh", tmp_path, sys.executable, ""], cwd=ROOT, timeout=60).returncode:
        pytest.skip("no file system may be mounted here")
    done = subprocess.run(
        [*mount, script, "sh", tmp_path, sys.executable, FULL_DISK],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "was not changed, the disk is full: free some space" in done.stdout


def test_a_killed_process_holds_nothing(path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from edge_sdk.state_file import StateFile\n"
        "file = StateFile(Path(sys.argv[1])); file.create('off'); print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        try:
            assert child.stdout is not None and child.stdout.readline() == b"held\n"
            with pytest.raises(StateError, match="in use by another process"):
                StateFile(path)
        finally:
            child.kill()
    StateFile(path).close()


def test_another_program_that_has_the_file_open_is_named(file: StateFile, path: Path) -> None:
    file.close()
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with closing(StateFile(path)) as again, pytest.raises(StateError, match="another program has it open"):
            again.open("off")
    assert path.exists()


@pytest.mark.parametrize("another", [False, True], ids=["gone", "replaced"])
def test_a_lock_on_a_removed_file_is_no_lock(path: Path, monkeypatch: pytest.MonkeyPatch, another: bool) -> None:
    lock = path.with_name("state.db.lock")
    flock = fcntl.flock
    seen: list[int] = []

    def removed_in_between(descriptor: int, operation: int) -> None:
        if not seen:
            lock.unlink()
            if another:
                lock.touch()
        seen.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_in_between)
    with closing(StateFile(path)):
        assert len(seen) == 2 and lock.exists()
        with pytest.raises(StateError, match="in use"):
            StateFile(path)


@pytest.mark.parametrize(
    ("version", "remedy"), [(SCHEMA_VERSION + 1, "upgrade psgl"), (1, "go on with the psgl that wrote it")]
)
def test_another_version_is_refused_and_untouched(file: StateFile, path: Path, version: int, remedy: str) -> None:
    file.commit((f"PRAGMA user_version = {version}", ()))
    file.close()
    before = path.read_bytes()
    with closing(StateFile(path)) as again, pytest.raises(StateError, match=rf"version {version}.*{remedy}.*--fresh"):
        again.open("off")
    assert path.read_bytes() == before


def test_the_database_of_another_program_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "photos.db"
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("CREATE TABLE photo (name TEXT)")
    with closing(StateFile(path)) as file, pytest.raises(StateError, match="another program"):
        file.open("off")
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT count(*) FROM photo").fetchone() == (0,)


def test_a_transaction_is_whole_or_nothing(file: StateFile) -> None:
    for last in (("UPDATE missing SET x = 1", ()), ("SELECT ?", (object(),))):
        with pytest.raises(StateError, match="was not changed"):
            file.commit(record_map("progress", {"run": "b"}), last)
        assert not file.connection.in_transaction
    assert file.get_map("progress") == {"run": "a"}


def test_a_record_with_a_changed_byte_is_damage(file: StateFile) -> None:
    file.commit(("UPDATE record SET value = x'a0'", ()))
    with pytest.raises(DamagedError, match="checksum of progress"):
        file.get_map("progress")
    with pytest.raises(DamagedError, match="checksum of front"):
        file.get("front")


@pytest.mark.parametrize("statement", ["UPDATE record SET value = 'text'", "UPDATE record SET crc = 'x'"])
def test_a_record_of_another_type_is_damage(file: StateFile, statement: str) -> None:
    file.commit((statement, ()))
    with pytest.raises(DamagedError, match="checksum"):
        file.get("progress")


def test_a_checkpoint_empties_the_log(file: StateFile, path: Path) -> None:
    wal = path.with_name("state.db-wal")
    assert wal.stat().st_size > 0
    file.checkpoint()
    assert wal.stat().st_size == 0 and path.stat().st_size > 0


def test_what_is_set_aside_keeps_its_side_files(file: StateFile, path: Path) -> None:
    file.close()
    for number in (1, 2):
        path.write_bytes(b"damaged")
        path.with_name("state.db-wal").write_bytes(b"log")
        with closing(StateFile(path)) as again:
            kept = again.set_aside()
        assert kept == path.with_name(f"state.db.damaged-{number}")
        assert kept.read_bytes() == b"damaged"
        assert kept.with_name(kept.name + "-wal").read_bytes() == b"log"
        assert not path.exists() and not path.with_name("state.db-wal").exists()


def test_a_new_file_takes_nothing_from_side_files_without_one(file: StateFile, path: Path) -> None:
    wal = path.with_name("state.db-wal").read_bytes()
    file.remove()
    path.with_name("state.db-wal").write_bytes(wal)
    file.create("off")
    assert file.connection.execute("SELECT count(*) FROM record").fetchone() == (0,)
    file.close()
    assert [each.name for each in path.parent.iterdir()] == ["state.db"]


def test_a_folder_in_place_of_the_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "state.db").mkdir()
    with closing(StateFile(tmp_path / "state.db")) as file, pytest.raises(StateError, match="writable"):
        file.open("off")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StateError, match="writable"):
        StateFile(tmp_path / "file" / "state.db")
