"""psgl-edge: run a device from the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from edge_sdk.batch import Dataset, load_dataset
from edge_sdk.bundle import Bundle, load_bundle
from edge_sdk.bundle_commands import COMMANDS as BUNDLE_COMMANDS
from edge_sdk.bundle_commands import EXAMPLES as BUNDLE_EXAMPLES
from edge_sdk.bundle_commands import add_bundle_commands, add_public_key, run_bundle_command
from edge_sdk.client import EdgeClient
from edge_sdk.codec import pack_tensors
from edge_sdk.console import add_broker_options, add_debug, connection_from, new_parser, run, stop_on_signals
from edge_sdk.errors import BatchError, ConfigError
from edge_sdk.front import FrontState
from edge_sdk.ledger import bits_per_sample
from edge_sdk.memory import keep_freed_memory, peak_rss_mb
from edge_sdk.paho_transport import PahoTransport
from edge_sdk.sealing import load_key
from edge_sdk.signing import public_key_from
from edge_sdk.sqlite_state import SqliteState, forget
from edge_sdk.state import OutboxLimits
from edge_sdk.topics import check_name
from edge_sdk.training import follow

__all__ = ["main"]

_EXAMPLES = """\
  psgl-edge run net.psgl --data ward-1.npz --device ward-1 --host broker.clinic.example --ca ca.pem \\
      --user ward-1 --password-file pw
  psgl-edge run net.psgl --data ward-1.npz --device ward-1 --state-key-file /etc/psgl/key     (state encrypted)
  psgl-edge run net.psgl --data ward-1.npz --device ward-1            (a broker on this machine, port 1883)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``psgl-edge``; returns the exit code."""
    parser = new_parser(
        "psgl-edge", "A device of a split-learning fleet: its data stays here.", _EXAMPLES + BUNDLE_EXAMPLES
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "run",
        help="train with the fleet's server on the samples of a data file",
        description="Train the front layers of a bundle with the fleet's server, on the samples of a data file.",
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("bundle", type=Path, help="bundle made by psgl-export build")
    train.add_argument("--data", type=Path, required=True, help=".npz with x_train, y_train, x_test, y_test")
    train.add_argument("--device", required=True, help="name of this device in the fleet")
    train.add_argument("--seed", type=int, default=0, help="order of the batches (default %(default)s)")
    train.add_argument(
        "--shift",
        type=int,
        default=0,
        metavar="PIXELS",
        help="augment: move training images or signals by up to this (default %(default)s)",
    )
    train.add_argument(
        "--codec",
        choices=("float32", "float16"),
        default="float16",
        help="activations on the wire (default %(default)s); where the bundle packs its activations into few bits, of "
        "other tensors only",
    )
    train.add_argument("--chunk-bytes", type=int, default=65536, help="largest MQTT payload (default %(default)s)")
    train.add_argument(
        "--wait-s", type=float, default=120.0, help="wait this long for the server (default %(default)s)"
    )
    train.add_argument(
        "--give-up-s",
        type=float,
        default=600.0,
        help="end when a step stays without a reply (default %(default)s)",
    )
    state = train.add_argument_group("what a crash may cost: nothing")
    state.add_argument(
        "--state",
        type=Path,
        metavar="FILE",
        help="database with the front and the steps in flight (default runs/devices/<fleet>-<device>.sqlite)",
    )
    state.add_argument("--fresh", action="store_true", help="forget that state and start from the bundle's front")
    state.add_argument(
        "--state-key-file",
        type=Path,
        metavar="FILE",
        help="encrypt the batches in the state with this key (AES-256-GCM); else PSGL_STATE_KEY, if it is set",
    )
    state.add_argument(
        "--state-sync",
        choices=("off", "normal", "full"),
        default="normal",
        help="SQLite's synchronous: full survives a loss of power after every step (default %(default)s)",
    )
    state.add_argument(
        "--outbox-mb", type=float, default=64.0, metavar="MB", help="size of the outbox (default %(default)s)"
    )
    state.add_argument(
        "--when-full",
        choices=("block", "drop-oldest", "refuse"),
        default="block",
        help="what a full outbox does with one step more (default %(default)s)",
    )
    train.add_argument(
        "--measure-clean", action="store_true", help="evaluate once more at the end WITHOUT the perturbation"
    )
    train.add_argument(
        "--train-unperturbed",
        action="store_true",
        help="protocol P2, to measure only: training steps WITHOUT the perturbation, evaluation with it",
    )
    train.add_argument("--save-front", type=Path, metavar="FILE", help="write the trained front's tensors here (CBOR)")
    train.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write steps, bytes and memory of this process here (JSON)",
    )
    train.add_argument("--json", action="store_true", help="print every event as one JSON line")
    add_public_key(train)
    add_broker_options(train)
    add_debug(train)
    add_bundle_commands(commands)
    arguments = parser.parse_args(argv)
    command = run_bundle_command if arguments.command in BUNDLE_COMMANDS else _run
    return run(lambda: command(arguments), debug=getattr(arguments, "debug", False))


def _run(arguments: argparse.Namespace) -> int:
    keep_freed_memory()
    bundle = load_bundle(arguments.bundle, public_key=public_key_from(arguments.public_key, os.environ))
    signal = True if len(bundle.manifest.input_shape) == 2 else None
    dataset = load_dataset(arguments.data, classes=len(bundle.manifest.classes), signal=signal)
    if dataset.input_shape != bundle.manifest.input_shape:
        raise BatchError(
            f"{arguments.data} has samples of shape {dataset.input_shape}, "
            f"the bundle takes {bundle.manifest.input_shape}: use the bundle that was exported for this data"
        )
    if not 1024 <= arguments.chunk_bytes <= 1 << 20:
        raise ConfigError("--chunk-bytes is 1024 to 1048576")
    if not 0 <= arguments.shift < min(bundle.manifest.input_shape[1:]) or arguments.seed < 0:
        raise ConfigError("--shift is 0 or less than the image's size, --seed at least 0")
    with closing(_open_state(arguments, bundle)) as state:
        return _take_part(arguments, bundle, dataset, state)


def _open_state(arguments: argparse.Namespace, bundle: Bundle) -> SqliteState:
    fleet, device = check_name(arguments.fleet), check_name(arguments.device)
    path = arguments.state or Path("runs/devices") / f"{fleet}-{device}.sqlite"
    if arguments.fresh:
        forget(path)
    return SqliteState(
        path,
        FrontState(0, dict(bundle.initial)),
        bundle=bundle.id,
        fleet=fleet,
        device=device,
        limits=OutboxLimits(max_bytes=int(arguments.outbox_mb * 1e6), when_full=arguments.when_full),
        key=load_key(arguments.state_key_file, os.environ),
        synchronous=arguments.state_sync,
        on_note=lambda text: print(f"note: {text}", file=sys.stderr, flush=True),
    )


def _take_part(arguments: argparse.Namespace, bundle: Bundle, dataset: Dataset, state: SqliteState) -> int:
    transport = PahoTransport(connection_from(arguments), client_id=f"psgl-{arguments.fleet}-{arguments.device}")
    client = EdgeClient(
        bundle,
        transport,
        device=arguments.device,
        fleet=arguments.fleet,
        state=state,
        codec=arguments.codec,
        chunk_bytes=arguments.chunk_bytes,
        give_up_s=arguments.give_up_s,
        train_epsilon=0.0 if arguments.train_unperturbed else None,
    )

    def show(event: dict[str, Any]) -> None:
        if arguments.json:
            print(json.dumps(event), flush=True)
        elif event["event"] == "evaluation":
            share = event["fused"] / event["samples"]
            print(f"round {event['round']}: {share:.1%} of {event['samples']} test samples right", flush=True)

    try:
        client.start(wait_s=arguments.wait_s)
        stop_on_signals(client.interrupt)  # an exception out of nowhere would leave the MQTT library half way
        follow(
            client,
            dataset.train,
            dataset.test,
            seed=arguments.seed,
            shift=arguments.shift,
            measure_clean=arguments.measure_clean,
            on_event=show,
        )
        if arguments.save_front:
            _write(arguments.save_front, pack_tensors(client.front.tensors))
        report = {
            "name": arguments.device,
            "steps": client.steps,
            "unperturbed": client.unperturbed,
            "samples_sent": client.samples_sent,
            "bits_per_sample": bits_per_sample(bundle.manifest),
            "bits_sent": client.bits_sent,
            "resent": client.traffic.resent,
            "bytes_sent": client.traffic.bytes_sent,
            "bytes_received": client.traffic.bytes_received,
            "rejected": client.traffic.rejected,
            "peak_rss_mb": round(peak_rss_mb(), 1),
            "torch_loaded": "torch" in sys.modules,
        }
        if arguments.report:
            _write(arguments.report, json.dumps(report, indent=1).encode())
        show({"event": "end", **report})
    finally:
        client.stop()
    return 0


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written: {exc.strerror or exc}") from exc


if __name__ == "__main__":
    sys.exit(main())
