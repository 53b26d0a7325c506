"""A ward: the real commands over a real broker, watched line by line and ended with the test."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk import topics
from edge_sdk.batch import Samples
from edge_sdk.paho_transport import PahoTransport
from edge_sdk.transport import Connection
from edge_sdk.wire import Assembler, Limits, Message, decode_frame
from server_sdk.broker import EmbeddedBroker
from server_sdk.segments import Damage, scan

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0


class Command:
    """A command that runs; what it prints is read as it comes.

    Args:
        module: to run with ``-m``.
        arguments: of the command.
        environment: beside this process's own.
        max_file_bytes: the largest file that it may write; None: no limit.
    """

    def __init__(
        self,
        module: str,
        *arguments: object,
        cwd: Path,
        environment: dict[str, str],
        max_file_bytes: int | None = None,
    ) -> None:
        limit = [] if max_file_bytes is None else ["prlimit", f"--fsize={max_file_bytes}:"]
        self.process = subprocess.Popen(
            [*limit, sys.executable, "-m", module, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        self.events: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._readers = [threading.Thread(target=self._read, args=(stream,)) for stream in ("stdout", "stderr")]
        for reader in self._readers:
            reader.start()

    def wait(self, event: str, **fields: Any) -> dict[str, Any]:
        """The first event of that name with these fields, as soon as it was printed."""

        def found() -> list[dict[str, Any]]:
            wanted = {"event": event, **fields}
            return [each for each in self.events if wanted.items() <= each.items()]

        with self._changed:
            self._changed.wait_for(lambda: found() or not self._readers[0].is_alive(), PATIENCE_S)
            assert found(), (event, fields, self.events[-3:], self.errors)
            return found()[0]

    def of(self, event: str) -> list[dict[str, Any]]:
        """All events of that name so far."""
        return [each for each in self.events if each["event"] == event]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def limit_files(self, max_file_bytes: int | None) -> None:
        """From now on no file may be longer, as on a disk that is full; None lifts it."""
        soft = resource.RLIM_INFINITY if max_file_bytes is None else max_file_bytes
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))

    def end(self) -> int:
        """Wait for its end; its exit code."""
        code = self.process.wait(PATIENCE_S)
        for reader in self._readers:
            reader.join(PATIENCE_S)
        return code

    def one_line(self) -> str:
        """The error of a command that could not go on."""
        assert self.end() == 2, (self.process.returncode, self.errors)
        assert not any("Traceback" in line for line in self.errors)
        errors = [line for line in self.errors if line.startswith("error: ")]
        assert len(errors) == 1, self.errors
        return errors[0]

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def _read(self, name: str) -> None:
        for text in getattr(self.process, name):
            with self._changed:
                line = text.rstrip("\n")
                (self.lines if name == "stdout" else self.errors).append(line)
                if name == "stdout" and line.startswith("{"):
                    self.events.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


class Listener:
    """Reads what is published on a topic of the ward's fleet."""

    def __init__(self, port: int, topic: str) -> None:
        self._transport = PahoTransport(Connection("127.0.0.1", port), f"listener-{uuid.uuid4().hex}")
        self._transport.open()
        self._transport.subscribe(topic)
        self._assembler = Assembler(Limits())

    def until(self, wanted: Callable[[Message], bool]) -> Message:
        """The next message of that sort."""
        while True:
            received = self._transport.receive(PATIENCE_S)
            assert received is not None, "nothing was said"
            received.acknowledge()
            message = self._assembler.add(decode_frame(received.payload, Limits()))
            if message is not None and wanted(message):
                return message

    def close(self) -> None:
        self._transport.close()


