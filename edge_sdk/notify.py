"""Tells a service manager how the device is doing (sd_notify(3), a datagram each); silent where nobody listens."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

__all__ = ["Notifier"]


class Notifier:
    """The service manager that ``NOTIFY_SOCKET`` names.

    Args:
        environment: where ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` stand.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if address else None
        watched = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        text = environment.get("WATCHDOG_USEC", "")
        self._every_s = int(text) / 1e6 / 3 if watched and text.isdecimal() and int(text) else None
        self._told_s = float("-inf")

    def send(self, **fields: str) -> None:
        """Send these assignments (``READY="1"``, ``STATUS="..."``); a manager that is gone is no error."""
        if self._socket is None:
            return
        text = "\n".join(f"{name}={' '.join(value.split())}" for name, value in fields.items())
        with contextlib.suppress(OSError):
            self._socket.sendto(text.encode(), self._address)

    def alive(self) -> None:
        """The work loop has made a turn; told three times in each watchdog interval at most."""
        if self._every_s is not None and time.monotonic() - self._told_s >= self._every_s:
            self._told_s = time.monotonic()
            self.send(WATCHDOG="1")

    def close(self) -> None:
        """Say nothing more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
