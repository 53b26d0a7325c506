"""A device that works by itself: it trains, decides on windows, goes on after every loss, and says how it is doing."""

from __future__ import annotations

import argparse
import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

from edge_sdk.bundle import Bundle
from edge_sdk.client import EdgeClient
from edge_sdk.console import connection_from, stop_on_signals
from edge_sdk.dataset import Dataset
from edge_sdk.decision_file import DecisionFile
from edge_sdk.errors import ConfigError, PsglError, RefusedError, StateError, TransportError
from edge_sdk.front import Front
from edge_sdk.logs import configure, log, warn
from edge_sdk.memory import keep_freed_memory
from edge_sdk.noise import KEY_BYTES
from edge_sdk.notify import Notifier
from edge_sdk.results import write_results
from edge_sdk.run_options import (
    budget_of,
    client_of,
    limits_of,
    make_source,
    open_state,
    read_bundle,
    read_samples,
    take_part,
    windowing_of,
)
from edge_sdk.status import Condition
from edge_sdk.windows import Windowing

__all__ = ["check", "serve"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


def serve(arguments: argparse.Namespace) -> int:
    """Run a device until its work is done or it is asked to stop (SIGTERM, SIGINT), which is no failure.

    Args:
        arguments: of ``psgl-edge run``.

    Returns:
        The exit code, 0.

    Raises:
        PsglError: it cannot go on.
    """
    configure(arguments.log_level)
    keep_freed_memory()
    notifier = Notifier(os.environ)

    def show(condition: Condition) -> None:
        notifier.send(STATUS=f"{condition.value}: {condition.sentence}")

    show(Condition.STARTING)
    try:
        bundle, dataset = _read(arguments)
        with closing(open_state(arguments, bundle, on_note=lambda text: warn("state", why=text))) as state:
            client = client_of(
                arguments,
                bundle,
                connection_from(arguments),
                state,
                decision_s=arguments.decision_s,
                budget=budget_of(arguments),
                on_turn=notifier.alive,
            )
            client.status.listen(show)
            stop_on_signals(client.interrupt)
            signal.signal(signal.SIGHUP, lambda *_: client.reload())
            notifier.send(READY="1")
            log("started", device=arguments.device, fleet=arguments.fleet, bundle=bundle.id, mode=_mode(arguments))
            try:
                if dataset is not None:
                    _train(client, dataset, arguments)
                    write_results(client, arguments.save_front, arguments.report)
                if _mode(arguments) != "train":
                    _infer(client, arguments)
                client.status.enter(Condition.DONE)
            except KeyboardInterrupt:
                client.status.enter(Condition.STOPPING)
                notifier.send(STOPPING="1")
            finally:
                counts = client.status.counts
                log("ended", windows=counts["seen"], refused=counts["refused"], dropped=counts["dropped"])
                client.stop()
        return 0
    except KeyboardInterrupt:  # asked to stop before there was anything to stop
        return 0
    except PsglError as exc:
        condition = Condition.DISK if isinstance(exc, StateError) else Condition.FAILED
        warn("failed", state=condition.value, code=2)
        show(condition)
        raise
    finally:
        notifier.close()


def check(arguments: argparse.Namespace) -> int:
    """Try everything that can be tried without a connection, and say what the device would do.

    Raises:
        PsglError: the device could not begin.
    """
    bundle, _ = _read(arguments)
    Front(bundle, noise_key=bytes(KEY_BYTES))
    connection = connection_from(arguments)
    budget_of(arguments)
    state = arguments.state or Path("runs/devices")
    stores = [arguments.store] if arguments.update else []
    for path in (state, *stores, *(Path(each) for each in (arguments.decisions,) if each not in (None, "-"))):
        _check_writable(path)
    mode = _mode(arguments)
    if mode != "train":
        _windowing(arguments, bundle)
        make_source(arguments)
        limits_of(arguments)
    shape = "x".join(map(str, bundle.manifest.input_shape))
    print(f"device {arguments.device} of fleet {arguments.fleet}: {mode}")
    print(f"bundle {bundle.id}, profile {bundle.manifest.profile}, input {shape}, this onnxruntime runs it")
    print(f"broker {connection.address}, {'TLS' if connection.secure else 'NOT encrypted'} (not tried)")
    if mode != "train" and not bundle.manifest.decides_alone:
        print("without a connection there is no decision: the bundle has no guide")
    return 0


def _mode(arguments: argparse.Namespace) -> str:
    return str(arguments.mode or "train")


def _read(arguments: argparse.Namespace) -> tuple[Bundle, Dataset | None]:
    """The bundle, and the samples to train on where the mode has training."""
    bundle = read_bundle(arguments)
    if _mode(arguments) != "train" and arguments.decisions is None:
        raise ConfigError("decisions are patient data: say where they go with --decisions, or decisions in [infer]")
    return bundle, None if _mode(arguments) == "infer" else read_samples(arguments, bundle)


def _train(client: EdgeClient, dataset: Dataset, arguments: argparse.Namespace) -> None:
    """Take part in the server's run; whatever is lost meanwhile is waited for."""
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            client.wake(arguments.connect_timeout_s + 1)
            if not client.connected:
                raise TransportError("the broker is not there yet")
            client.status.enter(Condition.CONNECTING)
            client.start(wait_s=arguments.wait_s)
            pause_s = _FIRST_PAUSE_S
            client.status.enter(Condition.TRAINING)
            _follow(client, dataset, arguments)
            return
        except TransportError as exc:
            warn("unreachable", why=str(exc))
            client.status.enter(Condition.OFFLINE)
        except RefusedError as exc:
            if exc.reason != "bundle" or not arguments.update:
                raise
            warn("refusal", why=str(exc))  # a server with a bundle that this device can follow is waited for
        client.hang_up()
        client.pause(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _follow(client: EdgeClient, dataset: Dataset, arguments: argparse.Namespace) -> None:
    run, bundle = client.plan.run, client.bundle

    def show(event: dict[str, Any]) -> None:
        if event["event"] == "evaluation":
            log("evaluated", round=event["round"], samples=event["samples"])
        client.turn()
        if client.bundle is not bundle:
            raise TransportError("this device has another bundle now")  # the next start joins with it

    try:
        take_part(client, dataset, arguments, show)
    except RefusedError as exc:
        if exc.reason != "run" or client.state.run != run:
            raise
        raise TransportError("the server left its run") from exc  # the next start says whether this device can follow


def _infer(client: EdgeClient, arguments: argparse.Namespace) -> None:
    windowing = _windowing(arguments, client.bundle)
    stream = client.stream(
        make_source(arguments),
        windowing=windowing,
        limits=limits_of(arguments),
        silent_s=arguments.silent_s,
        most=arguments.max_windows,
    )
    with DecisionFile(arguments.decisions) as file:
        for each in stream:
            file.write(each)


def _windowing(arguments: argparse.Namespace, bundle: Bundle) -> Windowing | None:
    windowing = windowing_of(arguments, bundle)
    if windowing is None and arguments.source_kind == "csv":
        raise ConfigError("the bundle takes images, a CSV file has samples of a signal: use kind npz or python")
    return windowing


def _check_writable(path: Path) -> None:
    """A file that can be made or written; its folder may be missing yet."""
    if path.is_file() and not os.access(path, os.W_OK):
        raise StateError(f"{path} is read-only: make the file and its folder writable")
    for folder in (path, *path.resolve().parents):
        if folder.is_dir():
            if not os.access(folder, os.W_OK):
                raise StateError(f"{folder} is read-only: make it writable for this user")
            return
