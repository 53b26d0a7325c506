"""The durable state under bad days: kill -9, full and read-only disks, damaged files, wrong keys."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk import sqlite_state, state_file
from edge_sdk.errors import ConfigError, StateError
from edge_sdk.front import FrontState
from edge_sdk.sqlite_state import SqliteState, forget
from edge_sdk.state import OutboxLimits, OutboxStep
from edge_sdk.state_file import StateFile, record

ROOT = Path(__file__).resolve().parents[2]
KEY = bytes(range(32))
MARKER = b"PATIENT-4711-BATCH-MARKER"
OWNER = {"bundle": "bundle-1", "fleet": "ward", "device": "bed-7"}


def front(version: int) -> FrontState:
    return FrontState(version, {"p.weight": np.full((3, 50), version, np.float32), "s.t": np.array(version, np.int64)})


def unexpected(note: str) -> None:
    raise AssertionError(note)


def open_state(path: Path, *, on_note: Callable[[str], None] = unexpected, **options: Any) -> SqliteState:
    return SqliteState(path, front(0), **{**OWNER, "synchronous": "off", **options}, on_note=on_note)


def marked(number: int) -> OutboxStep:
    """A step whose frames, batch and labels can be found in a file."""
    x = np.frombuffer(b"X" + MARKER[:23], np.float32).reshape(2, 3)
    return OutboxStep(number, "train", (b"F" + MARKER,), x, np.frombuffer(b"L" + MARKER[:15], np.int64))


def traces(path: Path) -> list[bytes]:
    """Which parts of ``marked`` stand in the database or its side files."""
    found = b"".join(each.read_bytes() for each in path.parent.iterdir() if each.name.startswith(path.name))
    return [part for part in (b"F" + MARKER, b"X" + MARKER[:23], b"L" + MARKER[:15]) if part in found]


def content(state: SqliteState) -> tuple[Any, ...]:
    """Everything that a state says, in a form that can be compared."""
    steps = tuple(
        (step.step, step.kind, step.frames, *(None if a is None else a.tobytes() for a in (step.x, step.label)))
        for step in state.outbox
    )
    tensors = {name: array.tobytes() for name, array in state.front.tensors.items()}
    return state.session, state.run, state.front.version, tensors, dict(state.counters), steps


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


# ---- kill -9

LIVES = """
import os, sys
from pathlib import Path
import numpy as np
from edge_sdk.front import FrontState
from edge_sdk.sqlite_state import SqliteState
from edge_sdk.state import OutboxStep

def front(version):
    tensors = {"p.weight": np.full((3, 50), version, np.float32), "s.t": np.array(version, np.int64)}
    return FrontState(version, tensors)

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def note(text):
    tell("note", text.replace(" ", "-"))

def live(path, kind, synchronous):
    key = bytes(range(32)) if kind == "sealed" else None
    state = SqliteState(Path(path), front(0), bundle="bundle-1", fleet="ward", device="bed-7", key=key,
                        synchronous=synchronous, on_note=note)
    tell("session", state.session)
    while True:
        if len(state.outbox) < 3:
            number = state.next_step()
            tell("drawn", number)
            frame = number.to_bytes(8, "big") * (75_000 if number % 16 == 0 else 400)
            state.begin(OutboxStep(number, "train", (frame,), np.full((2, 5), number, np.float32)), {"begun": number})
            tell("begun", number)
        else:
            number, version = state.outbox[0].step, state.front.version + 1
            state.finish(number, front(version), {"finished": version, "last": number})
            tell("finished", number)

