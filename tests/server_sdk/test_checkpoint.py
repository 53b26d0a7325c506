"""Checkpoints: the old one or the new one, whole; log and checkpoints of a process that is killed again and again."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from edge_sdk.errors import ConfigError
from server_sdk import checkpoint as module
from server_sdk.checkpoint import Checkpoint, Checkpoints, facts_of
from server_sdk.errors import CheckpointError
from server_sdk.log import Log

ROOT = Path(__file__).resolve().parents[2]
CHANGING = ("open", "write", "fsync", "replace", "unlink", "mkdir", "chmod")


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
            if len(self.seen) < self._call:
                return real(*arguments, **options)
            if len(self.seen) == self._call and self._when == "within" and name == "write":
                real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            if len(self.seen) == self._call and self._when == "after":
                with suppress(OSError):
                    real(*arguments, **options)
            raise Crash

        return wrapped


def example(position: int) -> Checkpoint:
    weights = torch.full((7, 3), float(position))
    return Checkpoint(position, {"weights": weights}, {"reply": b"%d" % position * 9}, {"round": position})


def same(left: Checkpoint | None, right: Checkpoint) -> bool:
    return (
        left is not None
        and (left.position, left.blobs, left.facts) == (right.position, right.blobs, right.facts)
        and left.tensors.keys() == right.tensors.keys()
        and all(
            mine.dtype == right.tensors[name].dtype
            and mine.shape == right.tensors[name].shape
            and torch.equal(mine, right.tensors[name].cpu())
            for name, mine in left.tensors.items()
        )
    )


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow beyond ``size``: the kernel writes what fits and fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    tied = torch.randn(3, 4)
    tensors = {
        "a": tied,
        "tied": tied,
        "rows": tied[1:],
        "columns": tied.T,
        "scalar": torch.tensor(3),
        "none": torch.empty(0, 5),
        "half": torch.randn(2).to(torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "blob.x": torch.ones(1),
        "grad": torch.ones(2, requires_grad=True),
    }
    facts = {"round": 3, "sha256": "0" * 64, '"sha256":"': "ä\ud800", "steps": [["d", "s", 1]], "rate": 0.1, "no": None}
    written = Checkpoint(12, tensors, {"empty": b"", "reply/d": bytes(range(256)), "tensor.y": b"\0"}, facts)
    path = Checkpoints(tmp_path / "run" / "checkpoints").write(written)
    assert path.name == "checkpoint-000000000012.safetensors"
    read = Checkpoints(tmp_path / "run" / "checkpoints").newest()
    assert same(read, written) and facts_of(path) == facts
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    for tensor in read.tensors.values() if read else ():
        tensor.detach().zero_()  # writable, and no one else's memory
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "psgl-checkpoint" and torch.equal(file.get_tensor("tensor.a"), tied)


def test_the_oldest_give_way(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=3)
    assert kept.newest() is None and kept.positions() == ()
    for position in (0, 1, 7, 10, 100):
        kept.write(example(position))
        assert same(kept.newest(), example(position))
    assert kept.positions() == (7, 10, 100)
    assert same(Checkpoints(tmp_path, keep=1).newest(), example(100))
    Checkpoints(tmp_path, keep=1).write(example(100))
    assert kept.positions() == (100,) and len(list(tmp_path.iterdir())) == 1
    for position in (99, 10**12):
        with pytest.raises(CheckpointError, match="folder of its own"):
            kept.write(example(position))
    with pytest.raises(ConfigError):
        Checkpoints(tmp_path, keep=0)


def test_any_changed_or_missing_byte_is_noticed_and_the_one_before_is_used(tmp_path: Path) -> None:
    notes: list[str] = []
    kept = Checkpoints(tmp_path, on_note=notes.append)
    kept.write(example(1))
    path = kept.write(example(2))
    data = path.read_bytes()
    aside = path.with_name(path.name + ".damaged")
    changed = [data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] for at in range(len(data))]
    for damaged in [*changed, *(data[:length] for length in range(0, len(data), 5)), data + b"\0"]:
        path.write_bytes(damaged)
        assert same(kept.newest(), example(1))
        assert aside.read_bytes() == damaged and kept.positions() == (1,)
        assert f"{path} is damaged" in notes.pop() and not notes
    path.write_bytes(changed[-1])
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        facts_of(path)
    path.rename(path.with_name("checkpoint-000000000003.safetensors"))
    assert same(kept.newest(), example(1))


def test_a_whole_checkpoint_under_the_name_of_another_is_not_taken(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    path = kept.write(example(1))
    shutil.copy(path, tmp_path / "checkpoint-000000000009.safetensors")
    assert same(kept.newest(), example(1)) and kept.positions() == (1,)


@pytest.mark.parametrize("name", ["FORMAT", "VERSION"])
def test_another_format_or_version_is_said_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, name, "99")
        path = Checkpoints(tmp_path).write(example(5))
    for read in (Checkpoints(tmp_path).newest, lambda: facts_of(path)):
        with pytest.raises(CheckpointError, match=r"99.*use the SDK that wrote it"):
            read()
    assert path.exists()


@pytest.mark.parametrize(
    "header", [b"", b"[]", b"{}", b'{"__metadata__":1}', b'{"__metadata__":{"sha256":3}}', b"\xff{"]
)
def test_what_is_no_checkpoint_is_set_aside(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "checkpoint-000000000005.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert Checkpoints(tmp_path).newest() is None and not path.exists()
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    assert Checkpoints(tmp_path).newest() is None and not path.exists()


def test_lengths_are_compared_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-000000000005.safetensors"
    with path.open("wb") as file:
        file.write((1 << 32).to_bytes(8, "little"))
        file.truncate(5 << 30)  # sparse
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="damaged"):
        facts_of(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "facts", [{1: 2}, {"a": (1, 2)}, {"a": float("nan")}, {"a": b""}, {"a": {2: 1}}, {"a": "x" * (1 << 20)}]
)
def test_facts_are_small_plain_data(tmp_path: Path, facts: dict[Any, Any]) -> None:
    with pytest.raises(CheckpointError, match="facts"):
        Checkpoints(tmp_path).write(Checkpoint(1, {}, {}, facts))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tensors", [{"a": torch.eye(3).to_sparse()}, {"\ud800": torch.eye(3)}])
def test_what_safetensors_cannot_hold(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError, match="position 1 cannot be encoded"):
        Checkpoints(tmp_path).write(Checkpoint(1, tensors, {}, {}))
    assert not list(tmp_path.iterdir())


# Disks that fail


@pytest.mark.parametrize("room", [0, 100])
def test_a_full_disk_leaves_the_older_ones(tmp_path: Path, room: int) -> None:
    kept = Checkpoints(tmp_path)
    kept.write(example(1))
    with file_limit(room), pytest.raises(CheckpointError, match="free space"):
        kept.write(example(2))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000000001.safetensors"]
    assert same(kept.newest(), example(1))
    kept.write(example(2))
    assert same(kept.newest(), example(2))


@pytest.mark.parametrize("name", ["open", "fsync", "replace"])
def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    kept = Checkpoints(tmp_path)
    for position in (1, 2):
        kept.write(example(position))
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(CheckpointError, match="Read-only file system: free space on its disk or make it writable"):
            kept.write(example(3))
    assert kept.positions() == (1, 2) and len(list(tmp_path.iterdir())) == 2


def test_a_folder_entry_that_is_not_on_the_disk_does_not_let_the_old_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: int) -> None:
        if os.fstat(file).st_mode & 0o40000:
            raise OSError(errno.EIO, "Input/output error")

    kept = Checkpoints(tmp_path)
    for position in (1, 2):
        kept.write(example(position))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            kept.write(example(3))
    assert kept.positions()[:2] == (1, 2)


def test_an_old_one_that_stays_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    notes: list[str] = []
    kept = Checkpoints(tmp_path, keep=1, on_note=notes.append)
    kept.write(example(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail)
        kept.write(example(2))
    assert notes == ["the old checkpoint 1 cannot be deleted: Operation not permitted"]
    kept.write(example(3))
    assert kept.positions() == (3,)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="make it writable"):
        Checkpoints(tmp_path / "file")
    (tmp_path / "open").mkdir(mode=0o755)
    Checkpoints(tmp_path / "open")
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").rmdir()
    with pytest.raises(CheckpointError):
        facts_of(tmp_path / "checkpoint-000000000001.safetensors")


# Crashes


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_a_crash_at_every_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, keep: int) -> None:
    seen: list[str] = []
    found = set()
    for call in itertools.count(1):
        folder = tmp_path / f"crash-{call}"
        kept = Checkpoints(folder, keep=keep)
        for position in (1, 2):
            kept.write(example(position))
        (folder / "checkpoint-000000000002.safetensors.partial").write_bytes(b"of a crash before")
        with monkeypatch.context() as patch:
            crash = CrashAt(patch, call, when)
            seen = crash.seen
            try:
                Checkpoints(folder, keep=keep).write(example(3))
            except Crash:
                pass
            else:
                break
        notes: list[str] = []
        after = Checkpoints(folder, keep=keep, on_note=notes.append)
        newest = after.newest()
        assert same(newest, example(2)) or same(newest, example(3)), f"{seen[-1]} lost both"
        found.add(newest.position if newest else 0)
        assert not notes, "nothing that lies under a checkpoint's name is ever half of one"
        after.write(example(4))
        assert same(after.newest(), example(4)) and after.positions() == ((4,), (newest.position, 4))[keep - 1]
        assert len(list(folder.iterdir())) == keep
    assert seen == ["mkdir", "unlink", "open", "write", "fsync", "replace", "fsync", "unlink"]
    assert found == {2, 3}


WORKER = """
import os, signal, sys, torch, safetensors.torch
from pathlib import Path
from server_sdk.checkpoint import Checkpoint, Checkpoints
from server_sdk.log import Log

