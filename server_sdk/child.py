"""A child process that cannot outlive its parent, however the parent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from server_sdk.errors import ServerError

__all__ = ["Child"]

# Runs a program that the kernel kills with the thread that started it. No preexec_fn: a fork of a process with threads
# may run no Python. Where there is no prctl (not Linux) only end() ends the child.
_DIE_WITH_PARENT = """\
import ctypes, os, signal, sys
libc = ctypes.CDLL(None)
if hasattr(libc, "prctl"):
    libc.prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class Child:
    """A running program in a session of its own, so that a Ctrl-C on the terminal reaches its parent alone.

    Args:
        command: absolute path of the program and its arguments.
        stdout: an open file, or ``subprocess.PIPE``.
        stderr: an open file, or ``subprocess.STDOUT``.
        environment: added to this process's own.

    Raises:
        ServerError: the program cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdout: IO[bytes] | int,
        stderr: IO[bytes] | int,
        environment: dict[str, str] | None = None,
    ) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        started: list[subprocess.Popen[bytes] | OSError | ValueError] = []
        ready = threading.Event()
        self._released = threading.Event()

        def keep() -> None:
            # The kernel's signal follows the thread that started the process: this one lives as long as the child.
            try:
                started.append(
                    subprocess.Popen(
                        [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command],
                        stdin=subprocess.DEVNULL,
                        stdout=stdout,
                        stderr=stderr,
                        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})},
                        start_new_session=True,
                    )
                )
            except (OSError, ValueError) as exc:
                started.append(exc)
            ready.set()
            self._released.wait()

        threading.Thread(target=keep, name="child-keeper", daemon=True).start()
        ready.wait()
        if isinstance(started[0], OSError | ValueError):
            raise ServerError(f"{command[0]} cannot be started: {started[0]}") from started[0]
        self.process = started[0]

    @property
    def alive(self) -> bool:
        """Whether the program runs."""
        return self.process.poll() is None

    def end(self, how: signal.Signals = signal.SIGTERM, *, grace_s: float = 2.0) -> None:
        """Send a signal, and SIGKILL after the grace period; returns when the program is gone. May be called again."""
        if self.alive:
            self.process.send_signal(how)
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._released.set()
