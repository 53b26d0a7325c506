"""Kill devices, broker and server again and again, disturb the network, and look whether anything was lost.

Three devices train over Mosquitto without persistence, behind a proxy that cuts, stalls, splits and repeats. Each kill
is a kill -9 at an instant that the seed chooses; the process is started again with the same command. In the end the log
is replayed by an undisturbed twin: same steps, same order, same bits. Runs for the policies rounds, async, shared and
frozen; a figure over all of them is the worst one.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

from benchmarks.chaos_check import Verdict, check
from benchmarks.figures import options, print_figures
from edge_sdk.dataset import load_dataset, save_dataset
from examples.quickstart.data import divide, load
from export.build import build_bundle, prepare_guide
from export.options import BuildOptions, class_names
from server_sdk.broker import EmbeddedBroker
from server_sdk.child import Child
from server_sdk.errors import ServerError
from server_sdk.plan import TrainingPlan

__all__ = ["main"]

_RATE = 2e-3
_SECONDS_A_KILL = 5.0
_TARGETS = ("device", "broker", "server")
Event = dict[str, Any]


@dataclass(frozen=True)
class Kill:
    """A kill -9 to come.

    Attributes:
        progress: it comes when the run has come this far (``Ward.progress``),
        pause_s: and so many seconds later.
        target: ``broker``, ``server`` or a device's name.
    """

    progress: float
    pause_s: float
    target: str


@dataclass
class Recovery:
    """How long it took after a kill until the target had part in the training again."""

    target: str
    at_s: float
    back: bool  # who was cut off has announced itself again
    seconds: float = 0.0


@dataclass
class Ward:
    """One run as real processes, which are started again whenever they end without being done."""

    folder: Path
    bundle: Path
    shards: tuple[Path, ...]
    plan: TrainingPlan
    seed: int
    broker: EmbeddedBroker
    port: int
    kills: list[Kill]
    limit_s: float
    kill_counts: Counter[str] = field(default_factory=Counter)
    recoveries: list[Recovery] = field(default_factory=list)
    restarts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._events: queue.Queue[Event] = queue.Queue()
        self._children: dict[str, Child] = {}
        self._logs: list[IO[bytes]] = []
        self._round = 0
        self._stored: dict[str, int] = {}
        self._open: list[Recovery] = []

    @property
    def progress(self) -> float:
        """Share of the run that is done: rounds, and for frozen fronts samples as well, half and half."""
        rounds = self._round / self.plan.rounds
        if self.plan.fronts != "frozen":
            return rounds
        total = sum(self._totals.values())
        return 0.5 * rounds + 0.5 * sum(self._stored.values()) / total

    def run(self) -> None:
        """Run to the end.

        Raises:
            ServerError: it takes longer than ``limit_s``.
        """
        self._totals = {name: _size(shard) for name, shard in zip(self._names(), self.shards, strict=True)}
        began = time.monotonic()
        try:
            for name in ("server", *self._names()):
                self._start(name)
            while not self._done():
                if time.monotonic() - began > self.limit_s:
                    raise ServerError(
                        f"the run is not done after {self.limit_s:.0f} s (round {self._round}): see {self.folder}"
                    )
                self._look(0.02)
                if self.kills and self.progress >= self.kills[0].progress:
                    self._kill(self.kills.pop(0))
                self._revive()
            self.seconds = time.monotonic() - began
        finally:
            for child in self._children.values():
                child.end()
            for log in self._logs:
                log.close()

    def _names(self) -> list[str]:
        return [f"device-{number}" for number in range(1, len(self.shards) + 1)]

    def _done(self) -> bool:
        return all(child.process.poll() == 0 for child in self._children.values())

    def _start(self, name: str) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        self._logs.append(log)
        broker = ("--host", "127.0.0.1", "--port", str(self.port), "--fleet", "chaos")
        arguments = self._server() if name == "server" else self._device(name)
        child = Child(
            [sys.executable, "-m", *arguments, *broker],
            stdout=subprocess.PIPE if name == "server" else log,
            stderr=log,
        )
        self._children[name] = child
        if name == "server":
            threading.Thread(target=self._read, args=(child.process.stdout,), daemon=True).start()

    def _server(self) -> tuple[str, ...]:
        plan = self.plan
        return (
            *("server_sdk.cli", "train", str(self.bundle), "--json", "--resume", "--keep-log"),
            *("--out", str(self.folder), "--devices", str(plan.devices), "--rounds", str(plan.rounds)),
            *("--batch", str(plan.batch), "--evaluate-every", "0", "--learning-rate", str(_RATE)),
            *("--schedule", plan.schedule, "--fronts", plan.fronts, "--checkpoint-every", "25"),
            *("--synchronise-every", str(plan.synchronise_every), "--seed", str(plan.seed)),
        )

    def _device(self, name: str) -> tuple[str, ...]:
        shard = self.shards[self._names().index(name)]
        return (
            *("edge_sdk.cli", "run", str(self.bundle), "--data", str(shard), "--device", name, "--json"),
            *("--seed", str(self.seed), "--state", str(self.folder / f"{name}.sqlite")),
            *("--save-front", str(self.folder / f"{name}.front.cbor")),
            *("--report", str(self.folder / f"{name}.json")),
        )

    def _read(self, stream: IO[bytes] | None) -> None:
        for line in stream or ():
            try:
                self._events.put(json.loads(line))
            except ValueError:
                self._events.put({"event": "output"})

    def _look(self, timeout_s: float) -> None:
        """Take what the server said."""
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return
        if event["event"] == "round":
            self._round = max(self._round, int(event["round"]))
            self._recovered(event["devices"], float(event["at_s"]))
        elif event["event"] == "device" and event["status"] not in ("offline", "done"):
            for recovery in self._open:
                if event["at_s"] > recovery.at_s and recovery.target in ("broker", event["device"]):
                    recovery.back = True
        elif event["event"] == "stored":
            self._stored[event["device"]] = int(event["samples"])
            self._recovered([event["device"]], float(event["at_s"]))

    def _recovered(self, devices: list[str], at_s: float) -> None:
        """Note which kills were before this event; the clock is the machine's, so the server's times compare."""
        for recovery in tuple(self._open):
            mine = recovery.target in ("broker", "server") or recovery.target in devices
            if mine and recovery.back and at_s > recovery.at_s:
                recovery.seconds = at_s - recovery.at_s
                self.recoveries.append(recovery)
                self._open.remove(recovery)

    def _kill(self, kill: Kill) -> None:
        time.sleep(kill.pause_s)  # the instant is the seed's, not the event's
        at_s = time.monotonic()
        if kill.target == "broker":
            self.broker.kill()
            self.broker.restart()
        else:
            if self._children[kill.target].process.poll() == 0:
                return
            self._children[kill.target].process.kill()
            self._children[kill.target].process.wait(10)
            self._start(kill.target)
        self.kill_counts["device" if kill.target in self._names() else kill.target] += 1
        self._open.append(Recovery(kill.target, at_s, kill.target == "server"))

    def _revive(self) -> None:
        """Start again what ended by itself without being done, as an operator's supervisor would."""
        for name, child in tuple(self._children.items()):
            if child.process.poll():
                self.restarts[name] += 1
                if self.restarts[name] > 50:
                    raise ServerError(f"{name} ends again and again: see {self.folder / f'{name}.log'}")
                self._start(name)


