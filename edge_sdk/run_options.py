"""What is made of the options of ``psgl-edge run``, and those that a device needs beside those of one training run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from edge_sdk.backlog import BacklogLimits
from edge_sdk.budget import Budget
from edge_sdk.bundle import Bundle, load_bundle
from edge_sdk.bundle_store import BundleStore
from edge_sdk.client import EdgeClient
from edge_sdk.console import public_key_of
from edge_sdk.dataset import Dataset, load_dataset
from edge_sdk.errors import BatchError, ConfigError
from edge_sdk.front import FrontState
from edge_sdk.sealing import load_key
from edge_sdk.sources import csv_samples, npz_windows, python_samples
from edge_sdk.sqlite_state import SqliteState, forget
from edge_sdk.state import OutboxLimits, State
from edge_sdk.topics import check_name
from edge_sdk.training import follow
from edge_sdk.transport import Connection, Transport
from edge_sdk.update import Updates
from edge_sdk.windows import Windowing

__all__ = [
    "MODES",
    "add_device_options",
    "add_update_options",
    "budget_of",
    "client_of",
    "limits_of",
    "make_source",
    "open_state",
    "read_bundle",
    "read_samples",
    "take_part",
    "updates_of",
    "windowing_of",
]

MODES = ("train", "infer", "train-then-infer")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a device that works by itself: mode, source, decisions, backlog, budget, log."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="run as a service by this TOML file")
    parser.add_argument("--mode", choices=MODES, help="run as a service: what it does (default with --config: train)")
    source = parser.add_argument_group("windows of a sensor (modes infer and train-then-infer)")
    source.add_argument("--source", metavar="PATH", help="file, named pipe, - for standard input, or module:function")
    source.add_argument(
        "--source-kind", choices=("csv", "npz", "python"), default="csv", help="what it is (default %(default)s)"
    )
    source.add_argument("--columns", nargs="+", metavar="NAME", help="CSV: columns of the channels, names or numbers")
    source.add_argument("--time-column", metavar="NAME", help="CSV: column of the time in seconds, name or number")
    source.add_argument("--array", metavar="NAME", help="npz: name of the array (default x, x_test, x_train)")
    source.add_argument(
        "--hop", type=int, metavar="SAMPLES", help="from window to window (default: the bundle's length, no overlap)"
    )
    source.add_argument("--hz", type=float, help="samples in a second, held against the times")
    source.add_argument(
        "--hz-tolerance", type=float, default=0.1, metavar="SHARE", help="how far it may be off (default %(default)s)"
    )
    source.add_argument(
        "--valid", type=float, nargs=2, metavar=("LOW", "HIGH"), help="what the sensor can measure; else it is refused"
    )
    source.add_argument("--silent-s", type=float, metavar="S", help="a sensor that says nothing for so long is silent")
    decisions = parser.add_argument_group("decisions")
    decisions.add_argument("--decisions", metavar="FILE", help="where decisions go (JSON lines), - for standard output")
    decisions.add_argument(
        "--decision-s",
        type=float,
        default=10.0,
        metavar="S",
        help="wait so long for the server, then the guide decides (default %(default)s)",
    )
    decisions.add_argument(
        "--max-windows", type=int, default=32, metavar="N", help="windows of one question (default %(default)s)"
    )
    decisions.add_argument(
        "--backlog-windows", type=int, default=256, metavar="N", help="windows that may wait (default %(default)s)"
    )
    decisions.add_argument(
        "--backlog-full",
        choices=("block", "drop-oldest", "refuse"),
        help="what happens with one more (default: block for a file, drop-oldest for a sensor)",
    )
    budget = parser.add_argument_group("battery and tariff")
    budget.add_argument(
        "--connect-every-s", type=float, metavar="S", help="gather windows for so long, connect, ask, disconnect"
    )
    budget.add_argument(
        "--max-bytes-per-hour", type=int, metavar="BYTES", help="of steps and questions sent, and of bundles fetched"
    )
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="of the service's log on standard error, JSON lines without patient data (default %(default)s)",
    )


def add_update_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a device whose bundle may change."""
    parser.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="run the current bundle of this store (psgl-edge install) in place of one by its path",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="fetch the bundle that the server announces, verify it and go on with it; needs --store and a public key",
    )
    parser.add_argument(
        "--update-mb",
        type=float,
        default=64.0,
        metavar="MB",
        help="largest bundle that is fetched (default %(default)s)",
    )


def updates_of(arguments: argparse.Namespace) -> Updates | None:
    """Where other bundles come from while the device runs; None without a store.

    Raises:
        ConfigError: the options contradict each other.
    """
    if arguments.store is None:
        if arguments.update:
            raise ConfigError("--update keeps bundles in a store: give --store, or store in --config")
        return None
    if arguments.bundle is not None:
        raise ConfigError("give a bundle or --store, not both: psgl-edge install puts a bundle into a store")
    key = public_key_of(arguments)
    return Updates(BundleStore(arguments.store), key, arguments.update, 1e6 * arguments.update_mb)


