"""The ``rounds`` schedule: one batch of every device, in the order of their names, makes one optimizer step.

The result depends on the seed and on who took part, not on the order in which messages arrived.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from edge_sdk.wire import Message
from server_sdk.inbox import Arrival

__all__ = ["Round", "Rounds"]


@dataclass(frozen=True)
class Round:
    """The steps of one round.

    Attributes:
        steps: one of each device that took part, ordered by device name.
        absent: devices whose step did not come before the deadline.
    """

    steps: tuple[Arrival, ...]
    absent: tuple[str, ...]


class Rounds:
    """Collect steps until a round is complete or its deadline is over.

    Args:
        devices: number of devices that the run waits for before its first round.
        deadline_s: how long a round waits for the rest after its first step came.
        clock: seconds, monotonic.
    """

    def __init__(self, devices: int, *, deadline_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._expected = devices
        self._deadline_s = deadline_s
        self._clock = clock
        self._waiting: dict[str, Message] = {}
        self._members: set[str] = set()
        self._opened = 0.0
        self._started = False

    @property
    def members(self) -> tuple[str, ...]:
        """Devices that a round waits for, by name."""
        return tuple(sorted(self._members))

    def offer(self, arrival: Arrival) -> bool:
        """Take a device's step into the open round; a newer step of the same device replaces the older.

        Returns:
            False if this very step already waits.
        """
        waiting = self._waiting.get(arrival.device)
        key = (arrival.message.session, arrival.message.step)
        if waiting is not None and (waiting.session, waiting.step) == key:
            return False
        if not self._waiting:
            self._opened = self._clock()
        self._waiting[arrival.device] = arrival.message
        self._members.add(arrival.device)
        return True

    def close(self) -> Round | None:
        """The next round if it is complete or over its deadline, else None."""
        if not self._waiting:
            return None
        complete = self._members <= set(self._waiting)
        if not self._started and len(self._members) < self._expected:
            return None
        if not complete and self._clock() - self._opened < self._deadline_s:
            return None
        self._started = True
        steps = tuple(Arrival(name, self._waiting[name]) for name in sorted(self._waiting))
        absent = tuple(sorted(self._members - set(self._waiting)))
        # Whoever missed a deadline is waited for again only after its next step.
        self._members -= set(absent)
        self._waiting = {}
        return Round(steps, absent)
