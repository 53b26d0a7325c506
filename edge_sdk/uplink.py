"""Connects in the background, again and again, so that whoever decides on a window need not wait for a network."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from edge_sdk.errors import EdgeError
from edge_sdk.logs import warn
from edge_sdk.transport import Transport

__all__ = ["Uplink"]

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0


class Uplink:
    """One attempt at a time, each in a thread of its own; pauses between them double up to a minute.

    Args:
        dial: opens a connection; may wait.
        first_pause_s: after the first attempt that failed.
    """

    def __init__(self, dial: Callable[[], Transport], *, first_pause_s: float = _FIRST_PAUSE_S) -> None:
        self._dial = dial
        self._first_pause_s = first_pause_s
        self._pause_s = first_pause_s
        self._next_s = 0.0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ready: Transport | None = None
        self._closed = False
        self._failed = False

    @property
    def failed(self) -> bool:
        """Whether the last attempt that ended came to nothing."""
        return self._failed

    def poll(self, wait_s: float = 0.0) -> Transport | None:
        """An open connection, once; begins an attempt where none is under way and the pause is over.

        Args:
            wait_s: how long to wait for the attempt.
        """
        thread = self._thread
        if thread is None or not thread.is_alive():
            with self._lock:
                ready, self._ready = self._ready, None
            if ready is not None:
                self._thread, self._pause_s, self._next_s = None, self._first_pause_s, 0.0
                return ready
            if self._closed or time.monotonic() < self._next_s:
                return None
            thread = self._thread = threading.Thread(target=self._try, name="psgl-dial", daemon=True)
            thread.start()
        thread.join(wait_s)
        if thread.is_alive() or self._ready is None:
            return None
        return self.poll()

    def close(self) -> None:
        """Give up; a connection that is made after this is closed at once."""
        with self._lock:
            self._closed = True
            ready, self._ready = self._ready, None
        if ready is not None:
            ready.close()

    def _try(self) -> None:
        try:
            transport = self._dial()
        except EdgeError as exc:
            warn("unreachable", why=str(exc))
            self._failed = True
            self._next_s = time.monotonic() + self._pause_s * random.uniform(1.0, 1.25)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            return
        with self._lock:
            self._failed = False
            if not self._closed:
                self._ready = transport
                return
        transport.close()
