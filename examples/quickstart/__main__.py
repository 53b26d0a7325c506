"""The main job: devices without torch and a server train over MQTT, undefended, as the paper says, and hardened.

Run it with ``make demo``, or ``python -m examples.quickstart --help``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from edge_sdk.console import new_parser, run
from edge_sdk.dataset import save_dataset
from edge_sdk.errors import ConfigError
from examples.quickstart.data import Division, divide, load, open_file
from server_sdk.broker import EmbeddedBroker
from server_sdk.local_fleet import FleetOptions, FleetRun, run_fleet
from server_sdk.progress import RunDisplay, StageDisplay

_EXAMPLES = """\
  make demo                                   MNIST, three devices
  make demo DATA=breastmnist.npz              any .npz with x_train, y_train, x_test, y_test
  make demo ARGS="--rounds 100 --devices 5"   other options
"""


_PROFILES = ("vanilla", "paper", "hardened")
_PREPARING = {
    "vanilla": "building the network",
    "paper": "fitting the guide on samples that no device has",
    "hardened": "training the hardened front on samples that no device has",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = new_parser(
        "make demo", "Split learning between real processes over MQTT, undefended and defended twice.", _EXAMPLES
    )
    parser.add_argument("--data", type=Path, help=".npz with x_train, y_train, x_test, y_test (default: MNIST)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="folder of figure and results (default %(default)s)",
    )
    parser.add_argument("--devices", type=int, default=3, help="device processes (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=360, help="optimizer steps of each run (default %(default)s)")
    parser.add_argument(
        "--batch", type=int, help="samples of each device in a round (default: 32, fewer for larger images)"
    )
    parser.add_argument(
        "--shift",
        type=int,
        metavar="PIXELS",
        help="devices move training images by up to this (default: 7%% of their size)",
    )
    parser.add_argument(
        "--front-steps",
        type=int,
        metavar="STEPS",
        help="optimizer steps that train the hardened front before its run (default: 1600, fewer for larger images)",
    )
    parser.add_argument(
        "--perturb-towards",
        choices=("guide", "label"),
        default="guide",
        help="class that the perturbation attacks in training (default %(default)s)",
    )
    parser.add_argument(
        "--codec",
        choices=("float32", "float16"),
        default="float16",
        help="tensors on the wire (default %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of all but the noise that devices draw under hardened (default %(default)s)",
    )
    parser.add_argument(
        "--broker",
        choices=("auto", "mosquitto", "amqtt"),
        default="auto",
        help="(default %(default)s: mosquitto if installed)",
    )
    parser.add_argument("--port", type=int, default=0, help="of the embedded broker (default: a free one)")
    arguments = parser.parse_args(argv)
    return run(lambda: _demo(arguments), debug=getattr(arguments, "debug", False))


def _demo(arguments: argparse.Namespace) -> int:
    for option in ("devices", "rounds", "batch", "front_steps"):
        if (getattr(arguments, option) or 1) < 1:
            raise ConfigError(f"--{option.replace('_', '-')} must be at least 1")
    if arguments.seed < 0:
        raise ConfigError("--seed must be at least 0")
    console = Console(stderr=True)
    began = time.monotonic()
    name, dataset = load(arguments.data, arguments.seed)
    division = divide(name, dataset, arguments.devices, arguments.seed)
    _introduce(console, division)
    shape = dataset.input_shape
    batch = arguments.batch or max(8, min(32, 32 * 28 * 28 // (shape[1] * shape[2])))
    batch = min(batch, *(len(train) for train, _ in division.shards))
    out: Path = arguments.out
    try:
        for profile in _PROFILES:
            shutil.rmtree(out / profile, ignore_errors=True)
        save_dataset(out / "data" / "open.npz", *open_file(division, arguments.seed))
        for number, (train, test) in enumerate(division.shards, start=1):
            save_dataset(out / "data" / f"device-{number}.npz", train, test)
    except OSError as exc:
        raise ConfigError(f"{out} cannot be written: {exc.strerror or exc}") from exc
    with EmbeddedBroker(arguments.broker, arguments.port) as broker:
        # After the broker, which starts at once or says why not; torch takes seconds to import.
        import torch

        from examples.quickstart.figure import draw
        from examples.quickstart.foe import attack
        from examples.quickstart.hardened import recipe_within
        from examples.quickstart.report import compose, print_report, write_result
        from export.build import build_bundle
        from export.options import BuildOptions, class_names
        from export.prepare import prepare

        torch.set_num_threads(1)  # the same bits whatever the number of cores, and no waiting for a core that is busy
        runs: dict[str, FleetRun] = {}
        ends: list[float] = []
        for profile in _PROFILES:
            options = BuildOptions(
                profile,
                shape,
                class_names(division.classes),
                seed=arguments.seed,
                perturb_towards=arguments.perturb_towards,
            )
            recipe = recipe_within(options, arguments.front_steps) if profile == "hardened" else None
            if recipe is not None:
                console.print(
                    f"hardened: training the front on the guide's {len(division.guide):,} samples, "
                    f"{recipe.steps:,} steps of {recipe.batch}",
                    highlight=False,
                )
            with StageDisplay(console) as stages:
                stages.stage(_PREPARING[profile])
                prepared = prepare(division.guide, options, recipe, progress=stages.step)
                stages.stage(f"exporting the {profile} bundle as plain ONNX")
                built = build_bundle(
                    out / profile / "net.psgl", prepared.options, prepared.guide, network=prepared.network
                )
            runs[profile] = FleetRun()
            with RunDisplay(f"{profile} · {broker.kind} on {broker.host}:{broker.port}", console) as display:
                for event in run_fleet(_fleet(arguments, built.bundle, batch, shape), broker, runs[profile]):
                    display.show(event)
            ends.append(time.monotonic())
    shard = division.shards[0]
    with StageDisplay(console) as stages:
        rebuilt = attack(
            [out / profile for profile in _PROFILES],
            division.guide,
            shard,
            rounds=arguments.rounds,
            batch=batch,
            seed=arguments.seed,
            progress=lambda profile: stages.stage(f"a foe learns to rebuild what the first device sends: {profile}"),
        )
    result = compose(runs, rebuilt, division, broker.kind)
    result |= {"seconds": round(ends[1] - began, 1), "hardened_seconds": round(time.monotonic() - ends[1], 1)}
    draw(out / "figure.png", out / "paper", shard[1], runs, rebuilt)
    write_result(out / "result.json", result)
    print_report(Console(), result, out)
    return 0


def _fleet(arguments: argparse.Namespace, bundle: Path, batch: int, shape: tuple[int, ...]) -> FleetOptions:
    profile = bundle.parent.name
    shift = max(round(0.07 * min(shape[1:])), 1) if arguments.shift is None else arguments.shift
    return FleetOptions(
        folder=bundle.parent,
        bundle=bundle,
        shards=tuple(arguments.out / "data" / f"device-{n}.npz" for n in range(1, arguments.devices + 1)),
        server=(
            *("--rounds", str(arguments.rounds), "--batch", str(batch)),
            *("--evaluate-every", str(max(arguments.rounds // 9, 1)), "--codec", arguments.codec),
        ),
        device=(
            *("--seed", str(arguments.seed), "--shift", str(shift), "--codec", arguments.codec),
            *(["--measure-clean"] if profile == "paper" else []),
        ),
    )


def _introduce(console: Console, division: Division) -> None:
    for note in division.notes:
        console.print(f"note: {note}", style="yellow", highlight=False)
    train = sum(len(train) for train, _ in division.shards)
    test = sum(len(test) for _, test in division.shards)
    console.print(
        f"{division.name}: {train} training and {test} test samples over {len(division.shards)} devices, "
        f"{len(division.guide)} others for the guide",
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())