def work(folder):
    say = lambda text: os.write(1, (text + "\\n").encode())
    log, kept = Log(folder / "log"), Checkpoints(folder / "checkpoints")
    newest = kept.newest()
    for record, _ in log.read(newest.position + 1 if newest else 1):
        assert record.body == bytes([record.position % 251]) * 30000
    while True:
        position = log.next_position
        log.append("step", {"step": position}, bytes([position % 251]) * 30000)
        say(f"logged {position}")
        if position % 3 == 0:
            log.flush()
            kept.write(Checkpoint(position, {"w": torch.full((9000,), position)}, {"b": b"x" * 999}, {"at": position}))
            say(f"kept {position}")
            log.rotate()
            log.drop_before(kept.positions()[0] + 1)

for line in sys.stdin:  # this process has paid for importing torch once: each worker is a fork of it
    child = os.fork()
    if not child:
        work(Path(line.strip()))
    os.write(1, f"started {child}\\n".encode())
    _, status = os.waitpid(child, 0)
    os.write(1, f"ended {status}\\n".encode())
"""


def test_a_process_that_is_killed_again_and_again_loses_nothing(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as parent:
        assert parent.stdin and parent.stdout
        said = {"logged": 0, "kept": 0}
        for life in range(16):
            parent.stdin.write(f"{tmp_path}\n")
            parent.stdin.flush()
            child, status, patience = 0, None, draw.randint(1, 25)
            while status is None:
                word, number = parent.stdout.readline().split()
                if word == "started":
                    child = int(number)
                elif word == "ended":
                    status = int(number)
                else:
                    said[word] = int(number)
                    patience -= 1
                if child and patience <= 0:
                    os.kill(child, 9)
                    patience = 1 << 30
            assert status == 9, f"life {life} ended by itself"
            shutil.copytree(tmp_path, tmp_path.with_name("copy"))
            log = Log(tmp_path.with_name("copy") / "log")
            newest = Checkpoints(tmp_path.with_name("copy") / "checkpoints").newest()
            assert log.next_position - 1 - said["logged"] in (0, 1)
            position = newest.position if newest else 0
            assert position - said["kept"] in (0, 3)
            if newest:
                assert (
                    torch.equal(newest.tensors["w"], torch.full((9000,), position)) and newest.facts["at"] == position
                )
            behind = list(log.read(position + 1))
            assert [record.position for record, _ in behind] == list(range(position + 1, log.next_position))
            assert all(record.body == bytes([record.position % 251]) * 30000 for record, _ in behind)
            log.close()
            shutil.rmtree(tmp_path.with_name("copy"))
        parent.stdin.close()
        assert parent.wait(20) == 0
    assert said["kept"] > 15


def test_reading_facts_does_not_wait_for_torch(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).write(example(4))
    code = (
        "import json, sys; from pathlib import Path; from server_sdk.checkpoint import facts_of\n"
        "print(json.dumps(facts_of(Path(sys.argv[1])))); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and json.loads(done.stdout) == {"round": 4}, done.stderr