for line in sys.stdin:
    child = os.fork()
    if not child:
        live(*line.split())
    tell("pid", child)
    tell("ended", os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


class Lives:
    """A process that begins one life after the other, so that each costs no start of Python."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def live_until_killed(
        self, path: Path, kind: str, synchronous: str, lines: int, spin_s: float
    ) -> list[tuple[str, str]]:
        """One life that ends by SIGKILL after so many lines and a moment more; returns everything that it told."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{path} {kind} {synchronous}\n".encode())
        self._process.stdin.flush()
        told = [self._line()]
        while told[-1][0] != "pid":
            told.append(self._line())
        told += [self._line() for _ in range(lines)]
        end = time.perf_counter() + spin_s
        while time.perf_counter() < end:
            pass
        os.kill(int(dict(told)["pid"]), signal.SIGKILL)
        while told[-1][0] != "ended":
            told.append(self._line())
        assert told[-1] == ("ended", "9")
        return told

    def _line(self) -> tuple[str, str]:
        assert self._process.stdout is not None
        word, _, value = self._process.stdout.readline().decode().strip().partition(" ")
        assert word, "the process is gone"
        return word, value


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    command = [sys.executable, "-c", LIVES]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Lives(process)


@pytest.mark.parametrize("kind", ["plain", "sealed"])
def test_a_killed_device_goes_on_where_it_was(path: Path, lives: Lives, kind: str) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    drawn: list[int] = []
    begun: set[int] = set()
    finished: set[int] = set()
    for life in range(11):
        lines = rng.randrange(1, 400)  # one, for the session, at the least
        told = lives.live_until_killed(path, kind, ("off", "normal", "full")[life % 3], lines, rng.uniform(0, 0.003))
        now = {word: [int(value) for each, value in told if each == word] for word in ("drawn", "begun", "finished")}
        drawn += now["drawn"]
        begun |= set(now["begun"])
        finished |= set(now["finished"])
        where = f"seed {seed}, life {life}"
        with closing(open_state(path, key=KEY if kind == "sealed" else None)) as state:
            counters = state.counters
            waiting = [step.step for step in state.outbox]
            # What was told is done; of what was not told, at most the one operation under way may be done.
            begun |= set(drawn[-1:]) & {*waiting}
            unheard = begun - finished - {*waiting}
            assert len(unheard) <= 1 and unheard <= {counters.get("last", 0)}, where
            finished |= unheard
            assert waiting == sorted(begun - finished), where
            assert state.front.version == counters.get("finished", 0) == len(finished), where
            assert all((array == state.front.version).all() for array in state.front.tensors.values()), where
            assert all(set(step.frames[0][7::8]) == {step.step % 256} for step in state.outbox), where
            assert all(step.x is not None and (step.x == step.step).all() for step in state.outbox), where
            assert {value for word, value in told if word == "session"} == {state.session}, where
            drawn.append(state.next_step())
        assert drawn == sorted(set(drawn)), where
    assert len(finished) > 100


def test_a_device_killed_while_it_makes_its_database_starts_again(tmp_path: Path, lives: Lives) -> None:
    rng = random.Random(random.randrange(2**32))
    for life in range(12):
        path = tmp_path / str(life) / "state.db"
        told = lives.live_until_killed(path, "plain", "normal", 0, rng.uniform(0, 0.02))
        notes: list[str] = []
        with closing(open_state(path, on_note=notes.append)) as state:
            begun = max((int(value) for word, value in told if word == "begun"), default=0)
            assert all("was empty" in note for note in notes) and not (notes and begun)
            assert not begun or state.outbox or state.front.version
            assert state.next_step() > begun


def test_every_change_is_one_commit(path: Path) -> None:
    with closing(open_state(path, limits=OutboxLimits(2, 1 << 20, "drop-oldest"))) as state:
        statements: list[str] = []
        state._file.connection.set_trace_callback(statements.append)
        for act in (
            lambda: state.begin(marked(1), {"batches": 1}),
            lambda: state.begin(marked(2)),
            lambda: state.begin(marked(3)),
            lambda: state.finish(2, front(1), {"trained": 1}),
            lambda: state.begin_run("next", front(2)),
            lambda: state.change_bundle("other", front(3)),
            lambda: state.next_step(),
        ):
            statements.clear()
            act()
            ends = [each for each in statements if each in ("COMMIT", "ROLLBACK")]
            writes = [each.split()[0] for each in statements if each.split()[0] in ("INSERT", "DELETE", "UPDATE")]
            assert statements[0] == "BEGIN IMMEDIATE" and ends == ["COMMIT"] and writes
        statements.clear()
        assert [state.next_step() for _ in range(255)] and statements == []


