"""What two honest devices keep of their speed while a third client floods the server's inbox.

The flooder is a process of its own with a device name of its own; it sends 64 KiB messages, at ten times the bytes of
an honest device and as fast as the broker takes them. Nothing is pinned: it takes its share of the processors as
well, and ``flood.ceiling_full`` says what that alone costs: the same flood on a topic to which nobody subscribes;
``flood.full_of_ceiling`` is what remains to be laid to the server's account.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.figures import options, print_figures, ratio
from edge_sdk import topics
from edge_sdk.batch import Samples
from edge_sdk.dataset import save_dataset
from export.build import build_bundle
from export.graphs import Optimizer
from export.options import BuildOptions, class_names
from server_sdk.broker import EmbeddedBroker
from server_sdk.child import Child
from server_sdk.local_fleet import FleetOptions, FleetRun, run_fleet
from server_sdk.reference.specification import ModelSpec

__all__ = ["main"]

_BATCH = 64
_DEVICES = 2
_WARM_UP = 20
_TIMES = 10
_LIMIT_S = 45.0  # of one flood


def main() -> int:
    """Measure and print."""
    parser = options("flood", __doc__.split("\n")[0])
    parser.add_argument("--qos", type=int, choices=(0, 1), default=1, help="of the flood (default %(default)s)")
    arguments = parser.parse_args()
    repeats, rounds = (1, 150) if arguments.quick else (3, 400)
    speeds: dict[str, list[float]] = {name: [] for name in ("alone", "10x", "full", "ceiling")}
    floods: dict[str, list[float]] = {name: [] for name in ("10x", "full", "ceiling")}
    rejected = 0
    with tempfile.TemporaryDirectory() as folder, EmbeddedBroker("mosquitto") as broker:
        root = Path(folder)
        bundle, shard = _prepare(root)
        for repeat in range(repeats):
            rate = 0.0  # bytes a second of an honest device
            for name in speeds:
                fleet = FleetOptions(
                    root / f"{name}-{repeat}",
                    bundle,
                    (shard,) * _DEVICES,
                    server=("--rounds", str(rounds), "--batch", str(_BATCH), "--evaluate-every", "0"),
                )
                target = "no-" * (name == "ceiling") + fleet.folder.name
                flood = [] if name == "alone" else ["--topic", topics.up_step(target, "flooder")]
                flood += ["--qos", str(arguments.qos), "--bytes-per-s", str(_TIMES * rate if name == "10x" else 0)]
                run = FleetRun()
                with _flooding(flood if name != "alone" else None, broker, root) as sent:
                    times = [
                        float(event["at_s"]) for event in run_fleet(fleet, broker, run) if event["event"] == "round"
                    ]
                speeds[name].append(_rounds_a_second(times, sent))
                if name == "alone":
                    steps = sum(device["steps"] for device in run.devices)
                    rate = sum(device["bytes_sent"] for device in run.devices) / steps * speeds[name][-1]
                else:
                    floods[name].append(sent["bytes"] / (sent["ended_s"] - sent["began_s"]) / 1e6)
                    rejected += sum(run.figures.get("rejected", {}).values())
    figures = {
        f"flood.throughput_{_TIMES}x": ratio(speeds["10x"], speeds["alone"]),
        "flood.throughput_full": ratio(speeds["full"], speeds["alone"]),
        "flood.ceiling_full": ratio(speeds["ceiling"], speeds["alone"]),
        "flood.full_of_ceiling": ratio(speeds["full"], speeds["ceiling"]),
        "flood.rounds_s": median(speeds["alone"]),
        "flood.honest_mb_s": rate / 1e6,
        **{f"flood.sent_{name}_mb_s": median(values) for name, values in floods.items()},
        "flood.rejected": float(rejected),
    }
    print_figures(figures, speeds | {f"sent_{name}": values for name, values in floods.items()}, as_json=arguments.json)
    return 0


def _rounds_a_second(times: list[float], sent: dict[str, float]) -> float:
    """Rounds a second while the flood lasted, after the warm-up where there was one."""
    end = min(times[-1], sent.get("ended_s", times[-1]))
    begin = times[_WARM_UP]
    if begin >= end:  # it was over, by its limit, before the fleet had made so many rounds
        begin = sent["began_s"]
    return sum(begin < time <= end for time in times) / (end - begin)


def _prepare(root: Path) -> tuple[Path, Path]:
    """A bundle and the data of a device."""
    generator = np.random.default_rng(0)
    samples = Samples(generator.integers(0, 256, (512, 1, 28, 28), dtype=np.uint8), np.arange(512) % 10)
    shard = root / "shard.npz"
    save_dataset(shard, samples, samples.take(np.arange(_BATCH)))
    model = ModelSpec("server_sdk.reference.networks:step_network", {"classes": 10}, "pool2")
    sgd = Optimizer("sgd", learning_rate=0.05)
    built = build_bundle(
        root / "net.psgl",
        BuildOptions("vanilla", (1, 28, 28), class_names(10), optimizer=sgd, model=model, downsample=1),
        None,
    )
    return built.bundle, shard


@contextmanager
def _flooding(flood: list[str] | None, broker: EmbeddedBroker, root: Path) -> Iterator[dict[str, float]]:
    """Run the flooder for the block (None: no flooder); afterwards the dictionary says what it sent."""
    sent: dict[str, float] = {}
    if flood is None:
        yield sent
        return
    where = ["--host", broker.host, "--port", str(broker.port)]
    with (root / "flooder.log").open("w+b") as log:
        child = Child(
            [sys.executable, "-m", "benchmarks.flooder", *where, *flood], stdout=log, stderr=subprocess.STDOUT
        )
        limit = threading.Timer(_LIMIT_S, child.end)  # a fleet that stands still goes on after it
        limit.start()
        try:
            yield sent
        finally:
            limit.cancel()
            child.end()
            log.seek(0)
            said = log.read().decode(errors="replace").strip()
    if child.process.returncode:
        raise RuntimeError(f"the flooder failed: {said}")
    sent.update(json.loads(said.splitlines()[-1]))


if __name__ == "__main__":
    raise SystemExit(main())
