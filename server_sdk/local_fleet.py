"""One training run as real processes on this machine: a server and its devices, each by the command an operator types.

For demonstrations, benchmarks and tests of the whole.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from server_sdk.broker import EmbeddedBroker
from server_sdk.child import Child
from server_sdk.errors import ServerError

__all__ = ["FleetOptions", "FleetRun", "run_fleet"]

Event = dict[str, Any]


@dataclass(frozen=True)
class FleetOptions:
    """What one run is.

    Attributes:
        folder: where its files go; its name is the fleet's.
        bundle: the bundle of server and devices.
        shards: one data file for each device.
        server: further arguments of ``psgl-server train``.
        device: further arguments of ``psgl-edge run``, the same for each device.
    """

    folder: Path
    bundle: Path
    shards: tuple[Path, ...]
    server: tuple[str, ...] = ()
    device: tuple[str, ...] = ()


@dataclass
class FleetRun:
    """What a run left.

    Attributes:
        figures: the server's ``result.json``.
        devices: each device's own report.
        curve: (round, shares) of each evaluation.
        losses: the loss of each round.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    devices: list[dict[str, Any]] = field(default_factory=list)
    curve: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def run_fleet(options: FleetOptions, broker: EmbeddedBroker, run: FleetRun) -> Iterator[Event]:
    """Run server and devices to the end; yields the server's events and fills ``run``.

    A broker that dies is started again on its port; closing the iterator ends every process.

    Raises:
        ServerError: a process gave up; the text is its own last line.
    """
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    broker_options = ["--host", broker.host, "--port", str(broker.port), "--fleet", folder.name]
    children: dict[str, Child] = {}
    events: queue.Queue[Event] = queue.Queue()
    logs: list[IO[bytes]] = []

    def start(name: str, module: str, arguments: list[str], *, piped: bool = False) -> Child:
        log = (folder / f"{name}.log").open("wb")
        logs.append(log)
        command = [sys.executable, "-m", module, *arguments, *broker_options]
        children[name] = Child(command, stdout=subprocess.PIPE if piped else log, stderr=log)
        return children[name]

    try:
        server = start(
            "server",
            "server_sdk.cli",
            [
                *("train", str(options.bundle), "--json", "--out", str(folder), "--fresh"),
                *("--devices", str(len(options.shards)), *options.server),
            ],
            piped=True,
        )
        reader = threading.Thread(target=_read_events, args=(server.process.stdout, events), daemon=True)
        reader.start()
        for number, shard in enumerate(options.shards, start=1):
            name = f"device-{number}"
            start(
                name,
                "edge_sdk.cli",
                [
                    *("run", str(options.bundle), "--data", str(shard), "--device", name, "--json"),
                    *("--state", str(folder / f"{name}.sqlite"), "--fresh"),
                    *(
                        "--save-front",
                        str(folder / f"{name}.front.cbor"),
                        "--report",
                        str(folder / f"{name}.json"),
                    ),
                    *options.device,
                ],
            )
        while any(child.alive for child in children.values()) or reader.is_alive() or not events.empty():
            try:
                event = events.get(timeout=0.2)
            except queue.Empty:
                _watch(children, folder)
                if not broker.alive and server.alive:
                    broker.restart()
                    yield {"event": "broker", "why": "it died and was started again on its port"}
                continue
            if event["event"] == "round":
                run.losses.append(float(event["loss"]))
            elif event["event"] == "evaluation":
                run.curve.append((int(event["round"]), event))
            elif event["event"] == "end":
                run.figures = event
            yield event
        _watch(children, folder)
        run.devices = [
            json.loads((folder / f"device-{number}.json").read_text()) for number in range(1, len(options.shards) + 1)
        ]
    finally:
        for child in children.values():
            if child.alive:
                child.process.terminate()
        for child in children.values():
            child.end()
        for log in logs:
            log.close()


def _read_events(stream: IO[bytes] | None, events: queue.Queue[Event]) -> None:
    for line in stream or ():
        try:
            events.put(json.loads(line))
        except ValueError:
            events.put({"event": "output", "text": line.decode(errors="replace").strip()})


def _watch(children: dict[str, Child], folder: Path) -> None:
    """Raise for the first process that gave up."""
    for name, child in children.items():
        code = child.process.poll()
        if code:
            lines = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
            said = next((line for line in reversed(lines) if line.startswith("error: ")), "").removeprefix("error: ")
            raise ServerError(f"{name} ended with code {code}: {said or 'see ' + str(folder / f'{name}.log')}")