# ---- a disk that takes no more


def fill(state: SqliteState, size: int) -> int:
    """Begin steps until the state refuses one; returns the number of the first that was refused."""
    for number in range(1, 200):
        before = content(state)
        try:
            state.begin(OutboxStep(number, "train", (bytes(size),)), {"batches": number})
        except StateError:
            assert content(state) == before
            return number
    raise AssertionError("it was never full")


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "sealed"])
def test_a_full_disk_changes_nothing(path: Path, key: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_file, "_SETTINGS", (*state_file._SETTINGS, "max_page_count = 40"))
    with closing(open_state(path, key=key)) as state:
        refused = fill(state, 100_000)
        before = content(state)
        with pytest.raises(StateError, match="was not changed, the disk is full: free some space"):
            state.begin(OutboxStep(refused, "train", (bytes(100_000),)))
        big = FrontState(1, {"p.weight": np.zeros(200_000, np.float32)})
        with pytest.raises(StateError, match="the disk is full"):
            state.finish(1, big, {"trained": 1})
        with pytest.raises(StateError, match="the disk is full"):
            state.begin_run("next", big)
        with pytest.raises(StateError, match="the disk is full"):
            state.change_bundle("other", big)
        assert content(state) == before
    with closing(open_state(path, key=key)) as state:
        assert content(state) == before
        state.finish(1, front(1))
        state.begin(OutboxStep(refused, "train", (bytes(100_000),)))
        assert len(state.outbox) == refused - 1


def test_a_disk_that_fails_to_write_changes_nothing(path: Path) -> None:
    code = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, "tests/edge_sdk")
from test_sqlite_state import *

state = open_state(Path(sys.argv[1]), synchronous="normal")
state.begin(OutboxStep(300, "train", (bytes(1000),)))
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, unlimited[1]))
refused = fill(state, 200_000)
before = content(state)
said = []
for act in (
    lambda: state.begin(OutboxStep(refused, "train", (bytes(200_000),))),
    lambda: state.finish(300, FrontState(1, {"p.weight": np.zeros(200_000, np.float32)})),
):
    try:
        act()
    except StateError as exc:
        said.append(str(exc))
