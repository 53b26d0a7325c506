"""psgl-server: train a fleet from the command line."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_sdk.bundle import load_bundle
from edge_sdk.console import add_broker_options, add_debug, connection_from, new_parser, require, run
from edge_sdk.errors import ConfigError
from edge_sdk.memory import keep_freed_memory
from edge_sdk.paho_transport import PahoTransport

__all__ = ["main"]

_EXAMPLES = """\
  psgl-server train net.psgl --devices 3 --rounds 300 --host broker.clinic.example --ca ca.pem \\
      --user trainer --password-file pw
  psgl-server train net.psgl --devices 1 --rounds 100 --out runs/first          (a broker on this machine, port 1883)
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
    train.add_argument(
        "--deadline-s",
        type=float,
        default=60.0,
        help="a round waits this long for absent devices (default %(default)s)",
    )
    train.add_argument(
        "--idle-s",
        type=float,
        default=600.0,
        help="end when no device says anything for (default %(default)s)",
    )
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
    train.add_argument(
        "--allow-foreign-model",
        action="store_true",
        help="import the bundle's model from outside this SDK: runs its code",
    )
    train.add_argument(
        "--out",
        type=Path,
        default=Path("runs/server"),
        help="folder of server.safetensors and result.json (default %(default)s)",
    )
    train.add_argument("--json", action="store_true", help="print every event as one JSON line instead of the display")
    add_broker_options(train)
    add_debug(train)
    arguments = parser.parse_args(argv)
    return run(lambda: _train(arguments), debug=getattr(arguments, "debug", False))


def _train(arguments: argparse.Namespace) -> int:
    require("server", "torch", "safetensors", "rich")
    for option, least in (("devices", 1), ("rounds", 1), ("batch", 1), ("evaluate_every", 0), ("threads", 1)):
        if getattr(arguments, option) < least:
            raise ConfigError(f"--{option.replace('_', '-')} must be at least {least}")
    bundle = load_bundle(arguments.bundle)
    if arguments.batch > bundle.manifest.max_batch:
        raise ConfigError(f"--batch is at most {bundle.manifest.max_batch} for this bundle")
    # torch takes seconds to import: only once the options are known to be good.
    import torch

    from server_sdk.assembly import back_path, trainer_from
    from server_sdk.progress import RunDisplay, megabytes
    from server_sdk.service import TrainingPlan, TrainingService

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
        allow_foreign=arguments.allow_foreign_model,
    )
    plan = TrainingPlan(
        devices=arguments.devices,
        rounds=arguments.rounds,
        batch=arguments.batch,
        evaluate_every=arguments.evaluate_every,
        deadline_s=arguments.deadline_s,
        idle_s=arguments.idle_s,
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

    service = TrainingService(bundle, trainer, transport, plan, fleet=arguments.fleet, on_event=show)
    with display or contextlib.nullcontext():
        figures = service.run()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        trainer.save(arguments.out / "server.safetensors")
        (arguments.out / "result.json").write_text(json.dumps(figures, indent=1) + "\n")
    except OSError as exc:
        raise ConfigError(f"{arguments.out} cannot be written: {exc.strerror or exc}") from exc
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


if __name__ == "__main__":
    sys.exit(main())
