"""A device that runs follows its server's bundle, or its store's after SIGHUP; windows and steps go on meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.bundle import MANIFEST, load_bundle, write_bundle
from edge_sdk.bundle_store import BundleStore
from edge_sdk.cli import main
from edge_sdk.signing import SigningKey, generate
from server_sdk.assembly import back_path
from tests.end_to_end.test_device_service import DRIVER, PATIENCE_S, configure, logged, service

ROUNDS = 40
EVERY_S = 0.02


@dataclass(frozen=True)
class Made:
    """A bundle with what a ward wants of it."""

    path: Path

    @property
    def id(self) -> str:
        return load_bundle(self.path).id


@pytest.fixture
def made(ward: Any, built: dict[str, Any]) -> dict[str, Made]:
    """Bundles ``a`` and ``b``, signed, and ``c``, unsigned: they differ in a learning rate. The ward has no others."""
    origin, bundles = built["paper"], {}
    generate(ward.folder / "key.pem")
    with zipfile.ZipFile(origin.path) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name != MANIFEST}
    for number, name in enumerate("abc", 1):
        path = ward.folder / f"{name}.psgl"
        key = SigningKey(ward.folder / "key.pem") if name != "c" else None
        write_bundle(path, replace(origin.bundle.manifest, learning_rate=0.01 * number), files, sign_key=key)
        shutil.copy(back_path(origin.path), back_path(path))
        bundles[name] = Made(path)
    ward._built = bundles
    BundleStore(ward.folder / "store").install(bundles["a"].path)
    return bundles


class Sensor:
    """Writes a window every few milliseconds, until it is stopped."""

    def __init__(self, folder: Path) -> None:
        (folder / "driver.py").write_text(DRIVER)
        os.mkfifo(folder / "sensor")
        self.sent = 0
        self._path = folder / "sensor"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(PATIENCE_S)

    def _write(self) -> None:
        with self._path.open("w", buffering=1) as pipe:
            while not self._over.wait(EVERY_S):
                pipe.write("0.5\n")
                self.sent += 1


@pytest.fixture
def sensor(ward: Any) -> Iterator[Sensor]:
    one = Sensor(ward.folder)
    yield one
    one._over.set()


def streaming(ward: Any, *options: object) -> Any:
    """A service that decides on the windows of a sensor, with a store in place of a bundle."""
    source = {"path": "driver:windows", "kind": "python"}
    infer = {"decisions": "d.jsonl", "decision_s": 5, "max_windows": 4}
    backlog = {"max_windows": 4096, "when_full": "block"}
    path = stored(configure(ward, "a", "infer", source=source, infer=infer, backlog=backlog))
    return service(ward, path, {}, *options)


def stored(path: Path) -> Path:
    """The same configuration with a store."""
    first, rest = path.read_text().split("\n", 1)
    assert first.startswith("bundle")
    path.write_text(f'store = "store"\n{rest}')
    return path


def heard(device: Any, event: str, after: int = 0, **fields: Any) -> int:
    """Wait for a record of the device's log, in the lines behind ``after``; the number of the line behind it."""
    found: list[int] = []

    def come() -> bool:
        for number, line in enumerate(device.errors[after:], after + 1):
            if line.startswith("{") and {"event": event, **fields}.items() <= json.loads(line).items():
                found.append(number)
                return True
        return device.process.poll() is not None

    with device._changed:
        device._changed.wait_for(come, PATIENCE_S)
    assert found, (event, fields, device.errors[-5:])
    return found[0]


def each_window_once(ward: Any, sensor: Sensor) -> list[dict[str, Any]]:
    decisions = [json.loads(line) for line in (ward.folder / "d.jsonl").read_text().splitlines()]
    assert [each["window"] for each in decisions] == list(range(sensor.sent))
    return decisions


@pytest.mark.timeout(180)
def test_a_stream_follows_the_server_to_another_bundle_and_back(
    ward: Any, made: dict[str, Made], sensor: Sensor
) -> None:
    store = BundleStore(ward.folder / "store")
    device = streaming(ward, "--update", "--public-key", ward.folder / "key.pub.pem")
    at = 0
    for number, name in enumerate("aba"):
        server = ward.server(ROUNDS, profile=name, out=f"server-{number}")
        if number:
            at = heard(device, "switched", at, bundle=made[name].id)
        at = heard(device, "joined", at)
        at = heard(device, "decided", at, state="server")
        assert store.names()[0] == made[name].id
        server.send(signal.SIGTERM)
        assert server.end() == 130, server.errors
    sensor.stop()
    assert device.end() == 0, device.errors
    by = {each["by"] for each in each_window_once(ward, sensor)}
    assert by == {"server", "guide"}, "while no server serves its bundle, the guide decides"
    fetching = [line for line in logged(device) if line["event"] == "fetching"]
    assert {line["bundle"] for line in fetching} == {made["b"].id}, "the store's other bundle is not fetched"
    assert fetching[-1]["fetched"] == fetching[-1]["total"] == made["b"].path.stat().st_size
    assert load_bundle(store.current).id == made["a"].id