unchanged = content(state) == before
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
state.begin(OutboxStep(refused, "train", (bytes(200_000),)))
after = len(state.outbox)
state.close()
with closing(open_state(Path(sys.argv[1]))) as again:
    print(json.dumps([refused, said, unchanged, after, len(again.outbox)]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    refused, said, unchanged, after, again = json.loads(done.stdout)
    assert refused > 2 and unchanged and after == again == refused + 1
    assert len(said) == 2 and all("was not changed, the disk reports an error" in text for text in said)


def test_a_number_that_cannot_be_reserved_is_not_drawn(path: Path) -> None:
    with closing(open_state(path)) as state:
        drawn = [state.next_step() for _ in range(256)]
        state._file.connection.execute("PRAGMA query_only = ON")
        for _ in range(2):
            with pytest.raises(StateError, match="was not changed, it cannot be written"):
                state.next_step()
        state._file.connection.execute("PRAGMA query_only = OFF")
        assert state.next_step() == drawn[-1] + 1


def test_a_disk_that_turns_read_only_changes_nothing(path: Path) -> None:
    with closing(open_state(path)) as state:
        state.begin(marked(1), {"batches": 1})
        before = content(state)
        state._file.connection.execute("PRAGMA query_only = ON")
        for act in (
            lambda: state.begin(marked(2)),
            lambda: state.finish(1, front(1)),
            lambda: state.begin_run("next", front(2)),
        ):
            with pytest.raises(StateError, match=r"was not changed, it cannot be written: make .* writable"):
                act()
        assert content(state) == before
    with closing(open_state(path)) as state:
        assert content(state) == before


@pytest.mark.parametrize("case", ["folder", "file", "both"])
def test_a_read_only_place_is_told_at_the_start(case: str) -> None:
    code = """
import os, sys
from pathlib import Path
sys.path.insert(0, "tests/edge_sdk")
from test_sqlite_state import *

if os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
try:
    open_state(Path(sys.argv[1]))
except StateError as exc:
    print(exc)
"""
    folder = Path(tempfile.mkdtemp())  # not below tmp_path, which another user cannot reach
    try:
        path = folder / "state.db"
        if case != "folder":
            open_state(path).close()
            path.chmod(0o444)
        folder.chmod(0o777 if case == "file" else 0o555)
        before = path.read_bytes() if path.exists() else None
        if case == "file" and os.geteuid() != 0:
            pytest.skip("the owner of a read-only file may make it writable again, and does")
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert "it cannot be written: make the file and its folder writable" in done.stdout
        assert (path.read_bytes() if path.exists() else None) == before
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


# ---- damage


@dataclass(frozen=True, repr=False)
class Template:
    """Files as some life left them, and everything that ever was in them."""

    files: dict[str, bytes]
    history: list[tuple[Any, ...]]
    drawn: int
    key: bytes | None

    def __repr__(self) -> str:
        return f"Template of {'a sealed' if self.key else 'a plain'} state in {len(self.files)} files"


def run_a_life(path: Path, key: bytes | None) -> tuple[SqliteState, list[tuple[Any, ...]]]:
    state = open_state(path, key=key, limits=OutboxLimits(4, 1 << 20, "drop-oldest"))
    history = [content(state)]

    def did(_: object) -> None:
        history.append(content(state))

    did(state.begin_run("run", front(0)))
    for version in range(1, 9):
        number = state.next_step()
        did(
            state.begin(OutboxStep(number, "train", (bytes([number]) * 30_000,), np.ones((2, 3), np.float32)), {"n": 1})
        )
        if version > 3:
            did(state.finish(state.outbox[0].step, front(version), {"finished": version}))  # type: ignore[func-returns-value]
    return state, history


def copy_of(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir() if not each.name.endswith(".lock")}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> list[Template]:
    """A closed database, and one whose last commits stand in the log alone; each plain and sealed."""
    made = []
    for key in (None, KEY):
        folder = tmp_path_factory.mktemp("template")
        state, history = run_a_life(folder / "state.db", key)
        drawn = state.next_step()
        made.append(Template(copy_of(folder), history, drawn, key))
        state.close()
        made.append(Template(copy_of(folder), history, drawn, key))
    assert [sorted(each.files) for each in made] == 2 * [["state.db", "state.db-wal"], ["state.db"]]
    assert all(len(each.files.get("state.db-wal", b"x")) for each in made)
    return made


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damage_never_gives_wrong_data(templates: list[Template], data: st.DataObject) -> None:
    template = data.draw(st.sampled_from(templates))
    name = data.draw(st.sampled_from(sorted(template.files)))
    blob = bytearray(template.files[name])
    at = data.draw(st.integers(0, len(blob) - 1) | st.integers(0, 200))
    match data.draw(st.sampled_from(["flip", "cut", "overwrite", "move"])):
        case "flip":
            blob[at] ^= data.draw(st.integers(1, 255))
        case "cut":
            del blob[at:]
        case "overwrite":
            junk = data.draw(st.binary(min_size=1, max_size=64) | st.just(bytes(4096)))
            blob[at : at + len(junk)] = junk[: len(blob) - at]
        case _:
            page = at // 16384 * 16384
            other = data.draw(st.integers(0, len(blob) // 16384)) * 16384
            blob[page : page + 16384] = bytes(blob[other : other + 16384])
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.db"
        for each, original in template.files.items():
            (path.parent / each).write_bytes(bytes(blob) if each == name else original)
        try:
            state = open_state(path, key=template.key, on_note=notes.append)
        except StateError:
            assert path.read_bytes(), "what is refused stays"
            return
        with closing(state):
            if notes:
                assert len(notes) == 1 and ("was damaged" in notes[0] or "was empty" in notes[0])
                assert content(state)[1:] == ("", 0, *content_of_a_new_one())
                assert state.session != template.history[0][0]
                aside = [each.name for each in path.parent.iterdir() if "damaged-1" in each.name]
                assert ("was damaged" in notes[0]) == ("state.db.damaged-1" in aside)
            else:
                assert content(state) in template.history
                assert state.next_step() > template.drawn
            state.begin(marked(10_000))
            state.finish(10_000, front(1))


def content_of_a_new_one() -> tuple[Any, ...]:
    return {name: array.tobytes() for name, array in front(0).tensors.items()}, {}, ()


@pytest.mark.parametrize("at", [18, 19])
def test_a_format_that_sqlite_would_only_read_is_damage(path: Path, at: int) -> None:
    open_state(path).close()
    blob = bytearray(path.read_bytes())
    blob[at] ^= 1
    path.write_bytes(blob)
    notes: list[str] = []
    with closing(open_state(path, on_note=notes.append)) as state:
        state.begin(marked(1))
    assert len(notes) == 1 and "unknown format" in notes[0]


@pytest.mark.parametrize("junk", [bytes(100), b"\x89PNG" * 5000, bytes(range(256)) * 64], ids=["short", "long", "all"])
def test_a_damaged_file_is_set_aside_and_said_so(path: Path, junk: bytes) -> None:
    notes: list[str] = []
    for number in (1, 2):
        path.write_bytes(junk)
        with closing(open_state(path, on_note=notes.append)) as state:
            assert state.outbox == () and state.front.version == 0
        kept = path.with_name(f"state.db.damaged-{number}")
        assert kept.read_bytes() == junk
        assert len(notes) == number and str(kept) in notes[-1] and "\n" not in notes[-1]
    with closing(open_state(path)) as state:
        assert state.outbox == ()


def test_an_empty_file_gives_way_and_is_said_so(path: Path) -> None:
    path.write_bytes(b"")
    notes: list[str] = []
    open_state(path, on_note=notes.append).close()
    assert len(notes) == 1 and "was empty: a new one is begun" in notes[0]
    open_state(path).close()


def test_parts_of_different_commits_are_damage(path: Path) -> None:
    """Each row is right by itself: only the sum in ``progress`` tells that they do not belong together."""
    for statement in (
        "DELETE FROM outbox WHERE step = 1",
        "UPDATE record SET crc = (SELECT crc FROM old), value = (SELECT value FROM old) WHERE name = 'front'",
    ):
        with closing(open_state(path)) as state:
            state.begin(marked(1))
            state.begin(marked(2))
            state._file.commit(("CREATE TABLE old AS SELECT crc, value FROM record WHERE name = 'front'", ()))
            state.finish(2, front(1))
        with closing(sqlite3.connect(path)) as db, db:
            db.execute(statement)
        notes: list[str] = []
        with closing(open_state(path, on_note=notes.append)) as state:
            assert len(notes) == 1 and "parts of different commits" in notes[0]
            assert state.outbox == () and state.front.version == 0
        forget(path)


@pytest.mark.parametrize("value", [b"", b"\xff", b"\x81\x01", b"\xa0\x00"])
def test_a_record_that_is_no_map_is_damage(path: Path, value: bytes) -> None:
    with closing(open_state(path)) as state:
        state._file.commit(record("progress", value))
    notes: list[str] = []
    with closing(open_state(path, on_note=notes.append)) as state:
        assert len(notes) == 1 and "was damaged" in notes[0] and "\n" not in notes[0]


@pytest.mark.parametrize(
    "change", ["kind = 'store'", "step = 3", "position = 3", "crc = crc + 1", "payload = 'text'", "step = 'x'"]
)
def test_every_column_of_a_row_is_checked(path: Path, change: str) -> None:
    with closing(open_state(path)) as state:
        state.begin(marked(1))
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"UPDATE outbox SET {change}")
    notes: list[str] = []
    with closing(open_state(path, on_note=notes.append)) as state:
        assert len(notes) == 1 and "checksum of step" in notes[0] and state.outbox == ()


def test_damage_that_shows_later_says_to_restart(path: Path) -> None:
    limits = OutboxLimits(64, 1 << 30)
    with closing(open_state(path, limits=limits)) as state:
        for number in range(1, 17):
            state.begin(OutboxStep(number, "train", (bytes(1 << 20),)))
    with closing(open_state(path, limits=limits)) as state:
        before = content(state)
        size = path.stat().st_size
        with path.open("r+b") as stream:
            stream.seek(4 * 16384)
            stream.write(b"\xff" * (size - 4 * 16384))
        with pytest.raises(StateError, match=r"was not changed, it is damaged .*: restart, and it is set aside"):
            for number in range(1, 17):
                before = content(state)
                state.finish(number, front(number))
        assert content(state) == before
    notes: list[str] = []
    with closing(open_state(path, on_note=notes.append)) as state:
        assert len(notes) == 1 and "was damaged" in notes[0] and state.session != before[0]


# ---- whose it is


@pytest.mark.parametrize("name", OWNER)
def test_the_state_of_another_owner_is_refused(path: Path, name: str) -> None:
    with closing(open_state(path)) as state:
        state.begin(marked(1))
        before = content(state)
    kept = path.read_bytes()
    with pytest.raises(StateError, match=f"belongs to {name} '{OWNER[name]}', not to 'other'.*another file.*--fresh"):
        open_state(path, **{name: "other"})  # type: ignore[arg-type]
    assert path.read_bytes() == kept
    with closing(open_state(path)) as state:
        assert content(state) == before


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "sealed"])
def test_the_state_of_a_related_bundle_goes_over_once_and_says_so(path: Path, key: bytes | None) -> None:
    with closing(open_state(path, key=key)) as state:
        state.begin_run("run", front(4))
        state.begin(marked(state.next_step()))
        session, noise_key = state.session, state.noise_key
    with pytest.raises(StateError, match="belongs to bundle"):
        open_state(path, key=key, bundle="new", related=["unrelated"])
    notes: list[str] = []
    for _ in range(2):
        with closing(
            open_state(path, key=key, bundle="new", related=[OWNER["bundle"], "new"], on_note=notes.append)
        ) as state:
            assert (state.run, state.outbox, state.front.version) == ("", (), 0)
            assert (state.session, state.noise_key) == (session, noise_key)
    assert len(notes) == 1 and f"was of bundle {OWNER['bundle']}: it goes on with new" in notes[0]
    with pytest.raises(StateError, match="belongs to bundle"):
        open_state(path, key=key)


def test_an_open_state_belongs_to_one(path: Path) -> None:
    with closing(open_state(path)) as state:
        with pytest.raises(StateError, match="in use by another process"):
            open_state(path)
        state.begin(marked(1))


def test_forgetting_starts_afresh(path: Path) -> None:
    forget(path)
    forget(path.parent / "missing" / "state.db")
    assert list(path.parent.iterdir()) == []
    with closing(open_state(path)) as state:
        session = state.session
        with pytest.raises(StateError, match="in use"):
            forget(path)
        state.begin(marked(1))
        for side in ("-wal", "-shm", "-journal"):
            path.with_name(path.name + side).touch()
        path.with_name("state.db.damaged-1").touch()
    forget(path)
    assert [each.name for each in path.parent.iterdir()] == ["state.db.damaged-1"]
    with closing(open_state(path)) as state:
        assert state.session != session and state.outbox == ()


def test_no_clock_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def jumped() -> float:
        raise AssertionError("the clock was read")

    with monkeypatch.context() as patch:
        for name in ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter"):
            patch.setattr(time, name, jumped)
        for _ in range(2):
            state = open_state(path)
            state.begin(marked(state.next_step()))
            state.finish(state.outbox[0].step, front(1))
            state.close()
    os.utime(path, (2**33, 0))
    with closing(open_state(path)) as state:
        assert state.front.version == 1


@pytest.mark.parametrize("counters", [{"a": 0.5}, {"a": 2**63}, {"a": "1"}, {"a": None}])
def test_counters_are_whole_numbers(path: Path, counters: dict[str, Any]) -> None:
    with closing(open_state(path)) as state:
        with pytest.raises(ConfigError, match="whole number"):
            state.begin(marked(1), counters)
        assert state.outbox == ()
        state.begin(marked(1), {"a": np.int64(3)})  # type: ignore[dict-item]
        with pytest.raises(ConfigError, match="whole number"):
            state.finish(1, front(1), counters)
        assert dict(state.counters) == {"a": 3}
    with closing(open_state(path)) as state:
        assert dict(state.counters) == {"a": 3}


def test_a_front_that_has_no_encoding_is_refused_whole(path: Path) -> None:
    with closing(open_state(path)) as state:
        state.begin(marked(1))
        before = content(state)
        with pytest.raises(StateError, match=r"this front cannot be kept.*float64"):
            state.finish(1, FrontState(1, {"p.weight": np.zeros(3)}))
        assert content(state) == before
    with closing(open_state(path)) as state:
        assert content(state) == before


def test_an_unknown_setting_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="off, normal, full"):
        open_state(path, synchronous="extra")
    assert not path.exists()


