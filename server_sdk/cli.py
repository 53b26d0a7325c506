"""psgl-server: train a fleet from the command line."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.bundle import load_bundle
from edge_sdk.console import (
    add_broker_options,
    add_debug,
    add_public_key,
    connection_from,
    new_parser,
    public_key_of,
    require,
    run,
    stop_on_signals,
)
from edge_sdk.errors import ConfigError
from edge_sdk.memory import keep_freed_memory
from edge_sdk.paho_transport import PahoTransport
from server_sdk.audit.command import add_allow_model, add_audit, audit
from server_sdk.plan import TrainingPlan, fronts_for

if TYPE_CHECKING:
    from server_sdk.journal import Kept
    from server_sdk.trainer import Trainer

__all__ = ["main"]

_LEAST = {
    "devices": 1,
    "rounds": 1,
    "batch": 1,
    "evaluate_every": 0,
    "threads": 1,
    "synchronise_every": 1,
    "checkpoint_every": 1,
    "seed": 0,
}

_EXAMPLES = """\
  psgl-server train net.psgl --devices 3 --rounds 300 --host broker.clinic.example --ca ca.pem \\
      --user trainer --password-file pw
  psgl-server train net.psgl --devices 1 --rounds 100 --out runs/first          (a broker on this machine, port 1883)
  psgl-server train net.psgl --devices 1 --rounds 100 --out runs/first --resume      (after a crash or Ctrl-C)
  psgl-server train net.psgl --public-key key.pub.pem          (only if it is signed; devices with --update follow)
  psgl-server train own.psgl --allow-model my_module:MyNet        (a model of yours: psgl-export build my_module:MyNet)
  psgl-server log inspect runs/first
  psgl-server audit net.psgl --data x.npz
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``psgl-server``; returns the exit code."""
    parser = new_parser("psgl-server", "The server of a split-learning fleet.", _EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a bundle's back layers with a fleet",
        description="Train a bundle's back layers with the devices of a fleet, in rounds.",
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("bundle", type=Path, help="bundle made by psgl-export build")
    train.add_argument("--back", type=Path, help="initial weights of the back (default: beside the bundle)")
    train.add_argument("--devices", type=int, default=1, help="devices to wait for (default %(default)s)")
    train.add_argument("--rounds", type=int, default=300, help="optimizer steps of the back (default %(default)s)")
    train.add_argument("--batch", type=int, default=32, help="samples of each device in a round (default %(default)s)")
    train.add_argument(
        "--evaluate-every",
        type=int,
        default=50,
        metavar="ROUNDS",
        help="rounds between evaluations (default %(default)s, 0: only at the end)",
    )
    train.add_argument("--learning-rate", type=float, default=2e-3, help="of the back layers (default %(default)s)")
    train.add_argument(
        "--optimizer",
        choices=("adam", "sgd"),
        default="adam",
        help="of the back layers (default %(default)s)",
    )
    train.add_argument("--seed", type=int, default=0, help="order of stored samples (default %(default)s)")
    _add_fleet_options(train)
    _add_durability_options(train)
    train.add_argument(
        "--codec",
        choices=("float32", "float16"),
        default="float16",
        help="gradients on the wire (default %(default)s)",
    )
    train.add_argument("--chunk-bytes", type=int, default=65536, help="largest MQTT payload (default %(default)s)")
    train.add_argument(
        "--compute",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the back layers run (default %(default)s)",
    )
    train.add_argument(
        "--threads",
        type=int,
        default=1,
        help="torch's threads; the same number gives the same weights (default %(default)s)",
    )
    add_allow_model(train)
    add_public_key(train)
    train.add_argument(
        "--out",
        type=Path,
        default=Path("runs/server"),
        help="folder of the run: log, checkpoints, server.safetensors, result.json (default %(default)s)",
    )
    train.add_argument("--json", action="store_true", help="print every event as one JSON line instead of the display")
    add_broker_options(train)
    add_debug(train)
    _add_log_command(commands)
    add_audit(commands)
    arguments = parser.parse_args(argv)
    command = {"train": _train, "log": _inspect, "audit": audit}[arguments.command]
    return run(lambda: command(arguments), debug=getattr(arguments, "debug", False))


def _add_fleet_options(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("schedule and fronts")
    group.add_argument(
        "--schedule",
        choices=("rounds", "async"),
        default="rounds",
        help="one optimizer step for a batch of every device, or for each batch as it comes (default %(default)s)",
    )
    group.add_argument(
        "--fronts",
        choices=("own", "shared", "relay", "frozen"),
        help="each device trains its own; all share the mean; one device at a time hands it on; "
        "none is trained and each sample crosses the wire once (default own, for a bundle with a frozen front frozen)",
    )
    group.add_argument(
        "--synchronise-every",
        type=int,
        default=10,
        metavar="ROUNDS",
        help="rounds between two means of shared fronts, or of a device's turn in relay (default %(default)s)",
    )
    group.add_argument(
        "--weights",
        choices=("equal", "samples"),
        default="equal",
        help="each device counts the same, or by the number of its samples (default %(default)s)",
    )
    group.add_argument(
        "--deadline-s",
        type=float,
        default=60.0,
        help="a round, a mean or a turn waits this long for a silent device (default %(default)s)",
    )
    group.add_argument(
        "--idle-s",
        type=float,
        default=600.0,
        help="end when no device says anything for (default %(default)s)",
    )
    group.add_argument(
        "--max-mb-per-s",
        type=float,
        default=128.0,
        metavar="MB",
        help="a device that sends more is left unread for a while (default %(default)s)",
    )
    group.add_argument(
        "--max-norm",
        type=float,
        help="largest L2 norm of one sample's activations (default: no limit but the wire's)",
    )
    group.add_argument(
        "--when-large",
        choices=("refuse", "clip"),
        default="refuse",
        help="what becomes of samples above --max-norm (default %(default)s)",
    )


def _add_durability_options(train: argparse.ArgumentParser) -> None:
    group = train.add_argument_group("what a crash may cost")
    group.add_argument("--resume", action="store_true", help="go on with the run that --out holds, if it holds one")
    group.add_argument("--fresh", action="store_true", help="forget the run that --out holds and begin a new one")
    group.add_argument(
        "--durability",
        choices=("log", "checkpoint", "off"),
        default="log",
        help="nothing is lost; what came after the last checkpoint; the whole run (default %(default)s)",
    )
    group.add_argument(
        "--sync",
        default="never",
        metavar="WHEN",
        help="when the log reaches the disk itself, against a loss of power: never, checkpoint, always or "
        "a number of milliseconds for which several records may wait (default %(default)s)",
    )
    group.add_argument(
        "--checkpoint-every", type=int, default=50, metavar="ROUNDS", help="rounds (default %(default)s)"
    )
    group.add_argument(
        "--keep-log", action="store_true", help="keep every record, to replay the run later; it holds activations"
    )


def _add_log_command(commands: Any) -> None:
    about = "Show what a run's folder holds: records, checkpoints, damage. Never shows activations or labels."
    examples = "  psgl-server log inspect runs/server --limit 20\n  psgl-server log inspect runs/server --json\n"
    log = commands.add_parser("log", help="look into a run's log", description=about)
    actions = log.add_subparsers(dest="action", required=True, metavar="ACTION")
    inspect = actions.add_parser(
        "inspect",
        help="list records and checkpoints",
        description=about,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument("folder", type=Path, help="the --out of psgl-server train")
    inspect.add_argument("--from", dest="start", type=int, default=1, metavar="POSITION", help="first record to show")
    inspect.add_argument("--limit", type=int, metavar="N", help="show at most so many records")
    inspect.add_argument("--json", action="store_true", help="one JSON object a line")
    add_debug(inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    require("server", "torch", "safetensors")
    from server_sdk.inspection import print_log

    if not arguments.folder.is_dir():
        raise ConfigError(f"there is no folder {arguments.folder}: give the --out of psgl-server train")
    print_log(
        arguments.folder,
        as_json=arguments.json,
        limit=arguments.limit,
        start=arguments.start,
        stream=sys.stdout,
    )
    return 0


def _train(arguments: argparse.Namespace) -> int:
    require("server", "torch", "safetensors", "rich")
    for option, least in _LEAST.items():
        if getattr(arguments, option) < least:
            raise ConfigError(f"--{option.replace('_', '-')} must be at least {least}")
    if arguments.resume and arguments.fresh:
        raise ConfigError("--resume and --fresh contradict each other: give one of them")
    bundle = load_bundle(arguments.bundle, public_key=public_key_of(arguments))
    fronts = fronts_for(bundle.manifest, arguments.fronts)
    if fronts == "frozen" and arguments.durability != "log":
        raise ConfigError("--fronts frozen trains from the log: leave out --durability")
    if arguments.batch > bundle.manifest.max_batch:
        raise ConfigError(f"--batch is at most {bundle.manifest.max_batch} for this bundle")
    # torch takes seconds to import: only once the options are known to be good.
    import torch

    from server_sdk.assembly import back_path, trainer_from
    from server_sdk.journal import Durability, Journal
    from server_sdk.progress import RunDisplay, megabytes
    from server_sdk.rates import RateLimits
    from server_sdk.screening import Screen
    from server_sdk.service import TrainingService

    keep_freed_memory(1 << 30)
    torch.set_num_threads(arguments.threads)
    if arguments.compute == "cuda" and not torch.cuda.is_available():
        raise ConfigError("this torch sees no CUDA device: use --compute cpu or install a CUDA build of torch")
    trainer = trainer_from(
        bundle,
        arguments.back or back_path(arguments.bundle),
        rounds=arguments.rounds,
        learning_rate=arguments.learning_rate,
        optimizer=arguments.optimizer,
        device=arguments.compute,
        allow_models=arguments.allow_model,
    )
    plan = TrainingPlan(
        devices=arguments.devices,
        rounds=arguments.rounds,
        batch=arguments.batch,
        evaluate_every=arguments.evaluate_every,
        schedule=arguments.schedule,
        fronts=fronts,
        synchronise_every=arguments.synchronise_every,
        weights=arguments.weights,
        seed=arguments.seed,
        codec=arguments.codec,
        chunk_bytes=arguments.chunk_bytes,
    )
    transport = PahoTransport(connection_from(arguments), client_id=f"psgl-{arguments.fleet}-server")
    display = None if arguments.json else RunDisplay(f"{bundle.manifest.profile} · fleet {arguments.fleet}")

    def show(event: dict[str, Any]) -> None:
        if display is None:
            print(json.dumps(event), flush=True)
        else:
            display.show(event)

    kept = _kept(arguments)
    if kept is not None and kept.finished:
        print(f"{arguments.out} holds run {kept.run}, which is finished: begin a new one with --fresh")
        return 0
    durability = Durability(arguments.durability, _sync(arguments.sync), arguments.checkpoint_every, arguments.keep_log)
    with display or contextlib.nullcontext(), closing(Journal(arguments.out, durability, on_event=show)) as journal:
        service = TrainingService(
            bundle,
            trainer,
            transport,
            plan,
            journal=journal,
            resume=None if kept is None else kept.run,
            fleet=arguments.fleet,
            deadline_s=arguments.deadline_s,
            idle_s=arguments.idle_s,
            screen=Screen(arguments.max_norm, arguments.when_large),
            rates=RateLimits(bytes_per_s=1e6 * arguments.max_mb_per_s),
            bundle_file=arguments.bundle.read_bytes(),
            on_event=show,
        )
        stop_on_signals(service.stop)
        figures = service.run()
        if figures["finished"]:
            _save(arguments.out, trainer, figures)
            service.finish()
    if not figures["finished"]:
        print(f"stopped after round {figures['rounds']}: go on with --resume", file=sys.stderr, flush=True)
        return 130
    if display is None:
        show({"event": "end", **figures})
    else:
        accuracy = figures.get("evaluation", {}).get("accuracy")
        print(
            f"{figures['rounds']} rounds with {', '.join(figures['devices'])} in {figures['seconds']:.0f} s, "
            f"received {megabytes(figures['bytes_received'])}"
            + (f", accuracy {accuracy:.1%}" if accuracy is not None else "")
            + f": {arguments.out / 'server.safetensors'}"
        )
    return 0


def _kept(arguments: argparse.Namespace) -> Kept | None:
    """The run to go on with, or None for a new one, for which the folder is then empty."""
    from server_sdk.journal import Journal

    kept = None if arguments.fresh else Journal.kept(arguments.out)
    if kept is not None and arguments.resume:
        return kept
    if kept is not None and not kept.finished:
        raise ConfigError(
            f"{arguments.out} holds run {kept.run}, stopped after round {kept.round}: go on with --resume, "
            "forget it with --fresh, or take another --out"
        )
    Journal.forget(arguments.out)
    return None


def _save(folder: Path, trainer: Trainer, figures: dict[str, Any]) -> None:
    try:
        trainer.save(folder / "server.safetensors")
        (folder / "result.json").write_text(json.dumps(figures, indent=1) + "\n")
    except OSError as exc:
        raise ConfigError(f"{folder} cannot be written: {exc.strerror or exc}") from exc


def _sync(text: str) -> str | float:
    if text in ("never", "checkpoint", "always"):
        return text
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--sync is never, checkpoint, always or a number of milliseconds, not {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
