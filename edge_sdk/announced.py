"""What the server announced, as this device follows it: the run it takes part in, and when that run is over."""

from __future__ import annotations

from edge_sdk.errors import RefusedError
from edge_sdk.plan import Plan

__all__ = ["Announced"]


class Announced:
    """The latest announcement, and whether the device has joined its run.

    Attributes:
        plan: the announcement that is followed, or None while one is waited for.
        joined: whether the device takes part in the plan's run.
    """

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.joined = False
        self._next: Plan | None = None  # the announcement that ended the run
        self._left: Plan | None = None  # the one that was left

    def begin(self) -> None:
        """Nothing was announced yet: the connection is new."""
        self.plan, self._next, self._left, self.joined = None, None, None, False

    def leave(self) -> None:
        """Forget the announcement: the next one is waited for, or taken where it has come, of whatever run."""
        self._left, self.plan, self._next, self.joined = self.plan, self._next, None, False

    def reconsider(self) -> None:
        """The device has another bundle now: what it left with the one before may be what it can join."""
        self.joined = False
        self.plan = self.plan or self._left

    def awaits(self, run: str) -> bool:
        """Whether there is nothing to join yet: no announcement, or a finished run that is not ``run``."""
        return self.plan is None or (self.plan.status == "finished" and self.plan.run != run)

    def join(self, bundle: str) -> Plan:
        """Take part in the announced run with this bundle.

        Raises:
            RefusedError: the server trains another bundle.
        """
        assert self.plan is not None, "join after awaits"
        if self.plan.bundle != bundle:
            raise RefusedError(
                "bundle",
                f"the server trains bundle {self.plan.bundle}, this device has {bundle}: copy the server's bundle here",
            )
        self.joined = True
        return self.plan

    def note(self, plan: Plan) -> bool:
        """Take a new announcement.

        Returns:
            Whether another server process goes on with the run that was joined, which has not seen what waits.

        Raises:
            RefusedError: the run that was joined is over.
        """
        joined = self.plan if self.joined else None
        if joined is not None and plan.run != joined.run:
            self._next = plan
            raise RefusedError(
                "run", f"the server trains run {plan.run} now, not {joined.run}: start this device again"
            )
        if joined is not None and plan.status == "finished":
            raise RefusedError(
                "run", f"the server ended run {joined.run}: start psgl-server train, then this device again"
            )
        self.plan = plan
        return joined is not None and plan.server != joined.server
