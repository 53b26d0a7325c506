"""Whether the server can be asked now, and what is done so that it can be again: connect, join its run, leave it."""

from __future__ import annotations

from edge_sdk.errors import RefusedError, TransportError
from edge_sdk.logs import log, warn
from edge_sdk.plan import Plan
from edge_sdk.station import Station
from edge_sdk.uplink import Uplink

__all__ = ["Presence"]

_ENDED = ("run", "bundle", "version")  # refusals after which another announcement is waited for
_GONE = ("paused", "finished")  # what a server says last
_FIRST_WORD_S = 2.0  # a broker that is there sends what it retains within this


class Presence:
    """A device's place in its fleet.

    Args:
        station: the device's parts.
        again: the exchange can make a transport anew, so that it may connect by itself and more than once.
    """

    def __init__(self, station: Station, *, again: bool) -> None:
        self.again = again
        self._station = station
        self._exchange = station.exchange
        self._uplink: Uplink | None = None

    def start(self, wait_s: float) -> Plan:
        """Connect and join. See ``EdgeClient.start``."""
        if not self._exchange.is_open:
            self._exchange.use(self._exchange.dial())
        return self._join(wait_s)

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
        """Why the server cannot be asked now, as a key of ``ABSENCES``; empty where it can. Waits for nothing.

        Raises:
            RefusedError: it trains another bundle, or another run than an unfinished one of this device.
        """
        if not self._exchange.is_open:
            self.dial(0.0)
        if not self._exchange.connected:
            return "offline"
        if not self._exchange.joined:
            try:
                self._join(0.0)
            except TransportError:
                return "no-server"
        return "no-server" if self._station.plan.status in _GONE else ""

    def look(self) -> None:
        """Take what has come without waiting; connects in the background."""
        try:
            self.absence()
            if self._exchange.connected:
                self._exchange.listen(0.0)
        except RefusedError as exc:
            warn("refusal", why=exc.reason)
            self.leaves(exc)
        except TransportError as exc:
            warn("unreachable", why=str(exc))

    @property
    def failed(self) -> bool:
        """Whether the last attempt to connect in the background came to nothing."""
        return self._uplink is not None and self._uplink.failed

    def leaves(self, refusal: RefusedError) -> bool:
        """Whether after this refusal another announcement has to be waited for; then this one is forgotten."""
        if refusal.reason not in _ENDED:
            return False
        self._exchange.leave()
        return True

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
        except TransportError as exc:
            warn("unreachable", why=str(exc))
        except RefusedError as exc:
            warn("refusal", why=exc.reason)
            self.leaves(exc)

    def _join(self, wait_s: float) -> Plan:
        station = self._station
        trained, sent = station.count("trained"), station.count("sent")
        unfinished = "" if station.count("done") else station.state.run
        plan = self._exchange.join(wait_s, unfinished)
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
