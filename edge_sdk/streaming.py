"""Windows of a source become decisions for as long as it goes on: no broker, sensor or window ends it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edge_sdk.backlog import Backlog
from edge_sdk.decisions import By, Decision
from edge_sdk.errors import BatchError
from edge_sdk.logs import log
from edge_sdk.presence import Presence
from edge_sdk.station import Station
from edge_sdk.status import Condition, Status
from edge_sdk.windows import Window

__all__ = ["WindowDecider", "WindowDecision"]

_TURN_S = 0.25
_CONDITIONS = {"server": Condition.DECIDING, "guide": Condition.GUIDED, "none": Condition.UNDECIDED}


@dataclass(frozen=True)
class WindowDecision:
    """The decision on one window of a stream.

    Attributes:
        number: of the window, counted from 0; a number that is missing was dropped, for the backlog was full.
        at_s: time of the window's first sample, or None where the source has no times.
        by: ``server``, ``guide`` or ``none``, as in ``Decision``.
        why: why it is not the server's: a key of ``ABSENCES``, or of ``FAULTS`` where the window was refused.
        class_number: the most probable class, -1 where there is no decision.
        class_name: its name in the bundle, empty where there is no decision.
        probabilities: float32 (K), NaN where there is no decision.
    """

    number: int
    at_s: float | None
    by: By
    why: str
    class_number: int = field(repr=False)
    class_name: str = field(repr=False)
    probabilities: npt.NDArray[np.float32] = field(repr=False)


class WindowDecider:
    """Has the windows of a backlog decided.

    Args:
        station: the device's parts.
        presence: connects and disconnects.
        status: told what the device is doing; counts windows.
        infer: float32 (N, *input_shape) -> the decision on them.
    """

    def __init__(
        self,
        station: Station,
        presence: Presence,
        status: Status,
        infer: Callable[[npt.NDArray[np.float32]], Decision],
    ) -> None:
        self._station = station
        self._presence = presence
        self._status = status
        self._infer = infer

    def decide(self, backlog: Backlog, *, every_s: float | None, wait_s: float, most: int) -> Iterator[WindowDecision]:
        """The decision on every window, in order. See ``EdgeClient.stream``.

        Args:
            backlog: where the windows wait.
            every_s: seconds between two connections, or None to stay connected.
            wait_s: how long to wait for a connection.
            most: windows of one question.
        """
        wake_s = -math.inf if every_s is None else time.monotonic() + every_s
        if every_s is None:
            self._presence.wake(wait_s)  # the first window of a file would else come too early for the server
        while True:
            self._presence.turn()
            if backlog.silent:
                self._status.enter(Condition.SENSOR_SILENT)
            left_s = wake_s - time.monotonic()
            if left_s > 0 and not backlog.full and not backlog.over:
                if not backlog.silent:
                    self._status.enter(Condition.SLEEPING)
                self._presence.hang_up()
                backlog.wait_full(min(left_s, _TURN_S))
                continue
            windows = backlog.take(min(most, self._station.manifest.max_batch))
            self._count_dropped(backlog)
            if windows:
                if every_s is not None:
                    self._presence.wake(wait_s)
                yield from self._decide(windows)
            elif backlog.over:
                return
            else:
                if every_s is not None and not self._presence.updating:
                    wake_s = time.monotonic() + every_s
                else:
                    self._presence.look()
                backlog.wait(_TURN_S)

    def _decide(self, windows: Sequence[Window]) -> Iterator[WindowDecision]:
        """Refuse what must not be sent, have the rest decided as one batch, count all of it."""
        names = self._station.manifest.classes
        checked = [self._checked(window) for window in windows]
        sound = [x for x, _ in checked if x is not None]
        decision = self._infer(np.stack(sound)) if sound else None
        self._count(decision, len(sound), [fault for _, fault in checked if fault])
        position = 0
        for window, (x, fault) in zip(windows, checked, strict=True):
            if x is None or decision is None:
                nothing = np.full(len(names), math.nan, np.float32)
                yield WindowDecision(window.number, window.at_s, "none", fault, -1, "", nothing)
                continue
            chosen, probabilities = int(decision.classes[position]), decision.probabilities[position]
            name = names[chosen] if chosen >= 0 else ""
            yield WindowDecision(window.number, window.at_s, decision.by, decision.why, chosen, name, probabilities)
            position += 1

    def _checked(self, window: Window) -> tuple[npt.NDArray[np.float32] | None, str]:
        """The window as the front takes it, or why it is refused."""
        if window.fault:
            return None, window.fault
        try:
            return self._station.batch(window.x[None])[0], ""
        except BatchError:
            pass
        if window.x.shape != self._station.manifest.input_shape or window.x.dtype.kind != "f":
            return None, "shape"
        return None, "range" if np.isfinite(window.x).all() else "not-finite"

    def _count(self, decision: Decision | None, sound: int, faults: list[str]) -> None:
        counts = self._status.counts
        counts["seen"] += sound + len(faults)
        counts.update(f"refused.{fault}" for fault in faults)
        if decision is not None:
            counts[decision.by] += sound
            self._status.enter(Condition.SAVING if decision.why == "budget" else _CONDITIONS[decision.by])
        elif set(faults) == {"rate"}:
            self._status.enter(Condition.SENSOR_RATE)
        else:
            self._status.enter(Condition.SENSOR_VALUES)
        if faults:
            counts["refused"] += len(faults)
            log("refused", windows=len(faults), refused=counts["refused"], why="; ".join(sorted(set(faults))))

    def _count_dropped(self, backlog: Backlog) -> None:
        before = self._status.counts["dropped"]
        if backlog.dropped > before:
            self._status.counts["dropped"] = backlog.dropped
            log("dropped", windows=backlog.dropped - before, dropped=backlog.dropped)