@pytest.mark.parametrize("setting, level", [("off", 0), ("normal", 1), ("full", 2)])
def test_sqlite_is_told_how_durable_to_be(path: Path, setting: str, level: int) -> None:
    with closing(open_state(path, synchronous=setting)) as state:
        query = state._file.connection.execute
        assert query("PRAGMA synchronous").fetchone() == (level,)
        assert query("PRAGMA journal_mode").fetchone() == ("wal",)


def test_reserved_numbers_do_not_wait_in_the_log(path: Path, tmp_path: Path) -> None:
    """A log that a power cut shortens must not bring a number back."""
    with closing(open_state(path)) as state:
        drawn = [state.next_step() for _ in range(257)][-1]
        state.begin(marked(drawn))
        survivor = tmp_path / "after" / "state.db"
        survivor.parent.mkdir()
        shutil.copy(path, survivor)  # without its -wal
    with closing(open_state(survivor)) as state:
        assert state.outbox == () and state.next_step() > drawn


# ---- sealing


@pytest.fixture
def sealed(path: Path) -> Iterator[Path]:
    with closing(open_state(path, key=KEY)) as state:
        state.begin(marked(1))
        state.finish(1, front(1))
        state.begin(marked(2))
        assert traces(path) == [], "in the log"
    yield path


