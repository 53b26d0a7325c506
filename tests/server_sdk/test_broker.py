"""The embedded broker: it answers, keeps its port, and is gone whatever becomes of its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server_sdk.broker import EmbeddedBroker, find_mosquitto
from server_sdk.errors import BrokerError

WAIT_S = 15.0


@pytest.fixture(params=["amqtt", "mosquitto"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "mosquitto" and find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    return request.param


def eventually(condition: Callable[[], bool]) -> None:
    deadline, pause = time.monotonic() + WAIT_S, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        pause.wait(0.02)


def runs(pid: int) -> bool:
    """Whether a process exists that is more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def connack(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        sock.sendall(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x05\x00\x01p")
        return sock.recv(4)


def test_it_answers_on_loopback_and_leaves_nothing_behind(kind: str) -> None:
    with EmbeddedBroker(kind) as broker:
        assert (broker.kind, broker.host) == (kind, "127.0.0.1")
        assert broker.alive
        assert connack(broker.port) == b"\x20\x02\x00\x00"
        pid, directory = broker.process.pid, broker._directory
        assert runs(pid)
    assert not broker.alive
    assert not runs(pid)
    assert not directory.exists()
    with pytest.raises(ConnectionRefusedError):
        connack(broker.port)
    broker.stop()


def test_it_listens_on_loopback_only(kind: str) -> None:
    with EmbeddedBroker(kind) as broker:
        wanted = f"{broker.port:04X}"
        for table, loopback in (("tcp", "0100007F"), ("tcp6", "none")):
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
            listening = [line.split()[1] for line in lines if line.split()[3] == "0A"]
            hosts = [address.split(":")[0] for address in listening if address.endswith(":" + wanted)]
            assert set(hosts) <= {loopback}


def test_auto_prefers_mosquitto() -> None:
    with EmbeddedBroker() as broker:
        assert broker.kind == ("mosquitto" if find_mosquitto() else "amqtt")


def test_auto_takes_amqtt_where_mosquitto_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_sdk.broker.find_mosquitto", lambda: None)
    assert EmbeddedBroker().kind == "amqtt"
    with pytest.raises(BrokerError, match="apt install mosquitto"):
        EmbeddedBroker("mosquitto")
    with pytest.raises(BrokerError, match="mosquitto is not used"):
        EmbeddedBroker(options=("max_packet_size 5000",))


def test_a_restart_and_a_kill_keep_the_port(kind: str) -> None:
    with EmbeddedBroker(kind) as broker:
        port, first = broker.port, broker.process.pid
        broker.kill()
        assert not broker.alive
        assert not runs(first)
        broker.restart()
        assert broker.port == port
        second = broker.process.pid
        broker.restart()
        assert broker.port == port
        assert connack(port) == b"\x20\x02\x00\x00"
        assert not runs(second)


def test_a_port_in_use_is_refused_with_a_remedy(kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BrokerError, match=rf"port {port} .* in use: end the program .* \(0 takes a free one\)"):
            EmbeddedBroker(kind, port).start()
    with EmbeddedBroker(kind, port) as broker:
        assert broker.port == port
        with pytest.raises(BrokerError, match="runs already"):
            broker.start()


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(BrokerError, match="choose 0"):
        EmbeddedBroker(port=70_000)
    with pytest.raises(BrokerError, match="use auto, mosquitto or amqtt"):
        EmbeddedBroker("emqx")
    with pytest.raises(BrokerError, match="not started"):
        _ = EmbeddedBroker().process


def test_the_plugins_of_amqtt_decide_who_may_connect() -> None:
    name = "amqtt.plugins.authentication.AnonymousAuthPlugin"
    for allowed, code in ((True, 0), (False, 5)):
        with EmbeddedBroker("amqtt", plugins={name: {"allow_anonymous": allowed}}) as broker:
            assert connack(broker.port) == bytes((0x20, 2, 0, code))


def test_plugins_are_refused_where_they_cannot_serve() -> None:
    with pytest.raises(BrokerError, match=r"amqtt ends at once .*: ModuleNotFoundError: No module named 'no'"):
        EmbeddedBroker("amqtt", plugins={"no.such.Plugin": {}}).start()
    if find_mosquitto() is not None:
        with pytest.raises(BrokerError, match="plugins are amqtt's"):
            EmbeddedBroker("mosquitto", plugins={})


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
def test_a_broker_that_does_not_start_says_why_and_is_gone() -> None:
    broker = EmbeddedBroker("mosquitto", options=("no_such_option true",))
    with pytest.raises(BrokerError, match="Unknown configuration variable"):
        broker.start()
    assert not broker.alive
    assert broker._directory is None


def test_it_outlives_the_thread_that_started_it(kind: str) -> None:
    broker = EmbeddedBroker(kind)
    starter = threading.Thread(target=broker.start)
    starter.start()
    starter.join(WAIT_S)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            broker.process.wait(0.3)
        assert connack(broker.port) == b"\x20\x02\x00\x00"
    finally:
        broker.stop()


PARENT = """
import sys, threading
from server_sdk.broker import EmbeddedBroker
broker = EmbeddedBroker(sys.argv[1]).start()
print(broker.process.pid, broker.port, flush=True)
threading.Event().wait(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs prctl")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_its_parent(kind: str, end: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, kind], stdout=subprocess.PIPE, text=True)
    pid, port = map(int, parent.stdout.readline().split())
    try:
        assert connack(port) == b"\x20\x02\x00\x00"
        assert runs(pid)
        parent.send_signal(end)
        parent.wait(WAIT_S)
        eventually(lambda: not runs(pid))
    finally:
        parent.kill()
        parent.wait(WAIT_S)
        parent.stdout.close()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "server_sdk.broker", *arguments]


def test_the_command_explains_itself() -> None:
    shown = subprocess.run(command("--help"), capture_output=True, text=True, timeout=WAIT_S)
    assert shown.returncode == 0
    assert "--port" in shown.stdout


def test_the_command_runs_until_it_is_interrupted(kind: str) -> None:
    running = subprocess.Popen(
        command("--kind", kind, "--port", "0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = running.stdout.readline()
        assert line.startswith(f"{kind} listens on 127.0.0.1:")
        port = int(line.split(";")[0].rpartition(":")[2])
        assert connack(port) == b"\x20\x02\x00\x00"
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=WAIT_S)
        assert (running.returncode, errors) == (0, "")
        with pytest.raises(ConnectionRefusedError):
            connack(port)
    finally:
        running.kill()
        running.wait(WAIT_S)


def test_the_command_reports_a_port_in_use(kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ("--kind", kind, "--port", str(taken.getsockname()[1]))
        ended = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=WAIT_S)
    assert ended.returncode == 1
    assert len(ended.stderr.strip().splitlines()) == 1
    assert "in use" in ended.stderr


def test_the_environment_of_the_parent_is_not_needed(kind: str, tmp_path: Path) -> None:
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        with EmbeddedBroker(kind) as broker:
            assert connack(broker.port) == b"\x20\x02\x00\x00"
    finally:
        os.chdir(before)
