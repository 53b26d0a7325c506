"""What it costs that nothing is lost: steps a second of ``benchmarks.step``'s one device under each way to keep them.

A fleet whose server keeps nothing (``--durability off``) and whose device leaves its database to the system
(``--state-sync off``) is what all others are compared with, in the same turn. A quick run measures only the default
and the strictest. Beside them stand the single writes in milliseconds: means of 40 in a row (checkpoints: of 10), so
that what comes once in many (SQLite writing its log back) has its share, and of these means the median.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.figures import options, print_figures, ratio
from benchmarks.step import prepare, rounds_a_second, server_options
from edge_sdk.bundle import load_bundle
from edge_sdk.front import FrontState
from edge_sdk.memory import keep_freed_memory
from edge_sdk.sqlite_state import SqliteState
from edge_sdk.state import OutboxStep
from server_sdk.assembly import back_path, trainer_from
from server_sdk.broker import EmbeddedBroker
from server_sdk.checkpoint import Checkpoint, Checkpoints
from server_sdk.local_fleet import FleetOptions
from server_sdk.log import Log

__all__ = ["main"]

_IN_A_ROW = 40
_FRAME_BYTES, _BATCH_SHAPE = 400_000, (64, 1, 28, 28)  # 600 kB together
_WIRE = ("--codec", "float32", "--chunk-bytes", "262144")


@dataclass(frozen=True)
class _Way:
    """One way to keep steps.

    Attributes:
        server, device: arguments of the commands.
        sealed: the device's state is encrypted.
        quick: measured in a quick run, too.
        lost: what a loss of power takes. A killed process takes the same where the server keeps no log, else nothing.
    """

    server: tuple[str, ...]
    device: tuple[str, ...]
    lost: str
    sealed: bool = False
    quick: bool = False


def _server(mode: str, sync: str = "never") -> tuple[str, ...]:
    return "--durability", mode, "--sync", sync


def _device(sync: str) -> tuple[str, ...]:
    return "--state-sync", sync


_OFF = "off"
_WAYS = {
    _OFF: _Way(_server("off"), _device("off"), "the run", quick=True),
    "server_checkpoint": _Way(_server("checkpoint"), _device("off"), "since checkpoint"),
    "log_never": _Way(_server("log"), _device("off"), "about 30 s"),
    "log_checkpoint": _Way(_server("log", "checkpoint"), _device("off"), "since checkpoint"),
    "log_20ms": _Way(_server("log", "20"), _device("off"), "about 20 ms; device: some steps"),
    "log_always": _Way(_server("log", "always"), _device("off"), "device: some steps"),
    "state_normal": _Way(_server("off"), _device("normal"), "the run"),
    "state_full": _Way(_server("off"), _device("full"), "the run"),
    "state_sealed": _Way(_server("off"), _device("normal"), "the run", sealed=True),
    "default": _Way(_server("log"), _device("normal"), "about 30 s", quick=True),
    "strictest": _Way(_server("log", "always"), _device("full"), "nothing", sealed=True, quick=True),
}


def main() -> int:
    """Measure and print."""
    parser = options("durability", __doc__.split("\n")[0])
    parser.add_argument("--only", choices=("fleets", "writes"), help="measure one half (default: both)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    pairs, rounds, blocks = (2, 100, 3) if arguments.quick else (5, 300, 15)
    speeds: dict[str, list[float]] = {}
    writes: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        bundle, shard, _ = prepare(root)
        if arguments.only != "writes":
            ways = {name: way for name, way in _WAYS.items() if way.quick or not arguments.quick}
            speeds = _fleets(root, bundle, shard, ways, pairs, rounds)
        if arguments.only != "fleets":
            writes = _writes(root, bundle, blocks)
    figures = {f"durability.{name}_vs_off": ratio(values, speeds[_OFF]) for name, values in speeds.items()}
    figures |= {f"durability.{name}_steps_s": median(values) for name, values in speeds.items()}
    figures |= {f"durability.{name}": median(values) for name, values in writes.items()}
    figures.pop(f"durability.{_OFF}_vs_off", None)
    _print_tables(speeds, writes, Console(stderr=arguments.json))
    print_figures(figures, {**speeds, **writes}, as_json=arguments.json)
    return 0


def _fleets(
    root: Path, bundle: Path, shard: Path, ways: dict[str, _Way], pairs: int, rounds: int
) -> dict[str, list[float]]:
    """Steps a second of each way, all of them in each turn."""
    key = root / "key"
    key.touch(mode=0o600)
    key.write_text(secrets.token_hex(32))
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    with EmbeddedBroker() as broker:
        for pair in range(pairs):
            for name, way in list(ways.items())[:: -1 if pair % 2 else 1]:  # a drift of the machine cancels
                fleet = FleetOptions(
                    root / f"{name}-{pair}",
                    bundle,
                    (shard,),
                    server=(*server_options(rounds), *_WIRE, *way.server),
                    device=(*_WIRE, *way.device, *(("--state-key-file", str(key)) if way.sealed else ())),
                )
                speeds[name].append(rounds_a_second(fleet, broker))
    return speeds


def _writes(root: Path, bundle: Path, blocks: int) -> dict[str, list[float]]:
    """Mean milliseconds of each single write in each block."""
    with ExitStack() as stack:
        measures: dict[str, Callable[[], dict[str, float]]] = {}
        for name, sync in (("never", "never"), ("checkpoint", "checkpoint"), ("20ms", 20.0), ("always", "always")):
            log = stack.enter_context(closing(Log(root / f"log-{name}", sync=sync)))
            measures[f"log {name}"] = partial(_append, log, name)
        front = FrontState(0, dict(load_bundle(bundle).initial))
        ways: dict[str, Literal["off", "normal", "full"]] = {
            "off": "off",
            "normal": "normal",
            "full": "full",
            "sealed": "normal",
        }
        for name, synchronous in ways.items():
            state = SqliteState(
                root / f"{name}.sqlite",
                front,
                bundle="b",
                fleet="f",
                device="d",
                key=secrets.token_bytes(32) if name == "sealed" else None,
                synchronous=synchronous,
                on_note=print,
            )
            stack.enter_context(closing(state))
            measures[f"state {name}"] = partial(_begin_and_finish, state, name)
        trainer = trainer_from(load_bundle(bundle), back_path(bundle), rounds=1, learning_rate=0.1, optimizer="adam")
        checkpoints = Checkpoints(root / "checkpoints")
        measures["checkpoint"] = partial(_checkpoint, checkpoints, count(1), trainer.state_dict())
        means: dict[str, list[float]] = {}
        for block in range(blocks + 1):
            for measure in measures.values():
                for name, milliseconds in measure().items():
                    if block:  # the first warms up
                        means.setdefault(name, []).append(milliseconds)
    return means


def _append(log: Log, name: str) -> dict[str, float]:
    body = bytes(_FRAME_BYTES)
    fields = {"device": "device-1", "kind": "train", "session": "0123456789abcdef", "step": 1}
    seconds = [_seconds(partial(log.append, "step", fields, body)) for _ in range(_IN_A_ROW)]
    log.rotate()
    log.drop_before(log.next_position)
    return {f"append_400k_{name}_ms": _mean_ms(seconds)}


def _begin_and_finish(state: SqliteState, name: str) -> dict[str, float]:
    frames, x = (bytes(_FRAME_BYTES // 2),) * 2, np.zeros(_BATCH_SHAPE, np.float32)
    begins, finishes = [], []
    for _ in range(_IN_A_ROW):
        step = OutboxStep(state.next_step(), "train", frames, x)
        begins.append(_seconds(partial(state.begin, step, {"batches": step.step})))
        after = FrontState(state.front.version + 1, state.front.tensors)
        finishes.append(_seconds(partial(state.finish, step.step, after, {"trained": step.step})))
    return {f"begin_600k_{name}_ms": _mean_ms(begins), f"finish_600k_{name}_ms": _mean_ms(finishes)}


def _checkpoint(
    checkpoints: Checkpoints, positions: Iterator[int], tensors: dict[str, torch.Tensor]
) -> dict[str, float]:
    replies = {f"reply.{number}.0": bytes(_FRAME_BYTES) for number in range(2)}
    made = [Checkpoint(next(positions), tensors, replies, {"round": 1}) for _ in range(_IN_A_ROW // 4)]
    return {"checkpoint_ms": _mean_ms([_seconds(partial(checkpoints.write, each)) for each in made])}


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _mean_ms(seconds: list[float]) -> float:
    return 1000 * sum(seconds) / len(seconds)


def _print_tables(speeds: dict[str, list[float]], writes: dict[str, list[float]], console: Console) -> None:
    if speeds:
        table = Table("way", "server", "device", "steps/s", "of off", "power loss takes", title="one device")
        for name, values in speeds.items():
            way = _WAYS[name]
            server = way.server[1] + (f", sync {way.server[3]}" if way.server[1] == "log" else "")
            device = f"sync {way.device[1]}" + (", sealed" if way.sealed else "")
            share = f"{ratio(values, speeds[_OFF]):.0%}"
            table.add_row(name, server, device, f"{median(values):.1f}", share, way.lost)
        console.print(table)
    if writes:
        table = Table("single write", "ms (mean)", title="single writes")
        for name, values in writes.items():
            table.add_row(name.removesuffix("_ms"), f"{median(values):.3f}")
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
