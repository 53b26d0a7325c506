"""``psgl-server audit``: train a bundle's fleet, attack it, say what was found."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.batch import load_dataset
from edge_sdk.bundle import load_bundle
from edge_sdk.console import add_debug, require
from edge_sdk.errors import ConfigError
from edge_sdk.memory import keep_freed_memory

if TYPE_CHECKING:
    from server_sdk.audit.attacks import Attack, Progress

__all__ = ["add_audit", "audit"]

_EXAMPLES = """\
  psgl-server audit net.psgl --data mnist_10k.npz --seeds 3
  psgl-server audit net.psgl --data x.npz --rounds 100 --epochs 5 --json      (a quick look)
"""


def add_audit(commands: Any) -> None:
    """Add the subcommand to ``psgl-server``."""
    parser = commands.add_parser(
        "audit",
        help="attack a bundle and say what its activations show",
        description="Train the bundle's fleet of one device on a part of the data, then rebuild the test samples from "
        "what crosses the wire, with the defence on and by a foe who knows everything but the samples: a decoder "
        "trained on the rest of the data, sent through the very same graphs. Reconstructions are compared with x, "
        "and with what the decision alone tells (the floor).",
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, help="bundle made by psgl-export build, the back's weights beside it")
    parser.add_argument("--data", type=Path, required=True, help=".npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--rounds", type=int, default=360, help="of the training (default %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="samples of a round (default %(default)s)")
    parser.add_argument(
        "--foe",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="share of the training samples that the foe has and the device not (default %(default)s)",
    )
    parser.add_argument("--epochs", type=int, default=20, help="of each decoder (default %(default)s)")
    parser.add_argument("--width", type=int, default=48, help="of each decoder (default %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of the white-box search (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with seeds 0, 1, ... (default %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: every core)")
    parser.add_argument("--compute", choices=("cpu", "cuda"), default="cpu", help="of attacks (default %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/audit"), help="folder of audit.json and logs (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")
    add_debug(parser)


def audit(arguments: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    require("audit", "torch", "safetensors", "rich", "torchmetrics")
    for option in ("rounds", "batch", "epochs", "width", "steps", "seeds", "threads"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option} must be at least 1")
    bundle = load_bundle(arguments.bundle)
    dataset = load_dataset(arguments.data)
    if dataset.input_shape != bundle.manifest.input_shape or dataset.classes != len(bundle.manifest.classes):
        raise ConfigError(
            f"{arguments.data} has {dataset.classes} classes of {dataset.input_shape}, the bundle "
            f"{len(bundle.manifest.classes)} of {bundle.manifest.input_shape}: use the data it was exported for"
        )
    if arguments.batch > bundle.manifest.max_batch:
        raise ConfigError(f"--batch is at most {bundle.manifest.max_batch} for this bundle")
    # torch takes seconds to import: only once the options are known to be good.
    import torch
    from rich.console import Console

    from server_sdk.audit.attacks import LearnedDecoder, WhiteBox
    from server_sdk.audit.division import divide
    from server_sdk.audit.report import Finding, compose, print_table, write
    from server_sdk.audit.trial import Trial, attack, train
    from server_sdk.broker import EmbeddedBroker

    keep_freed_memory(1 << 30)
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    if arguments.compute == "cuda" and not torch.cuda.is_available():
        raise ConfigError("this torch sees no CUDA device: use --compute cpu or install a CUDA build of torch")
    attacks: list[Attack] = [
        LearnedDecoder("convolution", arguments.epochs, arguments.width, device=arguments.compute),
        LearnedDecoder("mlp", arguments.epochs, arguments.width, device=arguments.compute),
        WhiteBox(arguments.steps),
    ]
    status = Console(stderr=True)
    findings = []
    for seed in range(arguments.seeds):
        division = divide(dataset, foe=arguments.foe, seed=seed)
        folder: Path = arguments.out / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        trial = Trial(arguments.bundle, folder, arguments.rounds, arguments.batch, seed)
        with status.status(f"seed {seed}: training on {len(division.train)} samples") as shown:

            def on_event(event: dict[str, Any], seed: int = seed) -> None:
                if event["event"] == "round":
                    shown.update(f"seed {seed}: training, round {event['round']} of {event['rounds']}")

            with EmbeddedBroker("auto") as broker:
                trained = train(trial, division, broker, on_event=on_event)

            def progress(name: str, seed: int = seed) -> Progress:
                def note(done: int, of: int, loss: float) -> None:
                    shown.update(f"seed {seed}: {name}, {done} of {of}, loss {loss:.4f}")

                return note

            floor, outcomes = attack(trained, division, attacks, seed=seed, progress=progress)
        findings.append(Finding(seed, trained, floor, outcomes))
    report = compose(findings, data=arguments.data.stem, command=shlex.join(["psgl-server", *sys.argv[1:]]))
    path = arguments.out / "audit.json"
    write(path, report)
    if arguments.json:
        print(path.read_text(), end="")
    else:
        print_table(report, Console())
        print(f"figures  {path}")
    return 0