def main() -> int:
    """Run and print."""
    parser = options("chaos", __doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of kills, proxy and data order (default %(default)s)")
    parser.add_argument("--policies", default="rounds,async,shared,frozen", help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="steps of each device (default 300, quick 60)")
    parser.add_argument("--kills", type=int, help="kills of each of devices, broker and server (default 10, quick 2)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs' folders here")
    arguments = parser.parse_args()
    steps = arguments.steps or (60 if arguments.quick else 300)
    kills = arguments.kills or (2 if arguments.quick else 10)
    figures: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    verdicts: dict[str, Verdict] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary)
        bundle, shards = _prepare(root, arguments.seed)
        for policy in arguments.policies.split(","):
            verdicts[policy] = _measure(root, bundle, shards, policy, steps, kills, arguments.seed, figures, samples)
    per_policy = {name: value for name, value in figures.items() if name.count(".") > 1}
    for name in ("kills_device", "kills_broker", "kills_server", "weights_equal"):
        figures[f"chaos.{name}"] = min(v for k, v in per_policy.items() if k.endswith(f".{name}"))
    for name in ("lost_steps", "repeated_steps", "time_vs_undisturbed", "time_vs_allowed"):
        figures[f"chaos.{name}"] = max(v for k, v in per_policy.items() if k.endswith(f".{name}"))
    print_figures(figures, samples, as_json=arguments.json)
    for policy, verdict in verdicts.items():
        for difference in verdict.differences[:10]:
            print(f"{policy}: {difference}", file=sys.stderr)
    good = not figures["chaos.lost_steps"] and not figures["chaos.repeated_steps"] and figures["chaos.weights_equal"]
    return 0 if good else 1


def _prepare(root: Path, seed: int) -> tuple[Path, tuple[Path, ...]]:
    """A bundle of the paper's profile and three shards of MNIST."""
    division = divide(*load(None, seed), 3, seed)
    shards = []
    for number, (train, test) in enumerate(division.shards, start=1):
        shards.append(root / f"shard-{number}.npz")
        save_dataset(shards[-1], train, test)
    built = BuildOptions("paper", (1, 28, 28), class_names(division.classes), seed=seed)
    guide = prepare_guide(division.guide, division.classes, seed=seed, epochs=5)
    return build_bundle(root / "net.psgl", built, guide).bundle, tuple(shards)


