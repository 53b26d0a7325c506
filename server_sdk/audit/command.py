"""``psgl-server audit``: train a bundle's fleet, attack it, say what was found."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.batch import as_batch
from edge_sdk.bundle import load_bundle
from edge_sdk.console import add_debug, add_public_key, public_key_of, require
from edge_sdk.dataset import load_dataset
from edge_sdk.errors import ConfigError
from edge_sdk.memory import keep_freed_memory

if TYPE_CHECKING:
    from server_sdk.audit.attacks import Progress
    from server_sdk.progress import StageDisplay

__all__ = ["add_allow_model", "add_audit", "audit"]

_EXAMPLES = """\
  psgl-server audit net.psgl --data x.npz --beside vanilla.psgl --seeds 3
  psgl-server audit net.psgl --data x.npz --rounds 100 --epochs 5 --json      (a quick look)
"""


def add_audit(commands: Any) -> None:
    """Add the subcommand to ``psgl-server``."""
    parser = commands.add_parser(
        "audit",
        help="attack a bundle and say what its activations show",
        description="Train the bundle's fleet of one device on a part of the data, then rebuild the\n"
        "test samples from what crosses the wire, with the defence on and by a foe who knows\n"
        "everything but the samples: a decoder trained on the rest of the data, sent through\n"
        "the very same graphs. Reconstructions are compared with x, and with what the decision\n"
        "alone tells (the floor).",
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, help="bundle made by psgl-export build, the back's weights beside it")
    parser.add_argument(
        "--beside",
        type=Path,
        action="append",
        default=[],
        metavar="BUNDLE",
        help="audit this one too and show both side by side, for instance an undefended one (may be repeated)",
    )
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
    parser.add_argument(
        "--sends",
        type=int,
        default=16,
        help="of each sample that a foe averages over, where the bundle adds noise (default %(default)s)",
    )
    parser.add_argument(
        "--protocols",
        metavar="LIST",
        help="of the accuracy: P1 (perturbed in training and at test), or P1,P2 (P2: trained unperturbed, perturbed at "
        "test; a second training); attacks run on P1 (default: P1,P2 for bundles that perturb, else P1)",
    )
    parser.add_argument("--seeds", type=int, default=1, help="repeat with seeds 0, 1, ... (default %(default)s)")
    add_allow_model(parser)
    add_public_key(parser)
    parser.add_argument("--threads", type=int, help="of torch (default: every core)")
    parser.add_argument("--compute", choices=("cpu", "cuda"), default="cpu", help="of attacks (default %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/audit"),
        help="folder of audit.html, audit.json and logs (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")
    add_debug(parser)


def add_allow_model(parser: argparse.ArgumentParser) -> None:
    """Add the option that lets a model of somebody else's be imported."""
    parser.add_argument(
        "--allow-model",
        action="append",
        default=[],
        metavar="MODULE:NAME",
        help="import this model of yours, which the bundle was built from and PYTHONPATH finds; runs its code "
        "(may be repeated: a back of your own is another one)",
    )


def audit(arguments: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    require("audit", "torch", "safetensors", "rich", "torchmetrics", "jinja2", "PIL")
    for option in ("rounds", "batch", "epochs", "width", "steps", "sends", "seeds", "threads"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option} must be at least 1")
    if arguments.protocols not in (None, "P1", "P1,P2"):
        raise ConfigError("--protocols is P1 or P1,P2: attacks run on what P1 trains")
    paths = [arguments.bundle, *arguments.beside]
    key = public_key_of(arguments)
    manifests = [load_bundle(path, public_key=key).manifest for path in paths]
    signal = len(manifests[0].input_shape) == 2 or None
    dataset = load_dataset(arguments.data, signal=signal)
    for path, manifest in zip(paths, manifests, strict=True):
        if dataset.input_shape != manifest.input_shape or dataset.classes != len(manifest.classes):
            raise ConfigError(
                f"{arguments.data} has {dataset.classes} classes of {dataset.input_shape}, {path} "
                f"{len(manifest.classes)} of {manifest.input_shape}: use the data it was exported for"
            )
        if arguments.batch > manifest.max_batch:
            raise ConfigError(f"--batch is at most {manifest.max_batch} for {path}")
        as_batch(dataset.train.x[:1], dataset.input_shape, max_batch=1, input_range=manifest.input_range)
    # torch takes seconds to import: only once the options are known to be good.
    import torch
    from rich.console import Console

    from server_sdk.audit.division import divide
    from server_sdk.audit.finding import Finding, find, standard_attacks
    from server_sdk.audit.page import render, rows_of, write_page
    from server_sdk.audit.report import compose, write
    from server_sdk.audit.table import print_table
    from server_sdk.audit.trial import Trial
    from server_sdk.progress import StageDisplay

    keep_freed_memory(1 << 30)
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    if arguments.compute == "cuda" and not torch.cuda.is_available():
        raise ConfigError("this torch sees no CUDA device: use --compute cpu or install a CUDA build of torch")
    attacks = standard_attacks(
        epochs=arguments.epochs,
        width=arguments.width,
        steps=arguments.steps,
        sends=arguments.sends,
        device=arguments.compute,
    )
    divisions = [divide(dataset, foe=arguments.foe, seed=seed) for seed in range(arguments.seeds)]
    findings: list[list[Finding]] = []
    for number, path in enumerate(paths):
        findings.append([])
        for seed, division in enumerate(divisions):
            folder: Path = arguments.out / f"bundle-{number}-seed-{seed}"
            for old in (folder, folder.with_name(folder.name + "-p2")):
                shutil.rmtree(old, ignore_errors=True)
            what = f"{path.name}, seed {seed}"
            with StageDisplay() as display:
                display.stage(f"{what}: training on {len(division.train):,} samples")
                note = _Note(display, what)
                allowed = tuple(arguments.allow_model)
                trial = Trial(path, folder, arguments.rounds, arguments.batch, seed, allow_models=allowed)
                found = find(
                    trial,
                    division,
                    attacks,
                    second_protocol=arguments.protocols != "P1",
                    on_event=note.event,
                    progress=note.progress,
                )
            findings[-1].append(found)
    cells = [[finding.as_fields() for finding in each] for each in findings]
    report = compose(cells, data=arguments.data.stem, command=shlex.join(["psgl-server", *sys.argv[1:]]))
    write(arguments.out / "audit.json", report)
    victims = divisions[0].victims
    x = as_batch(victims.x, dataset.input_shape, max_batch=len(victims), input_range=manifests[0].input_range)
    rows = rows_of(x, victims.y, report, [each[0].arrays() for each in findings])
    write_page(arguments.out / "audit.html", render(report, rows))
    if arguments.json:
        print((arguments.out / "audit.json").read_text(), end="")
    else:
        print_table(report, Console())
        print(f"report   {arguments.out / 'audit.html'}\nfigures  {arguments.out / 'audit.json'}")
    return 0


class _Note:
    """Progress of one bundle and seed."""

    def __init__(self, display: StageDisplay, what: str) -> None:
        self._display = display
        self._what = what

    def event(self, event: dict[str, Any]) -> None:
        """Of the fleet."""
        if event["event"] == "round":
            self._write("training", event["round"], event["rounds"], event["loss"])
        elif event["event"] == "note":
            self._display.note(f"note: {event['text']}")

    def progress(self, name: str) -> Progress:
        """For the attack of this name."""
        return partial(self._write, name)

    def _write(self, name: str, done: int, of: int, loss: float) -> None:
        self._display.step(f"{self._what}: {name}", done, of, loss)
