"""Windows of a source become decisions for as long as it goes on: no broker, sensor or window ends it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge_sdk.backlog import Backlog
from edge_sdk.decisions import By, Decision
from edge_sdk.errors import BatchError
from edge_sdk.logs import log
from edge_sdk.status import Condition
from edge_sdk.windows import Window

if TYPE_CHECKING:
    from edge_sdk.client import EdgeClient

__all__ = ["WindowDecision", "decide_windows"]

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


def decide_windows(client: EdgeClient, backlog: Backlog, *, most: int) -> Iterator[WindowDecision]:
    """The decision on every window, in order. See ``EdgeClient.stream``."""
    every_s = client.budget.connect_every_s
    wake_s = -math.inf if every_s is None else time.monotonic() + every_s
    if every_s is None:
        client.wake()  # the first window of a file would else come too early for the server
    while True:
        client.turn()
        if backlog.silent:
            client.status.enter(Condition.SENSOR_SILENT)
        left_s = wake_s - time.monotonic()
        if left_s > 0 and not backlog.full and not backlog.over:
            if not backlog.silent:
                client.status.enter(Condition.SLEEPING)
            client.hang_up()
            backlog.wait_full(min(left_s, _TURN_S))
            continue
        windows = backlog.take(min(most, client.bundle.manifest.max_batch))
        _count_dropped(client, backlog)
        if windows:
            if every_s is not None:
                client.wake()
            yield from _decide(client, windows)
        elif backlog.over:
            return
        else:
            if every_s is not None and not client.updating:
                wake_s = time.monotonic() + every_s
            else:
                client.look()
            backlog.wait(_TURN_S)


def _decide(client: EdgeClient, windows: Sequence[Window]) -> Iterator[WindowDecision]:
    """Refuse what must not be sent, have the rest decided as one batch, count all of it."""
    names = client.bundle.manifest.classes
    checked = [_checked(client, window) for window in windows]
    sound = [x for x, _ in checked if x is not None]
    decision = client.infer(np.stack(sound)) if sound else None
    _count(client, decision, len(sound), [fault for _, fault in checked if fault])
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


def _checked(client: EdgeClient, window: Window) -> tuple[npt.NDArray[np.float32] | None, str]:
    """The window as the front takes it, or why it is refused."""
    if window.fault:
        return None, window.fault
    try:
        return client.station.batch(window.x[None])[0], ""
    except BatchError:
        pass
    if window.x.shape != client.bundle.manifest.input_shape or window.x.dtype.kind != "f":
        return None, "shape"
    return None, "range" if np.isfinite(window.x).all() else "not-finite"


def _count(client: EdgeClient, decision: Decision | None, sound: int, faults: list[str]) -> None:
    counts = client.status.counts
    counts["seen"] += sound + len(faults)
    counts.update(f"refused.{fault}" for fault in faults)
    if decision is not None:
        counts[decision.by] += sound
        client.status.enter(Condition.SAVING if decision.why == "budget" else _CONDITIONS[decision.by])
    elif set(faults) == {"rate"}:
        client.status.enter(Condition.SENSOR_RATE)
    else:
        client.status.enter(Condition.SENSOR_VALUES)
    if faults:
        counts["refused"] += len(faults)
        log("refused", windows=len(faults), refused=counts["refused"], why="; ".join(sorted(set(faults))))


def _count_dropped(client: EdgeClient, backlog: Backlog) -> None:
    before = client.status.counts["dropped"]
    if backlog.dropped > before:
        client.status.counts["dropped"] = backlog.dropped
        log("dropped", windows=backlog.dropped - before, dropped=backlog.dropped)
