"""What stands between a sensor and a slow network: a bounded queue of windows between two threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from edge_sdk.batch import Range
from edge_sdk.errors import BatchError, ConfigError, EdgeError
from edge_sdk.windows import Window, Windower, Windowing

__all__ = ["Backlog", "BacklogLimits"]


@dataclass(frozen=True)
class BacklogLimits:
    """How many windows may wait, and what a full backlog does with one more.

    Attributes:
        max_windows: at least 1.
        when_full: ``drop-oldest``: the oldest window gives way; ``refuse``: the new one is not taken; both are counted.
            ``block``: the source waits, which suits a file and no sensor.

    Raises:
        ConfigError: no room for a window, or an unknown policy.
    """

    max_windows: int = 256
    when_full: Literal["block", "drop-oldest", "refuse"] = "drop-oldest"

    def __post_init__(self) -> None:
        if self.max_windows < 1:
            raise ConfigError(f"a backlog of {self.max_windows} windows: give at least 1")
        if self.when_full not in ("block", "drop-oldest", "refuse"):
            raise ConfigError(f"when_full is {self.when_full!r}: use block, drop-oldest or refuse")


class Backlog:
    """Reads a source in a thread of its own and keeps its windows, within limits, until they are taken.

    Args:
        source: gives ``Window`` objects, or samples.
        windowing: makes windows of samples; None where the source gives windows alone.
        input_range: of the bundle.
        limits: of the backlog.
        silent_s: a source that says nothing for so long is silent; None: it never is.
    """

    def __init__(
        self,
        source: Iterable[Any],
        *,
        windowing: Windowing | None = None,
        input_range: Range | None = None,
        limits: BacklogLimits | None = None,
        silent_s: float | None = None,
    ) -> None:
        self._source = source
        self._windower = None if windowing is None else Windower(windowing, input_range)
        self._limits = limits or BacklogLimits()
        self._silent_s = silent_s
        self._windows: deque[Window] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False
        self._error: EdgeError | None = None
        self._heard_s = time.monotonic()
        self._blocked = False
        self._dropped = 0
        self._thread = threading.Thread(target=self._read, name="psgl-sensor", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Windows that found no room, or had to give way."""
        return self._dropped

    @property
    def waiting(self) -> int:
        """Windows that wait."""
        return len(self._windows)

    @property
    def full(self) -> bool:
        """Whether one more would find no room."""
        return len(self._windows) >= self._limits.max_windows

    @property
    def over(self) -> bool:
        """Whether the source has ended; some windows may still wait."""
        return self._ended

    @property
    def silent(self) -> bool:
        """Whether the source has said nothing for longer than ``silent_s``, although it could have."""
        if self._silent_s is None or self._ended or self._blocked:
            return False
        return time.monotonic() - self._heard_s > self._silent_s

    def wait(self, timeout_s: float) -> None:
        """Wait until a window waits or the source ends, at most this long."""
        with self._changed:
            self._changed.wait_for(lambda: self._windows or self._ended, timeout_s)

    def wait_full(self, timeout_s: float) -> None:
        """Wait until there is no more room or the source ends, at most this long."""
        with self._changed:
            self._changed.wait_for(lambda: self.full or self._ended, timeout_s)

    def take(self, most: int) -> list[Window]:
        """The oldest windows, at most so many; empty where none waits.

        Raises:
            EdgeError: the source failed, once its last window was taken.
        """
        with self._changed:
            taken = [self._windows.popleft() for _ in range(min(most, len(self._windows)))]
            self._changed.notify_all()
            if not taken and self._error is not None:
                raise self._error
            return taken

    def close(self) -> None:
        """Take no more of the source; its thread ends with the sample that it waits for."""
        with self._changed:
            self._closed = self._ended = True
            self._changed.notify_all()

    def _read(self) -> None:
        try:
            for item in self._source:
                now_s = time.monotonic()
                if self._windower is not None and self._silent_s and now_s - self._heard_s > self._silent_s:
                    self._windower.forget()
                self._heard_s = now_s
                window = item if isinstance(item, Window) else self._window_of(item)
                if window is not None:
                    self._put(window)
                if self._closed:
                    return
        except EdgeError as exc:
            self._error = exc
        except Exception as exc:  # a driver may raise anything, and its text may hold samples
            self._error = BatchError(f"the source failed ({type(exc).__name__}): correct it, or the sensor's driver")
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _window_of(self, sample: Any) -> Window | None:
        if self._windower is None:
            raise ConfigError("the source gives samples, not windows: give a windowing (length, hop, channels)")
        return self._windower.add(sample)

    def _put(self, window: Window) -> None:
        with self._changed:
            if self.full and self._limits.when_full == "block":
                self._blocked = True
                self._changed.wait_for(lambda: not self.full or self._closed)
                self._blocked = False
                self._heard_s = time.monotonic()
            if self.full:
                self._dropped += 1
                if self._limits.when_full != "drop-oldest":
                    return
                self._windows.popleft()
            self._windows.append(window)
            self._changed.notify_all()
