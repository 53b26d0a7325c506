"""What a service manager hears: a real datagram socket, in the file system and abstract."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import uuid
from pathlib import Path

import pytest

from edge_sdk.notify import Notifier

UNIT = Path(__file__).resolve().parents[2] / "examples" / "gateway" / "psgl-edge.service"


def listener(address: str) -> socket.socket:
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind("\0" + address[1:] if address.startswith("@") else address)
    manager.settimeout(5)
    return manager


@pytest.mark.parametrize("abstract", [False, True])
def test_messages_arrive(abstract: bool, tmp_path: Path) -> None:
    address = f"@psgl-{uuid.uuid4().hex}" if abstract else str(tmp_path / "notify")
    with listener(address) as manager:
        notifier = Notifier({"NOTIFY_SOCKET": address})
        notifier.send(READY="1", STATUS="one\nline")
        assert manager.recv(4096) == b"READY=1\nSTATUS=one line"
        notifier.close()
        notifier.send(READY="1")
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(4096)


def test_the_watchdog_is_fed_by_turns_and_not_at_each(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with listener(address) as manager:
        notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())})
        for _ in range(100):
            notifier.alive()
        assert manager.recv(4096) == b"WATCHDOG=1"
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(4096)
        other = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"})
        other.alive()
        with pytest.raises(BlockingIOError):
            manager.recv(4096)
        for each in (notifier, other):
            each.close()


def test_no_manager_and_a_manager_that_is_gone_are_no_error(tmp_path: Path) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_USEC": "x"}):
        notifier = Notifier(environment)
        notifier.send(READY="1")
        notifier.alive()
        notifier.close()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_valid() -> None:
    done = subprocess.run(["systemd-analyze", "verify", str(UNIT)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "psgl-edge" not in done.stderr, done.stderr