def _plan(policy: str, steps: int, devices: int) -> TrainingPlan:
    plan = TrainingPlan(devices=devices, rounds=steps, batch=8, synchronise_every=10)
    if policy == "async":
        return dataclasses.replace(plan, schedule="async", rounds=devices * steps)
    if policy == "shared":
        return dataclasses.replace(plan, fronts="shared")
    if policy == "frozen":
        return dataclasses.replace(plan, fronts="frozen")
    return plan


def _measure(
    root: Path,
    bundle: Path,
    shards: tuple[Path, ...],
    policy: str,
    steps: int,
    kills: int,
    seed: int,
    figures: dict[str, float],
    samples: dict[str, list[float]],
) -> Verdict:
    """Run a policy undisturbed and disturbed, and check what the disturbed run left."""
    plan = _plan(policy, steps, len(shards))
    generator = random.Random(f"{seed} {policy}")
    planned = _kills(generator, kills, len(shards))
    with EmbeddedBroker("mosquitto") as broker:
        quiet = Ward(root / f"{policy}-quiet", bundle, shards, plan, seed, broker, broker.port, [], 900.0)
        quiet.run()
        _say(f"{policy}: undisturbed {quiet.seconds:.1f} s; seed {seed}, {len(planned)} kills to come")
        proxy = _Proxy(broker.port, seed)
        limit_s = 4 * quiet.seconds + 2 * _SECONDS_A_KILL * len(planned) + 60
        ward = Ward(root / f"{policy}-chaos", bundle, shards, plan, seed, broker, proxy.port, planned, limit_s)
        try:
            ward.run()
        finally:
            faults = proxy.stop()
    verdict = check(ward.folder, bundle, shards, plan, learning_rate=_RATE, seed=seed)
    count = sum(ward.kill_counts.values())
    times = {target: [r.seconds for r in ward.recoveries if r.target.startswith(target)] for target in _TARGETS}
    key = f"chaos.{policy}"
    figures |= {f"{key}.kills_{target}": ward.kill_counts[target] for target in _TARGETS}
    figures |= {
        f"{key}.lost_steps": verdict.lost,
        f"{key}.repeated_steps": verdict.repeated,
        f"{key}.weights_equal": int(verdict.equal),
        f"{key}.time_vs_undisturbed": ward.seconds / quiet.seconds,
        f"{key}.time_vs_allowed": ward.seconds / (3 * quiet.seconds + _SECONDS_A_KILL * count),
        **{f"{key}.proxy_{name}": faults.get(name, 0) for name in ("cut", "stall", "split", "repeat")},
        **{f"{key}.recovery_{target}_s": median(values or [0.0]) for target, values in times.items()},
    }
    samples |= {f"{key}.recovery_{target}_s": values for target, values in times.items()}
    samples |= {f"{key}.seconds": [quiet.seconds, ward.seconds]}
    _say(
        f"{policy}: disturbed {ward.seconds:.1f} s, kills {dict(ward.kill_counts)}, proxy {faults}, "
        f"ended by themselves {dict(ward.restarts)}; lost {verdict.lost}, repeated {verdict.repeated}, "
        f"same bits {verdict.equal}"
    )
    return verdict


def _kills(generator: random.Random, each: int, devices: int) -> list[Kill]:
    targets = [f"device-{generator.randint(1, devices)}" for _ in range(each)] + ["broker", "server"] * each
    kills = [Kill(generator.uniform(0.02, 0.95), generator.uniform(0.0, 0.1), target) for target in targets]
    return sorted(kills, key=lambda kill: kill.progress)


class _Proxy:
    """The disturbing proxy as a process of its own."""

    def __init__(self, port: int, seed: int) -> None:
        command = [sys.executable, "-m", "benchmarks.chaos_proxy", "--to", str(port), "--seed", str(seed)]
        self._child = Child(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.port = int(self._line()["port"])

    def stop(self) -> dict[str, int]:
        """End it; what it did."""
        self._child.process.terminate()
        done = self._line()
        self._child.end()
        return done

    def _line(self) -> dict[str, int]:
        stream = self._child.process.stdout
        line = stream.readline() if stream is not None else b""
        if not line:
            raise ServerError("the proxy ended: run python -m benchmarks.chaos_proxy by hand to see why")
        said: dict[str, int] = json.loads(line)
        return said


def _size(shard: Path) -> int:
    return len(load_dataset(shard).train)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
