"""psgl-edge: run a device from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from edge_sdk.bundle import Bundle
from edge_sdk.bundle_commands import COMMANDS as BUNDLE_COMMANDS
from edge_sdk.bundle_commands import EXAMPLES as BUNDLE_EXAMPLES
from edge_sdk.bundle_commands import add_bundle_commands, run_bundle_command
from edge_sdk.config import load_config
from edge_sdk.console import (
    add_broker_options,
    add_debug,
    add_public_key,
    connection_from,
    new_parser,
    run,
    stop_on_signals,
)
from edge_sdk.dataset import Dataset
from edge_sdk.errors import ConfigError
from edge_sdk.memory import keep_freed_memory
from edge_sdk.paho_transport import PahoTransport
from edge_sdk.results import write_results
from edge_sdk.run_options import (
    add_device_options,
    add_update_options,
    client_of,
    open_state,
    read_bundle,
    read_samples,
    take_part,
)
from edge_sdk.sqlite_state import SqliteState

__all__ = ["main", "run_parser"]

_EXAMPLES = """\
  psgl-edge run net.psgl --data ward-1.npz --device ward-1 --host broker.clinic.example --ca ca.pem \\
      --user ward-1 --password-file pw
  psgl-edge run net.psgl --data ward-1.npz --device ward-1 --state-key-file /etc/psgl/key     (state encrypted)
  psgl-edge run net.psgl --data ward-1.npz --device ward-1            (a broker on this machine, port 1883)
  psgl-edge run net.psgl --device ward-1 --mode infer --source /run/ecg --decisions - --hop 64      (a live sensor)
  psgl-edge run --store /var/lib/psgl/bundles --update --public-key key.pub.pem --data ward-1.npz --device ward-1
  psgl-edge check /etc/psgl/device.toml                               (without connecting)
  psgl-edge run --config /etc/psgl/device.toml                        (a service: docs/device.md)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``psgl-edge``; returns the exit code."""
    parser, train = _parsers()
    arguments = parser.parse_args(argv)
    return run(lambda: _command(parser, train, argv, arguments), debug=getattr(arguments, "debug", False))


def run_parser() -> argparse.ArgumentParser:
    """The options of ``psgl-edge run``, which are those of a device's TOML file too."""
    return _parsers()[1]


def _command(
    parser: argparse.ArgumentParser,
    train: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    arguments: argparse.Namespace,
) -> int:
    if arguments.command in BUNDLE_COMMANDS:
        return run_bundle_command(arguments)
    if arguments.command == "check":
        return _check(train, arguments.config)
    return _run(_configured(parser, train, argv, arguments))


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The whole command, and its ``run``."""
    about = "A device of a split-learning fleet: its data stays here."
    parser = new_parser("psgl-edge", about, _EXAMPLES + BUNDLE_EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "run",
        help="train with the fleet's server on the samples of a data file",
        description="Train the front layers of a bundle with the fleet's server, on the samples of a data file.",
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("bundle", type=Path, nargs="?", help="bundle made by psgl-export build")
    add_update_options(train)
    train.add_argument("--data", type=Path, help=".npz with x_train, y_train, x_test, y_test")
    train.add_argument("--device", help="name of this device in the fleet")
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
    add_device_options(train)
    add_broker_options(train)
    add_debug(train)
    _add_check(commands)
    add_bundle_commands(commands)
    return parser, train


def _configured(
    parser: argparse.ArgumentParser,
    train: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    arguments: argparse.Namespace,
) -> argparse.Namespace:
    """The options, over those of ``--config``."""
    if arguments.config is not None:
        train.set_defaults(**load_config(arguments.config, train))
        arguments = parser.parse_args(argv)
    return _complete(arguments)


def _complete(arguments: argparse.Namespace) -> argparse.Namespace:
    if (arguments.bundle is None and arguments.store is None) or arguments.device is None:
        raise ConfigError(
            "a device needs a bundle and a name: give BUNDLE or --store, and --device, or the same in --config"
        )
    return arguments


def _check(train: argparse.ArgumentParser, path: Path) -> int:
    from edge_sdk.daemon import check

    train.set_defaults(**load_config(path, train))
    return check(_complete(train.parse_args([])))


def _run(arguments: argparse.Namespace) -> int:
    if arguments.config is not None or arguments.mode is not None:
        from edge_sdk.daemon import serve

        return serve(arguments)
    keep_freed_memory()
    bundle = read_bundle(arguments)
    dataset = read_samples(arguments, bundle)
    with closing(open_state(arguments, bundle)) as state:
        return _take_part(arguments, bundle, dataset, state)


def _take_part(arguments: argparse.Namespace, bundle: Bundle, dataset: Dataset, state: SqliteState) -> int:
    transport = PahoTransport(connection_from(arguments), client_id=f"psgl-{arguments.fleet}-{arguments.device}")
    client = client_of(arguments, bundle, transport, state)

    def show(event: dict[str, Any]) -> None:
        if arguments.json:
            print(json.dumps(event), flush=True)
        elif event["event"] == "evaluation":
            share = event["fused"] / event["samples"]
            print(f"round {event['round']}: {share:.1%} of {event['samples']} test samples right", flush=True)

    try:
        client.start(wait_s=arguments.wait_s)
        stop_on_signals(client.interrupt)  # an exception out of nowhere would leave the MQTT library half way
        take_part(client, dataset, arguments, show)
        report = write_results(client, arguments.save_front, arguments.report)
        show({"event": "end", **report})
    finally:
        client.stop()
    return 0


def _add_check(commands: Any) -> None:
    """Add ``check`` to the subcommands."""
    examples = "  psgl-edge check /etc/psgl/device.toml\n"
    checks = commands.add_parser(
        "check",
        help="try a device's TOML file without connecting",
        description="Read a device's TOML file and all that it names: bundle, data, source, keys; connect to nothing.",
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checks.add_argument("config", type=Path, help="the file that psgl-edge run --config takes")
    add_debug(checks)


if __name__ == "__main__":
    sys.exit(main())