def test_nothing_of_a_sealed_step_stands_in_the_files(sealed: Path, tmp_path: Path) -> None:
    assert traces(sealed) == []
    with closing(open_state(sealed, key=KEY)) as state:
        assert content(state)[-1] == content_of_marked(2)
    plain = tmp_path / "plain" / "state.db"
    with closing(open_state(plain)) as state:
        state.begin(marked(1))
    assert len(traces(plain)) == 3, "the markers would be found"


def content_of_marked(number: int) -> tuple[Any, ...]:
    step = marked(number)
    assert step.x is not None and step.label is not None
    return ((number, "train", step.frames, step.x.tobytes(), step.label.tobytes()),)


@pytest.mark.parametrize("empty", [False, True], ids=["waiting", "empty"])
def test_a_sealed_state_needs_its_key_and_stays_as_it_is(sealed: Path, empty: bool) -> None:
    if empty:
        with closing(open_state(sealed, key=KEY)) as state:
            state.finish(2)
    before = sealed.read_bytes()
    with pytest.raises(StateError, match=r"sealed and no key is configured: give the key.*--fresh"):
        open_state(sealed)
    with pytest.raises(StateError, match=r"sealed with another key: give the key.*--fresh"):
        open_state(sealed, key=KEY[::-1])
    assert sealed.read_bytes() == before
    open_state(sealed, key=KEY).close()


