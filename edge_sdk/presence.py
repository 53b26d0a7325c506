"""Whether the server can be asked now, and what is done so that it can be again: connect, join its run, leave it."""

from __future__ import annotations

import time

from edge_sdk.errors import RefusedError, TransportError
from edge_sdk.logs import log, warn
from edge_sdk.plan import Plan
from edge_sdk.station import Station
from edge_sdk.status import Condition, Status
from edge_sdk.update import Updater
from edge_sdk.uplink import Uplink

__all__ = ["Presence"]

_ENDED = ("run", "bundle", "version")  # refusals after which another announcement is waited for
_GONE = ("paused", "finished")  # what a server says last
_FIRST_WORD_S = 2.0  # a broker that is there sends what it retains within this


class Presence:
    """A device's place in its fleet.

    Args:
        station: the device's parts.
        status: told when the device connects.
        again: the exchange can make a transport anew, so that it may connect by itself and more than once.
        updater: changes the bundle, where the device has a store.
    """

    def __init__(self, station: Station, status: Status, *, again: bool, updater: Updater | None = None) -> None:
        self.again = again
        self._station = station
        self._status = status
        self._exchange = station.exchange
        self._updater = updater
        self._asked_to_reload = False  # no Event: a signal handler that comes while its lock is held would hang
        self._uplink: Uplink | None = None

    def start(self, wait_s: float) -> Plan:
        """Connect and join, with the announced bundle where this device follows it. See ``EdgeClient.start``."""
        if not self._exchange.is_open:
            self._exchange.use(self._exchange.dial())
        while (plan := self._join(wait_s, part_s=1.0)) is None:
            pass
        return plan

    def stop(self) -> None:
        """Disconnect; never raises."""
        uplink, self._uplink = self._uplink, None
        if uplink is not None:
            uplink.close()
        self._exchange.close()

    def need_plan(self) -> None:
        """Connect and join, where that was left to the client.

        Raises:
            RefusedError, TransportError: see ``EdgeClient.start``.
        """
        if self.again and not self._exchange.joined:
            self.start(60.0)

    def absence(self) -> str:
        """Why the server cannot be asked now, as a key of ``ABSENCES``; empty where it can. Waits for nothing."""
        try:
            return self._absence()
        except (RefusedError, TransportError) as exc:
            return self.excuse(exc)

    def excuse(self, failure: RefusedError | TransportError) -> str:
        """Log that the server could not be asked; why, as ``absence`` says it."""
        if isinstance(failure, TransportError):
            warn("unreachable", why=str(failure))
            return "offline"
        warn("refusal", why=failure.reason)
        if failure.reason not in _ENDED:
            return "refused"
        self._exchange.leave()
        return "no-server"

    def look(self) -> None:
        """Take what has come without waiting; connects in the background."""
        self.absence()
        try:
            if self._exchange.connected:
                self._exchange.listen(0.0)
        except (RefusedError, TransportError) as exc:
            self.excuse(exc)

    def _absence(self) -> str:
        if not self._exchange.is_open:
            self.dial(0.0)
        if not self._exchange.connected:
            return "offline"
        if not self._exchange.joined:
            try:
                if self._join(0.0) is None:
                    return "no-server"
            except TransportError:
                return "no-server"
        return "no-server" if self._station.plan.status in _GONE else ""

    @property
    def updating(self) -> bool:
        """Whether a part of another bundle is waited for."""
        return self._updater is not None and self._updater.under_way

    def reload(self) -> None:
        """Have ``turn`` look at the store; from any thread or a signal handler."""
        self._asked_to_reload = True

    def turn(self) -> None:
        """Between two steps, at least once a second. See ``EdgeClient.turn``."""
        self._exchange.turn()
        self._refresh()

    def pause(self, pause_s: float) -> None:
        """Do nothing for so long, but what ``turn`` does."""
        deadline = time.monotonic() + pause_s
        while (left_s := deadline - time.monotonic()) > 0:
            self.turn()
            time.sleep(min(left_s, 0.25))

    def wake(self, wait_s: float) -> None:
        """Connect in the background and wait so long for the first attempt."""
        deadline = time.monotonic() + wait_s
        while self.again and not self._exchange.is_open and time.monotonic() < deadline:
            self._status.enter(Condition.CONNECTING)
            self.turn()
            self.dial(0.1)
            if self._uplink is not None and self._uplink.failed:
                return

    def hang_up(self) -> None:
        """Disconnect until the next question, where the device can connect again."""
        if self.again and self._exchange.is_open:
            self.stop()
            log("disconnected", **self._exchange.traffic.sizes)

    def _refresh(self) -> None:
        if not self._asked_to_reload:
            return
        self._asked_to_reload = False
        if self._updater is None:
            log("reload", why="this device has no store: there is nothing to reload")
        else:
            self._updater.reload()

    def dial(self, wait_s: float) -> None:
        """Connect in the background; where that has come to something, take it."""
        if not self.again:
            return
        if self._uplink is None:
            self._uplink = Uplink(self._exchange.dial)
        transport = self._uplink.poll(wait_s)
        if transport is None:
            return
        try:
            self._exchange.use(transport)
            self._join(_FIRST_WORD_S)
        except (RefusedError, TransportError) as exc:
            self.excuse(exc)

    def _join(self, wait_s: float, *, part_s: float = 0.0) -> Plan | None:
        """Join the announced run; None while its bundle is fetched, each time for as long as ``part_s``."""
        station = self._station
        trained, sent = station.count("trained"), station.count("sent")
        unfinished = "" if station.count("done") else station.state.run
        try:
            plan = self._exchange.join(wait_s, unfinished)
        except RefusedError as exc:
            if exc.reason != "bundle" or self._updater is None:
                raise
            if why := self._updater.advance(part_s):
                raise RefusedError("bundle", f"{exc}; {why}") from exc
            return None
        if self._updater is not None:
            self._updater.drop()
        log("joined", run=plan.run, state=plan.status)
        if station.state.run == plan.run:
            return plan
        if unfinished and (trained or sent):
            raise RefusedError(
                "run",
                f"the server trains run {plan.run}, this device's state is of run {station.state.run} after "
                f"{trained} steps: resume that run on the server, or start this device over (psgl-edge run --fresh)",
            )
        station.state.begin_run(plan.run, station.front.initial_state())
        if plan.fronts == "relay":
            station.state.note({"synchronise": 1})  # ask for a turn before the first step
        return plan
