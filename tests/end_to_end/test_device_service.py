"""A device as a service: one TOML file, one command, a service manager that listens; on good days and bad."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edge_sdk.bundle import INITIAL, PARITY, load_bundle, write_bundle
from edge_sdk.codec import pack_tensors
from edge_sdk.vectors import pack_vectors
from server_sdk.broker import EmbeddedBroker

PATIENCE_S = 60.0
ROUNDS = 120
DRIVER = """
import numpy as np
from edge_sdk.windows import Window

def windows():
    with open("sensor") as file:
        for number, line in enumerate(file):
            yield Window(number, np.full((1, 8, 8), float(line)))
"""


class Manager:
    """What systemd would hear."""

    def __init__(self, path: Path) -> None:
        self.environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "1500000"}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self.heard: queue.Queue[str] = queue.Queue()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def until(self, text: str) -> None:
        """The next message that begins so."""
        while not self.heard.get(timeout=PATIENCE_S).startswith(text):
            pass

    def drain(self) -> list[str]:
        heard = []
        while not self.heard.empty():
            heard.append(self.heard.get())
        return heard

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._socket.close()

    def _listen(self) -> None:
        while data := self._socket.recv(4096):
            self.heard.put(data.decode())


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    one = Manager(tmp_path / "notify")
    yield one
    one.close()


def configure(ward: Any, profile: str, mode: str, port: int | None = None, **tables: dict[str, Any]) -> Path:
    """The file of device d1."""
    path: Path = ward.folder / "device.toml"
    tables = {
        "broker": {"port": port or ward.port, "connect_timeout_s": 1},
        "state": {"file": "d1.sqlite"},
        "train": {"data": "data.npz", "wait_s": 5, "report": "d1.json"},
        **tables,
    }
    head = {"bundle": str(ward.bundle(profile)), "device": "d1", "fleet": ward.fleet, "mode": mode}
    lines = [f"{key} = {json.dumps(value)}" for key, value in head.items()]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines))
    return path


def service(ward: Any, path: Path, environment: dict[str, str], *options: object) -> Any:
    return ward._start("edge_sdk.cli", "run", "--config", path, *options, environment=environment)


def logged(device: Any) -> list[dict[str, Any]]:
    """Its log; every line of standard error is a record."""
    return [json.loads(line) for line in device.errors if not line.startswith("error: ")]


def test_a_service_trains_stops_with_0_and_goes_on_where_it_was(ward: Any, manager: Manager) -> None:
    path = configure(ward, "vanilla", "train")
    server = ward.server(ROUNDS)
    device = service(ward, path, manager.environment)
    manager.until("STATUS=starting")
    manager.until("READY=1")
    manager.until("STATUS=training")
    server.wait("round", round=20)
    device.send(signal.SIGTERM)
    assert device.end() == 0, device.errors
    manager.until("STATUS=stopping")
    manager.until("STOPPING=1")
    assert len(server.of("round")) < ROUNDS
    steps = [line for line in logged(device) if line["event"] == "step"]
    assert steps and {"step", "round", "bytes_sent", "seconds"} <= steps[-1].keys()
    device = service(ward, path, manager.environment)
    assert device.end() == 0, device.errors
    manager.until("STATUS=done")
    assert server.end() == 0, server.errors
    trained = ward.trained()
    assert len(set(trained)) == len(trained) == ROUNDS and len({session for _, session, _ in trained}) == 1
    assert ward.report("d1")["steps"] == ROUNDS


def test_a_service_waits_for_a_broker_and_a_server_that_come_later(ward: Any, manager: Manager) -> None:
    with EmbeddedBroker() as spare:
        ward.port = spare.port
    device = service(ward, configure(ward, "vanilla", "train"), manager.environment)
    manager.until("READY=1")
    manager.until("STATUS=offline")
    manager.until("WATCHDOG=1")
    with EmbeddedBroker(port=ward.port):
        server = ward.server(20)
        assert device.end() == 0, device.errors
        assert server.end() == 0, server.errors
    assert any(line["event"] == "unreachable" for line in logged(device))


@pytest.mark.parametrize(("profile", "by"), [("paper", "guide"), ("hardened", "guide"), ("vanilla", "none")])
def test_without_a_network_a_service_decides_and_its_log_says_nothing_of_a_patient(
    profile: str, by: str, ward: Any, manager: Manager, built: dict[str, Any]
) -> None:
    with EmbeddedBroker() as gone:
        port = gone.port
    (ward.folder / "driver.py").write_text(DRIVER)
    os.mkfifo(ward.folder / "sensor")
    source = {"path": "driver:windows", "kind": "python", "silent_s": 0.3}
    path = configure(ward, profile, "infer", port, source=source, infer={"decisions": "d.jsonl"})
    device = service(ward, path, manager.environment)
    with (ward.folder / "sensor").open("w", buffering=1) as sensor:
        manager.until("READY=1")
        sensor.write("0.734567\nnan\n")
        manager.until("STATUS=guided" if by == "guide" else "STATUS=undecided")
        manager.until("STATUS=sensor-silent")
        manager.until("WATCHDOG=1")
        sensor.write("1.734567\n")
        manager.until("STATUS=sensor-values")
        sensor.write("0.5\n")
        manager.until("STATUS=guided" if by == "guide" else "STATUS=undecided")
        device.send(signal.SIGTERM)
        assert device.end() == 0, device.errors
    decisions = [json.loads(line) for line in (ward.folder / "d.jsonl").read_text().splitlines()]
    assert [(each["window"], each["by"], each["why"]) for each in decisions[:3]] == [
        (0, by, "offline"),
        (1, "none", "not-finite"),
        (2, "none", "range"),
    ]
    names = built[profile].bundle.manifest.classes
    assert (decisions[0]["class"] in names) if by == "guide" else (decisions[0]["class"] is None)
    assert (ward.folder / "d.jsonl").stat().st_mode & 0o777 == 0o600
    assert logged(device)[-1]["event"] == "ended" and logged(device)[-1]["refused"] == 2
    assert device.lines == [] and not any("734567" in line or '"class"' in line for line in device.errors)


def test_a_service_decides_by_the_server_over_a_real_broker(ward: Any, manager: Manager) -> None:
    server = ward.server(ROUNDS, profile="paper")
    server.wait("waiting")
    source = {"path": "data.npz", "kind": "npz"}
    path = configure(ward, "paper", "infer", source=source, infer={"decisions": "-", "max_windows": 1})
    device = service(ward, path, manager.environment, "--connect-every-s", 3600)
    assert device.end() == 0, device.errors
    decisions = [json.loads(line) for line in device.lines]
    assert [each["window"] for each in decisions] == list(range(12))
    assert {each["by"] for each in decisions} == {"server"}, decisions
    server.send(signal.SIGTERM)
    assert server.end() == 130


def test_a_service_that_hangs_is_silent_towards_its_watchdog(ward: Any, manager: Manager) -> None:
    path = configure(ward, "vanilla", "train")
    device = service(ward, path, manager.environment)
    manager.until("WATCHDOG=1")
    device.send(signal.SIGSTOP)
    manager.drain()
    with pytest.raises(queue.Empty):
        manager.heard.get(timeout=1.5)
    device.send(signal.SIGCONT)
    manager.until("WATCHDOG=1")
    device.send(signal.SIGTERM)
    assert device.end() == 0


def test_a_disk_that_is_full_ends_a_service_with_2_and_the_remedy(ward: Any, manager: Manager, small_disk: Any) -> None:
    with EmbeddedBroker() as gone:
        port = gone.port
    images = np.zeros((400, 1, 8, 8), np.uint8)
    np.savez(ward.folder / "many.npz", x=images)
    infer = {"decisions": str(small_disk.path / "d.jsonl")}
    path = configure(ward, "paper", "infer", port, source={"path": "many.npz", "kind": "npz"}, infer=infer)
    small_disk.fill()
    device = service(ward, path, manager.environment)
    line = device.one_line()
    kept = (small_disk.path / "d.jsonl").read_text()
    assert kept == "" or kept.endswith("}\n"), "whole lines only"
    assert "d.jsonl cannot be written: No space left on device" in line and "free space" in line
    manager.until("STATUS=disk-refuses")
    small_disk.free()
    device = service(ward, path, manager.environment)
    assert device.end() == 0, device.errors
    assert len((small_disk.path / "d.jsonl").read_text().splitlines()) >= 400


def test_check_says_what_a_device_would_do_or_why_it_would_not(ward: Any, built: dict[str, Any]) -> None:
    def check(path: Path) -> Any:
        return ward._start("edge_sdk.cli", "check", path)

    source = {"path": "data.npz", "kind": "npz"}
    good = configure(ward, "vanilla", "infer", 1, source=source, infer={"decisions": "d.jsonl"})
    checked = check(good)
    assert checked.end() == 0, checked.errors
    said = "\n".join(checked.lines)
    assert "device d1" in said and "NOT encrypted" in said and "no decision: the bundle has no guide" in said
    assert not (ward.folder / "d1.sqlite").exists() and not (ward.folder / "d.jsonl").exists()
    assert "say where they go" in check(configure(ward, "paper", "infer", source=source)).one_line()
    bad = configure(ward, "paper", "infer", source={"path": "none"}, infer={"decisions": "-"})
    assert "takes images" in check(bad).one_line()
    assert "there are no samples" in check(configure(ward, "paper", "train", train={"seed": 1})).one_line()
    assert (
        "--password-file: there is no file"
        in check(configure(ward, "paper", "train", broker={"user": "u", "password_file": "none"})).one_line()
    )


def test_a_bundle_for_another_onnxruntime_is_one_line(ward: Any, built: dict[str, Any]) -> None:
    bundle = load_bundle(built["vanilla"].path)
    files = {f"{name}.onnx": graph for name, graph in bundle.graphs.items()}
    model = onnx.load_from_string(files["infer.onnx"])
    model.opset_import[0].version = 60
    files["infer.onnx"] = model.SerializeToString()
    path = ward.folder / "new.psgl"
    newer = {**bundle.manifest.interfaces, "infer": replace(bundle.manifest.interfaces["infer"], opset=60)}
    files |= {INITIAL: pack_tensors(bundle.initial), PARITY: pack_vectors(bundle.parity)}
    write_bundle(path, replace(bundle.manifest, interfaces=newer), files)
    config = configure(ward, "vanilla", "train")
    config.write_text(config.read_text().replace(str(ward.bundle("vanilla")), str(path)))
    for line in (ward._start("edge_sdk.cli", "check", config).one_line(), service(ward, config, {}).one_line()):
        assert "cannot run the bundle's 'infer' graph" in line and "upgrade onnxruntime" in line