def test_a_sealed_row_belongs_to_its_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_state, "_row_crc", lambda *_, **__: 0)  # as if the checksums had been forged
    with closing(open_state(path, key=KEY)) as state:
        state.begin(marked(2))
        state.begin(marked(3))
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE outbox SET step = 5 - step")
    notes: list[str] = []
    with closing(open_state(path, key=KEY, on_note=notes.append)) as state:
        assert "seal of step 3" in notes[0] and state.outbox == ()


def test_a_changed_byte_in_a_sealed_row_is_damage(sealed: Path) -> None:
    with closing(sqlite3.connect(sealed)) as db, db:
        flipped = bytearray(db.execute("SELECT payload FROM outbox").fetchone()[0])
        flipped[len(flipped) // 2] ^= 1  # where no checksum but the tag looks
        db.execute("UPDATE outbox SET payload = ?", (bytes(flipped),))
    notes: list[str] = []
    with closing(open_state(sealed, key=KEY, on_note=notes.append)) as state:
        assert "seal of step 2" in notes[0] and state.outbox == ()


def test_a_plain_state_is_sealed_when_a_key_comes(path: Path) -> None:
    with closing(open_state(path)) as state:
        for number in range(1, 6):
            state.begin(marked(number))
        for number in range(1, 4):
            state.finish(number, front(number))
        before = content(state)
    assert len(traces(path)) == 3
    with closing(open_state(path, key=KEY)) as state:
        assert content(state) == before
        assert traces(path) == []
        state.begin(marked(6))
        state.finish(4, front(4))
        before = content(state)
    assert traces(path) == []
    with closing(open_state(path, key=KEY)) as state:
        assert content(state) == before
    with pytest.raises(StateError, match="no key"):
        open_state(path)


def test_sealing_that_was_cut_off_is_ended_at_the_next_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(open_state(path)) as state:
        state.begin(marked(1))
        state.begin(marked(2))
        state.finish(1, front(1))
        before = content(state)
    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "rewrite", lambda self: (_ for _ in ()).throw(StateError("cut off")))
        with pytest.raises(StateError, match="cut off"):
            open_state(path, key=KEY)
    assert traces(path), "freed pages still hold it"
    with closing(open_state(path, key=KEY)) as state:
        assert content(state) == before and traces(path) == []
    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "rewrite", lambda self: unexpected("once is enough"))
        open_state(path, key=KEY).close()


def test_the_noise_key_is_sealed_with_the_rest_and_stays_the_same(path: Path) -> None:
    def files() -> bytes:
        return b"".join(each.read_bytes() for each in path.parent.iterdir() if each.is_file())

    with closing(open_state(path)) as state:
        key = state.noise_key
        assert key in files(), "it would be found"
    with closing(open_state(path, key=KEY)) as state:
        assert state.noise_key == key
        assert key not in files()
    with closing(open_state(path, key=KEY)) as state:
        assert state.noise_key == key
    assert key not in files()


def test_a_bad_key_makes_no_file(path: Path) -> None:
    with pytest.raises(ConfigError, match="32 bytes"):
        open_state(path, key=b"short")
    assert not path.exists()
