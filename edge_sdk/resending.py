"""Steps that wait for their reply: when each is sent again, and when the server has been silent for too long."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from edge_sdk.budget import Allowance
from edge_sdk.errors import TransportError
from edge_sdk.state import OutboxStep

__all__ = ["Resending", "Waiting"]

_LONGEST_PAUSE = 8  # times the first one


@dataclass
class Waiting:
    """A step without its reply.

    Attributes:
        outbox: the step.
        pause_s: before it is sent again.
        resend_at: when it is due, by ``time.monotonic``.
        sent: how often it was sent.
    """

    outbox: OutboxStep
    pause_s: float
    resend_at: float = 0.0
    sent: int = 0


class Resending:
    """The steps that wait, each due again after a pause that doubles.

    Args:
        resend_s: first pause before a step is due again; it doubles up to 8 times of this.
        give_up_s: how long the server may stay silent while a step waits.
        allowance: bytes that steps may still cost; None: as many as they need.
    """

    def __init__(self, *, resend_s: float, give_up_s: float, allowance: Allowance | None) -> None:
        self._resend_s = resend_s
        self._give_up_s = give_up_s
        self._allowance = allowance
        self._waiting: dict[int, Waiting] = {}
        self._heard = 0.0

    @property
    def steps(self) -> frozenset[int]:
        """Numbers of the steps that wait."""
        return frozenset(self._waiting)

    def add(self, outbox: OutboxStep) -> None:
        """From now on this step waits, and is due."""
        if not self._waiting:
            self.heard()
        self._waiting[outbox.step] = Waiting(outbox, self._resend_s)

    def get(self, step: int) -> Waiting | None:
        """The step of this number, where it waits."""
        return self._waiting.get(step)

    def drop(self, steps: Iterable[int]) -> None:
        """These wait no more."""
        for step in steps:
            self._waiting.pop(step, None)

    def clear(self) -> None:
        """None waits any more."""
        self._waiting.clear()

    def heard(self) -> None:
        """The server said something."""
        self._heard = time.monotonic()

    def hurry(self) -> None:
        """All are due now, with the first pause after: who should have answered was lost and is back."""
        for each in self._waiting.values():
            each.resend_at, each.pause_s = 0.0, self._resend_s

    def next_at(self) -> float:
        """When the next one is due, by ``time.monotonic``; never while none waits."""
        return min((each.resend_at for each in self._waiting.values()), default=math.inf)

    def due(self) -> Iterator[Waiting]:
        """Those to be sent now; each counts as sent when it is given.

        Raises:
            TransportError: the server was silent for ``give_up_s``.
        """
        now = time.monotonic()
        for each in tuple(self._waiting.values()):
            if each.resend_at > now:
                continue
            if each.sent and now - self._heard > self._give_up_s:
                raise TransportError(
                    f"no reply to step {each.outbox.step} for {self._give_up_s:g} s: "
                    "is the server up? look at psgl-server's output"
                )
            wait_s = 0.0 if self._allowance is None else self._allowance.wait_s(each.outbox.frames_size)
            if wait_s:
                each.resend_at = now + min(wait_s, 60.0)  # the clock of the allowance may be set meanwhile
                continue
            # Jitter keeps a fleet that lost its broker from coming back in one wave.
            each.resend_at = now + each.pause_s * random.uniform(1.0, 1.25)
            each.pause_s = min(2 * each.pause_s, _LONGEST_PAUSE * self._resend_s)
            each.sent += 1
            yield each
