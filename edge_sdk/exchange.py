"""A step goes out and its reply comes back: the device's end of the conversation with its server.

A step is done when its reply has come: until then the same bytes are sent again, after a pause that doubles, and at
once when the connection or the server was lost and is back. A PUBACK of the broker is no reply.
"""

from __future__ import annotations

import contextlib
import math
import platform
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_sdk import topics
from edge_sdk.announced import Announced
from edge_sdk.budget import Allowance
from edge_sdk.errors import RefusedError, TransportError, WireError
from edge_sdk.plan import Plan, plan_of, refuse_version
from edge_sdk.resending import Resending
from edge_sdk.state import OutboxStep
from edge_sdk.transport import Received, Transport, Will
from edge_sdk.version import __version__
from edge_sdk.wire import (
    VERSION,
    Assembler,
    Limits,
    Message,
    decode_frame,
    encode,
    foreign_version,
)

__all__ = ["Exchange", "Reply", "Traffic"]

_NO_RUN = ""
_REPLIES = ("gradient", "stored", "synchronised", "decision", "part", "refused")


@dataclass(frozen=True)
class Reply:
    """The server's answer to a step.

    Attributes:
        message: of kind ``gradient``, ``stored``, ``synchronised``, ``decision``, ``part`` or ``refused``.
        step: the number of the step.
        resent: how often the step was sent again.
    """

    message: Message
    step: int
    resent: int


