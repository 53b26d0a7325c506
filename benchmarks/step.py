"""Steps a second of split training over a broker, against the same model trained in one process by plain torch.

Vanilla profile, batches of 64, 1x28x28, float32 on the wire, SGD on both sides; the network is
``server_sdk.reference.networks.step_network``. Every process has one thread. A step is one device's batch of 64, so two
devices in a round make two steps.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.figures import options, print_figures, ratio
from edge_sdk.batch import Samples
from examples.quickstart.data import save_shard
from export.build import BuildOptions, build_bundle, class_names
from export.graphs import Optimizer
from server_sdk.broker import EmbeddedBroker
from server_sdk.local_fleet import FleetOptions, FleetRun, run_fleet
from server_sdk.reference.networks import step_network
from server_sdk.reference.specification import ModelSpec

__all__ = ["main"]

_BATCH = 64
_RATE = 0.05
_WARM_UP = 20


def main() -> int:
    """Measure and print."""
    parser = options("step", __doc__.split("\n")[0])
    parser.add_argument("--broker", choices=("auto", "mosquitto", "amqtt"), default="auto")
    parser.add_argument("--codec", choices=("float32", "float16"), default="float32", help="default: %(default)s")
    parser.add_argument("--chunk-bytes", type=int, default=65536, help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pairs, rounds = (2, 120) if arguments.quick else (5, 300)
    generator = np.random.default_rng(0)
    samples = Samples(generator.integers(0, 256, (512, 1, 28, 28), dtype=np.uint8), np.arange(512) % 10)
    speeds: dict[str, list[float]] = {"in_process": [], "one_device": [], "two_devices": []}
    with tempfile.TemporaryDirectory() as folder, EmbeddedBroker(arguments.broker) as broker:
        root = Path(folder)
        shard = root / "shard.npz"
        save_shard(shard, samples, samples.take(np.arange(_BATCH)))
        model = ModelSpec("server_sdk.reference.networks:step_network", {"classes": 10}, "pool2")
        built = build_bundle(
            root / "net.psgl",
            BuildOptions(
                "vanilla",
                (1, 28, 28),
                class_names(10),
                optimizer=Optimizer("sgd", learning_rate=_RATE),
                model=model,
                downsample=1,
            ),
            None,
        )
        for pair in range(pairs):
            speeds["in_process"].append(_in_process(samples, rounds))
            for name, devices in (("one_device", 1), ("two_devices", 2)):
                fleet = FleetOptions(
                    root / f"{name}-{pair}",
                    built.bundle,
                    (shard,) * devices,
                    server=(
                        *("--rounds", str(rounds), "--batch", str(_BATCH), "--evaluate-every", "0"),
                        *("--optimizer", "sgd", "--learning-rate", str(_RATE)),
                        *("--codec", arguments.codec, "--chunk-bytes", str(arguments.chunk_bytes)),
                    ),
                    device=("--codec", arguments.codec, "--chunk-bytes", str(arguments.chunk_bytes)),
                )
                speeds[name].append(devices * _rounds_a_second(fleet, broker))
    figures = {
        f"step.{name}_vs_in_process": ratio(speeds[name], speeds["in_process"])
        for name in ("one_device", "two_devices")
    }
    figures |= {f"step.{name}_steps_s": float(np.median(values)) for name, values in speeds.items()}
    print_figures(figures, speeds, as_json=arguments.json)
    return 0


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


def _rounds_a_second(fleet: FleetOptions, broker: EmbeddedBroker) -> float:
    times: list[float] = []
    for event in run_fleet(fleet, broker, FleetRun()):
        if event["event"] == "round":
            times.append(float(event["at_s"]))
    return (len(times) - 1 - _WARM_UP) / (times[-1] - times[_WARM_UP])


if __name__ == "__main__":
    raise SystemExit(main())
