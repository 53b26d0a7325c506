"""Steps a second of split training over a broker, against the same model trained in one process by plain torch.

Vanilla profile, batches of 64, 1x28x28, float32 on the wire, SGD on both sides; the network is
``server_sdk.reference.networks.step_network``. Every process has one thread. A step is one device's batch of 64, so two
devices in a round make two steps. Chunks are 512 KiB,
so that a step is one message; a full run measures the default of 64 KiB beside it (``.chunked_64k``).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.figures import options, print_figures, ratio
from edge_sdk.batch import Samples
from edge_sdk.bundle import Bundle, load_bundle
from edge_sdk.dataset import save_dataset
from edge_sdk.front import Front
from export.build import build_bundle
from export.graphs import Optimizer
from export.options import BuildOptions, class_names
from server_sdk.broker import EmbeddedBroker
from server_sdk.local_fleet import FleetOptions, FleetRun, run_fleet
from server_sdk.reference.networks import step_network
from server_sdk.reference.specification import ModelSpec

__all__ = ["main", "prepare", "rounds_a_second", "server_options"]

_BATCH = 64
_RATE = 0.05
_WARM_UP = 20
_CHUNK = 524_288


def main() -> int:
    """Measure and print."""
    parser = options("step", __doc__.split("\n")[0])
    parser.add_argument("--broker", choices=("auto", "mosquitto", "amqtt"), default="auto")
    parser.add_argument("--codec", choices=("float32", "float16"), default="float32", help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pairs, rounds = (2, 120) if arguments.quick else (5, 300)
    fleets = {"one_device": (1, _CHUNK), "two_devices": (2, _CHUNK)}
    if not arguments.quick:
        fleets |= {f"{name}.chunked_64k": (devices, 65536) for name, (devices, _) in fleets.items()}
    speeds: dict[str, list[float]] = {"in_process": [], **{name: [] for name in fleets}}
    with tempfile.TemporaryDirectory() as folder, EmbeddedBroker(arguments.broker) as broker:
        root = Path(folder)
        bundle, shard, samples = prepare(root)
        parts = _parts_ms(load_bundle(bundle))
        for pair in range(pairs):
            speeds["in_process"].append(_in_process(samples, rounds))
            for name, (devices, chunk) in fleets.items():
                wire = ("--codec", arguments.codec, "--chunk-bytes", str(chunk))
                fleet = FleetOptions(
                    root / f"{name.replace('.', '-')}-{pair}",
                    bundle,
                    (shard,) * devices,
                    server=(*server_options(rounds), *wire),
                    device=wire,
                )
                speeds[name].append(devices * rounds_a_second(fleet, broker))
    figures = {}
    for name in fleets:
        kind, _, suffix = name.partition(".")
        figures[f"step.{kind}_vs_in_process{'.' + suffix if suffix else ''}"] = ratio(
            speeds[name], speeds["in_process"]
        )
    figures |= {f"step.{name}_steps_s": median(values) for name, values in speeds.items()}
    figures |= parts
    print_figures(figures, speeds, as_json=arguments.json)
    return 0


def prepare(folder: Path) -> tuple[Path, Path, Samples]:
    """Write the bundle, with the back's weights beside it, and one device's data.

    Returns:
        Path of the bundle, path of the data file, and its 512 training samples.
    """
    generator = np.random.default_rng(0)
    samples = Samples(generator.integers(0, 256, (512, 1, 28, 28), dtype=np.uint8), np.arange(512) % 10)
    shard = folder / "shard.npz"
    save_dataset(shard, samples, samples.take(np.arange(_BATCH)))
    model = ModelSpec("server_sdk.reference.networks:step_network", {"classes": 10}, "pool2")
    sgd = Optimizer("sgd", learning_rate=_RATE)
    built = build_bundle(
        folder / "net.psgl",
        BuildOptions("vanilla", (1, 28, 28), class_names(10), optimizer=sgd, model=model, downsample=1),
        None,
    )
    return built.bundle, shard, samples


def server_options(rounds: int) -> tuple[str, ...]:
    """Arguments of ``psgl-server train`` for so many rounds of batches of 64."""
    return (
        *("--rounds", str(rounds), "--batch", str(_BATCH), "--evaluate-every", "0"),
        *("--optimizer", "sgd", "--learning-rate", str(_RATE)),
    )


def rounds_a_second(fleet: FleetOptions, broker: EmbeddedBroker) -> float:
    """Run a fleet to its end; the first 20 rounds do not count."""
    times: list[float] = []
    for event in run_fleet(fleet, broker, FleetRun()):
        if event["event"] == "round":
            times.append(float(event["at_s"]))
    return (len(times) - 1 - _WARM_UP) / (times[-1] - times[_WARM_UP])


def _parts_ms(bundle: Bundle) -> dict[str, float]:
    """Median milliseconds of the three parts of a step on the device, in a process of nothing else."""
    front = Front(bundle)
    state = front.initial_state()
    x = np.random.default_rng(0).random((_BATCH, *bundle.manifest.input_shape), dtype=np.float32)
    times: dict[str, list[float]] = {"train": [], "prepare": [], "backward": []}
    for _ in range(60):
        stamps = [time.perf_counter()]
        forward = front.forward(state, x, None, training=True)
        stamps.append(time.perf_counter())
        prepared = front.prepare(state, forward)
        stamps.append(time.perf_counter())
        front.backward(state, prepared, np.ones_like(forward.activations), rate=_RATE)
        stamps.append(time.perf_counter())
        for name, begin, end in zip(times, stamps, stamps[1:], strict=False):
            times[name].append(1000 * (end - begin))
    return {f"step.{name}_ms": median(values[10:]) for name, values in times.items()}


def _in_process(samples: Samples, steps: int) -> float:
    model = step_network(10)
    optimizer = torch.optim.SGD(model.parameters(), _RATE)
    x = torch.from_numpy(samples.x).float() / 255
    y = torch.from_numpy(samples.y)
    began = 0.0
    for step in range(_WARM_UP + steps):
        if step == _WARM_UP:
            began = time.perf_counter()
        start = step * _BATCH % len(samples)
        loss = torch.nn.functional.cross_entropy(model(x[start : start + _BATCH]), y[start : start + _BATCH])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return steps / (time.perf_counter() - began)


if __name__ == "__main__":
    raise SystemExit(main())