@dataclass
class Traffic:
    """What has crossed the wire.

    Attributes:
        bytes_sent: of steps, repeats included.
        bytes_received: of everything.
        resent: repeats of steps.
        rejected: messages that were none of this protocol, by reason.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    resent: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    @property
    def sizes(self) -> dict[str, float]:
        """What every record of the log says of the traffic."""
        return {"bytes_sent": self.bytes_sent, "bytes_received": self.bytes_received}


class Exchange:
    """Send steps and wait for their replies.

    Args:
        transport: opened and closed here; or what makes one, so that ``open`` may be called again after ``close``.
        fleet, device: names, checked.
        session: of the device's state.
        bundle: id of the device's bundle.
        resend_s: first pause before a step is sent again; it doubles up to 8 times of this.
        give_up_s: how long the server may stay silent while a step waits.
        allowance: bytes that steps may still cost; None: as many as they need.
        on_turn: called at each turn of whatever waits here, so at least once a second.

    Raises:
        ConfigError: a name that no topic can carry.
    """

    def __init__(
        self,
        transport: Transport | Callable[[], Transport],
        *,
        fleet: str,
        device: str,
        session: str,
        bundle: str,
        resend_s: float,
        give_up_s: float,
        allowance: Allowance | None = None,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        self._make = transport if callable(transport) else lambda: transport
        self._transport: Transport | None = None
        self._allowance = allowance
        self._turn = on_turn
        self._fleet = fleet
        self._state_topic = topics.up_state(fleet, device)
        self._up_topic = topics.up_step(fleet, device)
        self._down_topic = topics.down_step(fleet, device)
        self._model_topic = topics.down_model(fleet)
        self._session = session
        self._bundle = bundle
        self._limits = Limits()
        self._assembler = Assembler(self._limits)
        self._generation = -1
        self._refused = 0
        self._announced = Announced()
        self._waiting = Resending(resend_s=resend_s, give_up_s=give_up_s, allowance=allowance)
        self._arrived: deque[Reply] = deque()
        self._taken: deque[Received] = deque()
        self._status: dict[str, Any] = {"status": "online"}
        self._interrupted = threading.Event()
        self.traffic = Traffic()

    def open(self, wait_s: float, run: str = "") -> Plan:
        """Connect, announce the device and wait for a server that trains this bundle.

        Args:
            wait_s: how long to wait.
            run: the run that the device takes part in; of no other is a finished run of interest.

        Raises:
            TransportError: no broker, or no server within ``wait_s``.
            RefusedError: the server trains another bundle or speaks another version of the protocol.
        """
        self.use(self.dial())
        return self.join(wait_s, run)

    def dial(self) -> Transport:
        """A connection for ``use``; may wait, and may be called in another thread.

        Raises:
            TransportError: no broker.
        """
        transport = self._make()
        try:
            transport.open(Will(self._state_topic, self._encode({"status": "offline"}), retain=True))
        except BaseException:
            transport.close()
            raise
        return transport

    def use(self, transport: Transport) -> None:
        """From now on speak over this connection; nothing of an earlier one is waited for.

        Raises:
            TransportError: the broker refuses a subscription.
        """
        self._transport = transport
        self._announced.begin()
        self._generation, self._refused = -1, transport.refused_messages
        self._assembler = Assembler(self._limits)
        self._waiting.clear()
        self._arrived.clear()
        self._taken.clear()
        transport.subscribe(self._down_topic)
        transport.subscribe(self._model_topic)

    def leave(self) -> None:
        """Forget the server's announcement: the next one is waited for, or taken where it has come, of whatever run."""
        self._announced.leave()

    def change_bundle(self, bundle: str) -> None:
        """From now on this device has another bundle: tell the fleet, and see whether it can join now."""
        self._bundle = bundle
        self._announced.reconsider()
        self.note()

    @property
    def is_open(self) -> bool:
        """Whether ``use`` was called, and not ``close`` since."""
        return self._transport is not None

    @property
    def plan(self) -> Plan | None:
        """The server's announcement that is followed, or None while one is waited for."""
        return self._announced.plan

    @property
    def joined(self) -> bool:
        """Whether there is an announcement that this device can follow."""
        return self._announced.joined

    @property
    def connected(self) -> bool:
        """Whether there is a connection to the broker now."""
        return self._transport is not None and self._transport.connected

    def join(self, wait_s: float, run: str = "") -> Plan:
        """Wait for the announcement of a server that trains this bundle.

        Args:
            wait_s: how long to wait.
            run: see ``open``.

        Raises:
            RefusedError, TransportError: see ``open``.
        """
        self._announced.joined = False
        deadline = time.monotonic() + wait_s
        while self._announced.awaits(run):
            self._greet()
            self._receive(max(min(1.0, deadline - time.monotonic()), 0.0))
            if self._announced.awaits(run) and time.monotonic() >= deadline:
                raise TransportError(
                    f"no server announced a run in fleet {self._fleet!r} within {wait_s:g} s: "
                    "start psgl-server train on this broker, with the same --fleet"
                )
        return self._announced.join(self._bundle)

    def close(self) -> None:
        """Say goodbye and close the transport; never raises."""
        transport, self._transport = self._transport, None
        if transport is None:
            return
        try:
            if self._status["status"] != "done":
                farewell = self._encode({**self._status, "status": "offline"})
                transport.publish(self._state_topic, farewell, retain=True)
        except (TransportError, WireError):
            pass
        finally:
            transport.close()

    def tell(self, **fields: Any) -> None:
        """Publish the device's state (retained).

        Raises:
            TransportError: the broker takes no more.
        """
        self._status |= fields
        self._open_transport.publish(self._state_topic, self._encode(self._status), retain=True)

    def note(self, **fields: Any) -> None:
        """As ``tell`` where there is a connection; else it is told with the next one."""
        self._status |= fields
        if self.connected:
            with contextlib.suppress(TransportError):
                self.tell()

    @property
    def waiting(self) -> frozenset[int]:
        """Numbers of the steps that were sent and have no reply."""
        return self._waiting.steps

    def send(self, outbox: OutboxStep) -> None:
        """Send a step now and again until its reply comes through ``reply``.

        Raises:
            TransportError: a packet that no broker takes.
        """
        self._waiting.add(outbox)
        self._send_due()

    def forget(self, steps: Iterable[int]) -> None:
        """Send these steps no more, and keep no reply to them."""
        gone = set(steps)
        self._waiting.drop(gone)
        self._arrived = deque(reply for reply in self._arrived if reply.step not in gone)

    def reply(self, timeout_s: float) -> Reply | None:
        """The next reply to a step that was sent, or None when none came within ``timeout_s``.

        Raises:
            RefusedError: the server ended the run.
            TransportError: the server was silent for ``give_up_s``, or a packet that no broker takes.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            if self._arrived:
                return self._arrived.popleft()
            self._send_due()
            now = time.monotonic()
            self._receive(max(min(0.25, self._waiting.next_at() - now, deadline - now), 0.0))
            if now >= deadline and not self._arrived:
                return None

    def affords(self, frames: Sequence[bytes]) -> bool:
        """Whether these may be sent now, by the allowance."""
        return self._allowance is None or self._allowance.wait_s(sum(map(len, frames))) == 0

    def pay(self, size: int) -> None:
        """Take so many bytes that have come out of the allowance, where there is one.

        Raises:
            StateError: the disk refuses.
        """
        if self._allowance is not None:
            self._allowance.spend(size)

    def ask(self, outbox: OutboxStep, meanwhile: Callable[[], None] = lambda: None) -> Reply:
        """Send a step until its reply comes; replies to other steps are kept for ``reply``.

        Args:
            outbox: the step.
            meanwhile: called once, after the step was sent for the first time.

        Returns:
            Its reply, which is no refusal.

        Raises:
            RefusedError: the server refused the step, or ended the run.
            TransportError: see ``reply``.
        """
        reply = self._await(outbox, meanwhile, math.inf)
        if reply is None:
            raise TransportError(f"no reply to step {outbox.step}: is the server up? look at psgl-server's output")
        return reply

    def ask_within(self, outbox: OutboxStep, timeout_s: float) -> Reply | None:
        """As ``ask``, but None when no reply came in time; a later one is ignored."""
        return self._await(outbox, lambda: None, timeout_s)

    def _await(self, outbox: OutboxStep, meanwhile: Callable[[], None], timeout_s: float) -> Reply | None:
        deadline = time.monotonic() + timeout_s
        self.send(outbox)
        meanwhile()
        try:
            return self.reply_to(outbox.step, deadline - time.monotonic())
        finally:
            self.forget([outbox.step])

    def reply_to(self, step: int, timeout_s: float) -> Reply | None:
        """The reply to this step, or None when it did not come in time; replies to other steps are kept for ``reply``.

        Raises:
            RefusedError, TransportError: see ``ask``.
        """
        deadline = time.monotonic() + timeout_s
        others: list[Reply] = []
        try:
            while True:
                reply = self.reply(max(min(1.0, deadline - time.monotonic()), 0.0))
                if reply is not None and reply.step == step:
                    return _unless_refused(reply)
                if reply is not None:
                    others.append(reply)
                elif time.monotonic() >= deadline:
                    return None
        finally:
            self._arrived.extendleft(reversed(others))

    def turn(self) -> None:
        """One turn of whoever waits elsewhere: raises KeyboardInterrupt after ``interrupt``."""
        self._turn()
        if self._interrupted.is_set():
            raise KeyboardInterrupt

    def interrupt(self) -> None:
        """Make whoever waits raise KeyboardInterrupt within a second; from any thread or a signal handler."""
        self._interrupted.set()

    def listen(self, timeout_s: float) -> None:
        """Take what the server announces for as long as this; nothing waits for a reply.

        Raises:
            RefusedError: the server ended the run.
        """
        self._greet()
        self._receive(timeout_s)

    def _encode(self, fields: dict[str, Any]) -> bytes:
        versions = {"psgl": __version__, "python": platform.python_version()}
        body = {"manifest": self._bundle, "versions": versions, "speaks": [VERSION], **fields}
        (frame,) = encode(Message("state", _NO_RUN, self._session, 0, body, {}), chunk_bytes=1 << 20)
        return frame

    def _greet(self) -> None:
        """After every new connection: tell the state anew, and send all that waits again."""
        generation = self._open_transport.generation
        if generation != self._generation:
            self._generation = generation
            self.tell()
            self._waiting.hurry()

    def _send_due(self) -> None:
        self._greet()
        if self._open_transport.refused_messages > self._refused:
            raise TransportError(
                f"the broker refuses what this device publishes on {self._up_topic}: correct its ACL for this user"
            )
        for each in self._waiting.due():
            self.traffic.resent += each.sent > 1
            self._send(each.outbox.frames)

    def _send(self, frames: tuple[bytes, ...]) -> None:
        transport = self._open_transport
        if self._allowance is not None:
            self._allowance.spend(sum(map(len, frames)))
        try:
            for frame in frames:
                transport.publish(self._up_topic, frame)
                self.traffic.bytes_sent += len(frame)
        except TransportError:
            # The queue is full because the broker is away: the same bytes go out after the pause.
            if max(map(len, frames)) > transport.max_packet_bytes:
                raise

    @property
    def _open_transport(self) -> Transport:
        if self._transport is None:
            raise TransportError("the client is not connected: call start() first")
        return self._transport

    def _receive(self, timeout_s: float) -> None:
        """Take one message: an announcement is noted, a reply kept, anything else counted.

        It is acknowledged to the broker when the next one is asked for, so that a reply takes effect first.
        """
        self.turn()
        while self._taken:
            self._taken.popleft().acknowledge()
        received = self._open_transport.receive(timeout_s)
        if received is None:
            return
        self._taken.append(received)
        self.traffic.bytes_received += len(received.payload)
        try:
            message = self._assembler.add(decode_frame(received.payload, self._limits))
            if message is not None:
                self._take(received.topic, message)
        except WireError as exc:
            self.traffic.rejected[exc.reason] += 1
            foreign = foreign_version(received.payload) if received.topic == self._model_topic else None
            if foreign is not None:
                refuse_version([foreign.version])

    def _take(self, topic: str, message: Message) -> None:
        if topic == self._model_topic:
            if message.kind == "model":
                self._waiting.heard()
                if self._announced.note(plan_of(message)):
                    self._waiting.hurry()
            return
        waiting = self._waiting.get(message.step) if message.session == self._session else None
        if waiting is None:
            return
        self._waiting.heard()
        if message.kind == "missing":
            frames = waiting.outbox.frames
            self._send(tuple(frames[index] for index in message.fields["chunks"] if index < len(frames)))
        elif message.fields.get("reason") == "version":
            # The server speaks this version, so the frame was damaged on its way: it goes out again.
            self.traffic.rejected["version"] += 1
        elif message.kind in _REPLIES:
            self._waiting.drop([message.step])
            self._arrived.append(Reply(message, message.step, waiting.sent - 1))


def _unless_refused(reply: Reply) -> Reply:
    if reply.message.kind != "refused":
        return reply
    reason, detail = str(reply.message.fields["reason"]), str(reply.message.fields.get("detail", ""))
    raise RefusedError(reason, f"the server refused step {reply.step} ({reason}): {detail}")