class Ward:
    """Server and devices of one fleet, in a folder of their own.

    Attributes:
        folder: where the commands run; each run of the server keeps itself in ``<folder>/<out>``.
    """

    def __init__(self, port: int, folder: Path, built: dict[str, Any], samples: Callable[[int, int], Samples]) -> None:
        self.port, self.folder, self.fleet = port, folder, f"ward-{uuid.uuid4().hex}"
        self._built = built
        self._open: list[Command | Listener] = []
        train, test = samples(48, 1), samples(12, 2)
        np.savez(folder / "data.npz", x_train=train.x, y_train=train.y, x_test=test.x, y_test=test.y)

    def bundle(self, profile: str = "vanilla") -> Path:
        path = self._built[profile].path
        assert isinstance(path, Path)
        return path

    def train(self, rounds: int, *options: object, out: object = "server", profile: str = "vanilla") -> list[str]:
        """The line of ``psgl-server``: one device, batches of 6, every record is kept."""
        line = ["train", self.bundle(profile), "--rounds", rounds, "--batch", 6, "--evaluate-every", 0, "--keep-log"]
        line += ["--out", self.folder / str(out), "--json", "--port", self.port, "--fleet", self.fleet]
        return [*map(str, line), *map(str, options)]

    def server(self, rounds: int, *options: object, **how: Any) -> Command:
        return self._start("server_sdk.cli", *self.train(rounds, *options, **how))

    def device(
        self,
        name: str,
        *options: object,
        profile: str = "vanilla",
        environment: dict[str, str] | None = None,
        max_file_bytes: int | None = None,
    ) -> Command:
        """``psgl-edge run`` with its state in ``<folder>/<name>.sqlite`` and its report in ``<folder>/<name>.json``."""
        line = ["run", self.bundle(profile), "--data", self.folder / "data.npz", "--device", name, "--json"]
        line += ["--port", self.port, "--fleet", self.fleet, "--report", self.folder / f"{name}.json"]
        state = [] if "--state" in options else ["--state", self.folder / f"{name}.sqlite"]
        return self._start(
            "edge_sdk.cli", *line, *state, *options, environment=environment, max_file_bytes=max_file_bytes
        )

    def listener(self, topic: Callable[..., str], *names: str) -> Listener:
        listener = Listener(self.port, topic(self.fleet, *names))
        self._open.append(listener)
        return listener

    def announced(self) -> Message:
        """What the broker keeps of the server's word."""
        return self.listener(topics.down_model).until(lambda message: True)

    def report(self, name: str) -> dict[str, Any]:
        """What the device wrote at its end."""
        report: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return report

    def trained(self, out: object = "server") -> list[tuple[Any, ...]]:
        """Key of every step, round after round; each round is there once."""
        items = list(scan(self.folder / str(out) / "log"))
        assert not any(isinstance(item, Damage) for item in items)
        rounds = [item[0] for item in items if not isinstance(item, Damage) and item[0].kind == "round"]
        assert [record.fields["round"] for record in rounds] == list(range(1, len(rounds) + 1))
        return [tuple(key) for record in rounds for key in record.fields["steps"]]

    def close(self) -> None:
        for each in self._open:
            each.kill() if isinstance(each, Command) else each.close()

    def _start(self, module: str, *line: object, environment: dict[str, str] | None = None, **how: Any) -> Command:
        command = Command(module, *line, cwd=self.folder, environment=environment or {}, **how)
        self._open.append(command)
        return command


@pytest.fixture(scope="session")
def hub() -> Iterator[EmbeddedBroker]:
    """The broker of all wards; each is a fleet of its own."""
    with EmbeddedBroker() as embedded:
        yield embedded


@pytest.fixture
def ward(
    hub: EmbeddedBroker, tmp_path: Path, built: dict[str, Any], samples: Callable[[int, int], Samples]
) -> Iterator[Ward]:
    one = Ward(hub.port, tmp_path, built, samples)
    yield one
    one.close()


class SmallDisk:
    """A file system of a few megabytes that can be filled to the last byte."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self) -> None:
        with self._filler.open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12):
                try:
                    while file.write(b"\0" * size):
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        self._filler.unlink()

    def remount(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.path)], check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Skips where this user may not mount."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield SmallDisk(path)
    subprocess.run(["umount", "-l", str(path)], check=True, capture_output=True)
