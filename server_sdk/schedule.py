"""When a round may begin: whom it waits for, and for how long.

A schedule looks at clocks and at who is there; what it decides becomes a record of the log, and from then on the log
alone says what happened. So the result of a run depends on who took part, not on the order in which messages arrived.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from edge_sdk.wire import Message
from server_sdk.fronts import next_holder
from server_sdk.training_run import TrainingRun

__all__ = ["SCHEDULES", "Gathering", "Proposal", "Schedule"]

SCHEDULES = ("rounds", "async")
"""``rounds``: one batch of every device makes one optimizer step. ``async``: each batch makes one, as it comes."""


class Gathering:
    """Wait until everyone is there or the patience is over.

    Args:
        deadline_s: how long to wait for the rest after the first has come.
        clock: seconds, monotonic.
    """

    def __init__(self, deadline_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._deadline_s = deadline_s
        self._clock = clock
        self._since: float | None = None

    def again(self) -> None:
        """Let the patience begin anew."""
        self._since = None

    def over(self, present: Collection[str], awaited: Collection[str], *, least: int = 1) -> bool:
        """Whether to go on with those who are present; called again and again while they gather.

        Args:
            present: who has come.
            awaited: who is waited for until the deadline.
            least: nothing begins with fewer than this, deadline or not.
        """
        if not present:
            self._since = None
            return False
        now = self._clock()
        self._since = now if self._since is None else self._since
        if len(present) < least:
            return False
        if not set(awaited) <= set(present) and now - self._since < self._deadline_s:
            return False
        self._since = None
        return True


@dataclass(frozen=True)
class Proposal:
    """What should happen next: kind and fields of a record."""

    kind: str
    fields: dict[str, Any]


class Schedule:
    """Decide what the run does next.

    Args:
        deadline_s: how long a round, a mean of the fronts or a turn waits for a device that says nothing.
        clock: seconds, monotonic.
    """

    def __init__(self, deadline_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._round = Gathering(deadline_s, clock=clock)
        self._fronts = Gathering(deadline_s, clock=clock)
        self._turn = ("", -1)
        self._samples = 0

    def next(self, run: TrainingRun) -> Proposal | None:
        """The next record, or None while there is nothing to do but wait."""
        if run.plan.fronts == "frozen":
            return self._epoch(run)
        if run.plan.fronts == "shared":
            proposal = self._mean(run)
        elif run.plan.fronts == "relay":
            proposal = self._hand_over(run)
        else:
            proposal = None
        return proposal or self._train(run)

    def _train(self, run: TrainingRun) -> Proposal | None:
        if run.over or not run.waiting:
            self._round.again()
            return None
        if run.plan.schedule == "async" or run.plan.fronts == "relay":
            return _round(run, [next(iter(run.waiting))], [])
        least = 1 if run.round else run.plan.devices
        if not self._round.over(run.waiting, run.members, least=least):
            return None
        return _round(run, sorted(run.waiting), sorted(run.members - run.waiting.keys()))

    def _epoch(self, run: TrainingRun) -> Proposal | None:
        if run.over or run.store.ready:
            return None
        if not run.store.epoch and not self._stored(run):
            return None
        return Proposal("epoch", {"number": run.store.epoch + 1, "samples": len(run.store)})

    def _stored(self, run: TrainingRun) -> bool:
        """Whether every sample is here, or none came for the deadline: the rest may come later, or never."""
        if len(run.store) != self._samples:
            self._samples = len(run.store)
            self._round.again()
        devices = run.store.devices
        awaited = devices if run.store.complete == devices else ("the rest",)
        return self._round.over(devices, awaited, least=run.plan.devices)

    def _mean(self, run: TrainingRun) -> Proposal | None:
        if not self._fronts.over(run.fronts, run.owing | run.fronts.keys()):
            return None
        return _synchronise(run, sorted(run.fronts), mean=True)

    def _hand_over(self, run: TrainingRun) -> Proposal | None:
        if self._turn != (run.holder, run.round):
            self._turn = (run.holder, run.round)
            self._fronts.again()
        awaited = {run.holder, *run.fronts} - {""}
        least = run.plan.devices if not run.version and not run.last else 1
        if not self._fronts.over(run.fronts, awaited, least=least):
            return None
        if run.over:
            return _synchronise(run, sorted(run.fronts))
        holder = next_holder(run.fronts, run.last)
        return _synchronise(run, [holder], holder=holder)


def _round(run: TrainingRun, devices: list[str], absent: list[str]) -> Proposal:
    steps = [_key(device, run.waiting[device].message) for device in devices]
    return Proposal("round", {"round": run.round + 1, "steps": steps, "absent": absent})


def _synchronise(run: TrainingRun, devices: list[str], *, mean: bool = False, holder: str = "") -> Proposal:
    steps = [_key(device, run.fronts[device].message) for device in devices]
    return Proposal("synchronise", {"steps": steps, "mean": mean, "holder": holder})


def _key(device: str, message: Message) -> list[str | int]:
    return [device, message.session, message.step]