@pytest.mark.timeout(180)
def test_a_stream_stays_with_its_bundle_when_another_is_not_signed(
    ward: Any, made: dict[str, Made], sensor: Sensor
) -> None:
    device = streaming(ward, "--update", "--public-key", ward.folder / "key.pub.pem")
    server = ward.server(ROUNDS, profile="c")
    at = heard(device, "update-refused", bundle=made["c"].id)
    heard(device, "decided", at, state="guide")
    listener = ward.listener(lambda fleet: f"psgl/v1/{fleet}/up/d1/state")
    state = listener.until(lambda message: bool(message.fields.get("update")))
    assert "is not signed" in server.wait("device", update=state.fields["update"])["update"]
    assert state.fields["manifest"] == made["a"].id
    sensor.stop()
    assert device.end() == 0, device.errors
    each_window_once(ward, sensor)
    assert [line["event"] for line in logged(device)].count("update-refused") == 1
    assert BundleStore(ward.folder / "store").names() == (made["a"].id, None)
    server.send(signal.SIGTERM)
    server.end()


@pytest.mark.timeout(180)
def test_training_goes_on_with_the_bundle_of_the_next_server(ward: Any, made: dict[str, Made]) -> None:
    device = service(
        ward, stored(configure(ward, "a", "train")), {}, "--update", "--public-key", ward.folder / "key.pub.pem"
    )
    server = ward.server(4000, profile="a", out="first")
    server.wait("round", round=3)
    server.send(signal.SIGTERM)
    assert server.end() == 130, server.errors
    server = ward.server(ROUNDS, profile="c", out="unsigned")
    at = heard(device, "update-refused", bundle=made["c"].id)
    server.send(signal.SIGTERM)
    assert server.end() == 130, server.errors
    server = ward.server(ROUNDS, "--public-key", ward.folder / "key.pub.pem", profile="b", out="second")
    assert device.end() == 0, device.errors
    assert server.end() == 0, server.errors
    first, second = ward.trained("first"), ward.trained("second")
    assert len(second) == len(set(second)) == ROUNDS == ward.report("d1")["steps"]
    assert {session for _, session, _ in first} == {session for _, session, _ in second}
    assert max(step for *_, step in first) < min(step for *_, step in second), "no number is drawn twice"
    heard(device, "switched", at, bundle=made["b"].id)
    assert [line["event"] for line in logged(device)].count("switched") == 1


@pytest.mark.timeout(180)
def test_sighup_takes_what_was_installed_by_hand(ward: Any, made: dict[str, Made], sensor: Sensor) -> None:
    store = ward.folder / "store"
    server = ward.server(ROUNDS, profile="c")
    device = streaming(ward)
    at = heard(device, "refusal", why="bundle")
    assert main(["install", str(made["c"].path), "--store", str(store)]) == 0
    device.send(signal.SIGHUP)
    at = heard(device, "switched", at, bundle=made["c"].id)
    at = heard(device, "decided", at, state="server")
    device.send(signal.SIGHUP)
    at = heard(device, "reload", at, why="this bundle runs already")
    assert main(["rollback", "--store", str(store)]) == 0
    device.send(signal.SIGHUP)
    at = heard(device, "switched", at, bundle=made["a"].id)
    heard(device, "decided", at, state="guide")
    sensor.stop()
    assert device.end() == 0, device.errors
    each_window_once(ward, sensor)
    server.send(signal.SIGTERM)
    server.end()


@pytest.mark.timeout(60)
def test_sighup_without_a_store_changes_nothing(ward: Any, made: dict[str, Made]) -> None:
    device = service(ward, configure(ward, "a", "train"), {})
    at = heard(device, "started")
    device.send(signal.SIGHUP)
    heard(device, "reload", at, why="this device has no store: there is nothing to reload")
    device.send(signal.SIGTERM)
    assert device.end() == 0, device.errors


@pytest.mark.timeout(60)
def test_options_that_contradict_each_other_are_one_line(ward: Any, made: dict[str, Made]) -> None:
    def line(path: Path, *options: object) -> str:
        text: str = service(ward, path, {}, *options).one_line()
        return text

    plain = configure(ward, "a", "train")
    assert "--update keeps bundles in a store" in line(plain, "--update")
    assert "give a bundle or --store, not both" in line(plain, "--store", ward.folder / "store")
    assert "a bundle is a program: --update needs --public-key" in line(stored(plain), "--update")
    assert "holds no bundle: psgl-edge install" in line(plain, "--store", ward.folder / "other")
    signed = ward._start("server_sdk.cli", *ward.train(1, "--public-key", ward.folder / "key.pub.pem", profile="c"))
    assert "is not signed" in signed.one_line()
    audit = ["audit", made["c"].path, "--data", ward.folder / "data.npz", "--public-key", ward.folder / "key.pub.pem"]
    assert "is not signed" in ward._start("server_sdk.cli", *audit).one_line()
