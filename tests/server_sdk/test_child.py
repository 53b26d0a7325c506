"""A child process ends when it is told to, and when its parent is killed."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server_sdk.child import Child
from server_sdk.errors import ServerError

ROOT = Path(__file__).resolve().parents[2]
SLEEPER = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)",
]


def test_a_stubborn_child_is_ended_within_its_grace() -> None:
    child = Child(SLEEPER, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.process.stdout is not None and child.process.stdout.readline() == b"1\n"
    assert child.alive
    child.end(grace_s=0.1)
    assert not child.alive and child.process.returncode == -signal.SIGKILL
    child.end()
    child.process.stdout.close()


def test_a_killed_parent_takes_its_child_along() -> None:
    code = (
        "import subprocess, sys, time; from server_sdk.child import Child\n"
        f"c = Child({SLEEPER!r}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)\n"
        "c.process.stdout.readline(); print(c.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    handle = os.pidfd_open(pid)
    parent.kill()
    parent.wait(10)
    parent.stdout.close()
    # A pidfd becomes readable when its process has ended.
    ready, _, _ = select.select([handle], [], [], 10)
    os.close(handle)
    assert ready, "the child outlived its parent"


def test_a_program_that_is_not_there() -> None:
    child = Child(["/no/such/program"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert child.process.wait(10) != 0
    child.end()
    with pytest.raises(ServerError, match="cannot be started"):
        Child([sys.executable], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, environment={"A\0": "b"})