def open_state(
    arguments: argparse.Namespace, bundle: Bundle, *, on_note: Callable[[str], None] | None = None
) -> SqliteState:
    """The device's database; one of its store's other bundle goes over to this one."""
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
        related=[] if arguments.store is None else [name for name in BundleStore(arguments.store).names() if name],
        limits=OutboxLimits(max_bytes=int(arguments.outbox_mb * 1e6), when_full=arguments.when_full),
        key=load_key(arguments.state_key_file, os.environ),
        synchronous=arguments.state_sync,
        on_note=on_note or (lambda text: print(f"note: {text}", file=sys.stderr, flush=True)),
    )


def read_bundle(arguments: argparse.Namespace) -> Bundle:
    """The bundle, and a look at the options that hang on it.

    Raises:
        BundleError, ConfigError: it cannot be used, or not so.
    """
    check_name(arguments.fleet), check_name(arguments.device)
    updates = updates_of(arguments)
    if updates is None:
        bundle = load_bundle(arguments.bundle, public_key=public_key_of(arguments))
    else:
        bundle = updates.store.load(public_key=updates.public_key)
    if not 1024 <= arguments.chunk_bytes <= 1 << 20:
        raise ConfigError("--chunk-bytes is 1024 to 1048576")
    if not 0 <= arguments.shift < min(bundle.manifest.input_shape[1:]) or arguments.seed < 0:
        raise ConfigError("--shift is 0 or less than the sample's size, --seed at least 0")
    return bundle


def read_samples(arguments: argparse.Namespace, bundle: Bundle) -> Dataset:
    """The samples to train on.

    Raises:
        BatchError, ConfigError: there are none, or not for this bundle.
    """
    if arguments.data is None:
        raise ConfigError("there are no samples to train on: give --data, or data in [train]")
    manifest = bundle.manifest
    signal = True if len(manifest.input_shape) == 2 else None
    dataset = load_dataset(arguments.data, classes=len(manifest.classes), signal=signal)
    if dataset.input_shape != manifest.input_shape:
        raise BatchError(
            f"{arguments.data} has samples of shape {dataset.input_shape}, "
            f"the bundle takes {manifest.input_shape}: use the bundle that was exported for this data"
        )
    return dataset


def client_of(
    arguments: argparse.Namespace, bundle: Bundle, transport: Transport | Connection, state: State, **further: Any
) -> EdgeClient:
    """The device.

    Args:
        further: options of ``EdgeClient``.
    """
    return EdgeClient(
        bundle,
        transport,
        device=arguments.device,
        fleet=arguments.fleet,
        state=state,
        codec=arguments.codec,
        chunk_bytes=arguments.chunk_bytes,
        give_up_s=arguments.give_up_s,
        train_epsilon=0.0 if arguments.train_unperturbed else None,
        updates=updates_of(arguments),
        **further,
    )


def take_part(
    client: EdgeClient, dataset: Dataset, arguments: argparse.Namespace, on_event: Callable[[dict[str, Any]], None]
) -> None:
    """Follow the server's run to its end. See ``training.follow``."""
    follow(
        client,
        dataset.train,
        dataset.test,
        seed=arguments.seed,
        shift=arguments.shift,
        measure_clean=arguments.measure_clean,
        on_event=on_event,
    )


def windowing_of(arguments: argparse.Namespace, bundle: Bundle) -> Windowing | None:
    """How samples become windows of this bundle; None where its input is an image."""
    shape = bundle.manifest.input_shape
    if len(shape) != 2:
        return None
    return Windowing(
        length=shape[1],
        hop=arguments.hop,
        channels=shape[0],
        hz=arguments.hz,
        tolerance=arguments.hz_tolerance,
        valid=None if arguments.valid is None else tuple(arguments.valid),
    )


def make_source(arguments: argparse.Namespace) -> Iterable[Any]:
    """What the options name as the source of windows.

    Raises:
        BatchError, ConfigError: it is not there.
    """
    if not arguments.source:
        raise ConfigError("there is no source of windows: give --source, or path in [source]")
    if arguments.source_kind == "python":
        return python_samples(arguments.source)
    if arguments.source_kind == "npz":
        return npz_windows(arguments.source, key=arguments.array)
    if arguments.source != "-" and not Path(arguments.source).exists():
        raise ConfigError(f"there is no source at {arguments.source}: correct --source, or path in [source]")
    columns = None if arguments.columns is None else [_column(name) for name in arguments.columns]
    clock = None if arguments.time_column is None else _column(arguments.time_column)
    if arguments.hz is not None and clock is None:
        raise ConfigError("hz is held against times: name their column with --time-column, or time_column in [source]")
    return csv_samples(arguments.source, columns=columns, time_column=clock, again=Path(arguments.source).is_fifo())


def limits_of(arguments: argparse.Namespace) -> BacklogLimits:
    """Of the backlog: a file can wait, a sensor cannot."""
    waits = arguments.source_kind == "npz" or (arguments.source_kind == "csv" and Path(arguments.source).is_file())
    return BacklogLimits(arguments.backlog_windows, arguments.backlog_full or ("block" if waits else "drop-oldest"))


def budget_of(arguments: argparse.Namespace) -> Budget:
    """How much the radio may be used."""
    return Budget(arguments.connect_every_s, arguments.max_bytes_per_hour)


def _column(name: object) -> str | int:
    text = str(name)
    return int(text) if text.isdecimal() else text
