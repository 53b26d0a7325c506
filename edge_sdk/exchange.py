"""A step goes out and its reply comes back: the device's end of the conversation with its server.

A step is done when its reply has come: until then the same bytes are sent again, after a pause that doubles, and at
once when the connection or the server was lost and is back. A PUBACK of the broker is no reply.
"""

from __future__ import annotations

import platform
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_sdk import topics
from edge_sdk.errors import RefusedError, TransportError, WireError
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
    version_conflict,
)

__all__ = ["Exchange", "Plan", "Reply", "Traffic"]

_NO_RUN = ""
_REPLIES = ("gradient", "stored", "synchronised", "decision", "refused")
_LONGEST_PAUSE = 8  # times the first one


@dataclass(frozen=True)
class Plan:
    """What the server announced (retained, so that a device that joins late has it too).

    Attributes:
        run: id of the training run; a message of another run is refused.
        bundle: id of the bundle that the server trains.
        status: ``waiting`` for devices, ``training``, ``evaluating`` (every round is done), ``paused`` (the server
            was stopped and can go on) or ``finished``.
        rounds: rounds of the whole run.
        evaluate_every: rounds between two evaluations, 0 for none before the end.
        batch: samples of each device in one step.
        fronts: ``own``, ``shared``, ``relay`` or ``frozen``.
        front: version of the synchronised front, 0 before the first.
        server: id of one life of the server.
    """

    run: str
    bundle: str
    status: str
    rounds: int
    evaluate_every: int
    batch: int
    fronts: str = "own"
    front: int = 0
    server: str = ""


@dataclass(frozen=True)
class Reply:
    """The server's answer to a step.

    Attributes:
        message: of kind ``gradient``, ``stored``, ``synchronised``, ``decision`` or ``refused``.
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


@dataclass
class _Waiting:
    """A step without its reply."""

    outbox: OutboxStep
    pause_s: float
    resend_at: float = 0.0
    sent: int = 0


class Exchange:
    """Send steps and wait for their replies.

    Args:
        transport: opened and closed here.
        fleet, device: names, checked.
        session: of the device's state.
        bundle: id of the device's bundle.
        resend_s: first pause before a step is sent again; it doubles up to 8 times of this.
        give_up_s: how long the server may stay silent while a step waits.

    Raises:
        ConfigError: a name that no topic can carry.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        fleet: str,
        device: str,
        session: str,
        bundle: str,
        resend_s: float,
        give_up_s: float,
    ) -> None:
        self._transport = transport
        self._fleet = fleet
        self._state_topic = topics.up_state(fleet, device)
        self._up_topic = topics.up_step(fleet, device)
        self._down_topic = topics.down_step(fleet, device)
        self._model_topic = topics.down_model(fleet)
        self._session = session
        self._bundle = bundle
        self._resend_s = resend_s
        self._give_up_s = give_up_s
        self._limits = Limits()
        self._assembler = Assembler(self._limits)
        self._generation = -1
        self._refused = transport.refused_messages
        self._heard = 0.0
        self._waiting: dict[int, _Waiting] = {}
        self._arrived: deque[Reply] = deque()
        self._taken: deque[Received] = deque()
        self._status: dict[str, Any] = {"status": "online"}
        self._interrupted = threading.Event()
        self._joined = False
        self.plan: Plan | None = None
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
        self._transport.open(Will(self._state_topic, self._encode({"status": "offline"}), retain=True))
        self._transport.subscribe(self._down_topic)
        self._transport.subscribe(self._model_topic)
        deadline = time.monotonic() + wait_s
        while self.plan is None or (self.plan.status == "finished" and self.plan.run != run):
            self._greet()
            if time.monotonic() > deadline:
                raise TransportError(
                    f"no server announced a run in fleet {self._fleet!r} within {wait_s:g} s: "
                    "start psgl-server train on this broker, with the same --fleet"
                )
            self._receive(min(1.0, wait_s))
        if self.plan.bundle != self._bundle:
            raise RefusedError(
                "bundle",
                f"the server trains bundle {self.plan.bundle}, this device has {self._bundle}: "
                "copy the server's bundle here",
            )
        self._joined = True
        return self.plan

    def close(self) -> None:
        """Say goodbye and close the transport; never raises."""
        try:
            if self._status["status"] != "done":
                self.tell(status="offline")
        except (TransportError, WireError):
            pass
        finally:
            self._transport.close()

    def tell(self, **fields: Any) -> None:
        """Publish the device's state (retained).

        Raises:
            TransportError: the broker takes no more.
        """
        self._status |= fields
        self._transport.publish(self._state_topic, self._encode(self._status), retain=True)

    @property
    def waiting(self) -> frozenset[int]:
        """Numbers of the steps that were sent and have no reply."""
        return frozenset(self._waiting)

    def send(self, outbox: OutboxStep) -> None:
        """Send a step now and again until its reply comes through ``reply``.

        Raises:
            TransportError: a packet that no broker takes.
        """
        if not self._waiting:
            self._heard = time.monotonic()
        self._waiting[outbox.step] = _Waiting(outbox, self._resend_s)
        self._send_due()

    def forget(self, steps: Iterable[int]) -> None:
        """Send these steps no more: they gave way to newer ones."""
        for step in steps:
            self._waiting.pop(step, None)

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
            due = min((each.resend_at for each in self._waiting.values()), default=deadline)
            self._receive(max(min(0.25, due - now, deadline - now), 0.0))
            if now >= deadline and not self._arrived:
                return None

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
        self.send(outbox)
        meanwhile()
        others: list[Reply] = []
        try:
            while True:
                reply = self.reply(1.0)
                if reply is not None and reply.step == outbox.step:
                    return _unless_refused(reply)
                if reply is not None:
                    others.append(reply)
        finally:
            self._waiting.pop(outbox.step, None)
            self._arrived.extendleft(reversed(others))

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
        generation = self._transport.generation
        if generation != self._generation:
            self._generation = generation
            self.tell()
            self._hurry()

    def _hurry(self) -> None:
        for each in self._waiting.values():
            each.resend_at, each.pause_s = 0.0, self._resend_s

    def _send_due(self) -> None:
        self._greet()
        if self._transport.refused_messages > self._refused:
            raise TransportError(
                f"the broker refuses what this device publishes on {self._up_topic}: correct its ACL for this user"
            )
        now = time.monotonic()
        for each in tuple(self._waiting.values()):
            if each.resend_at > now:
                continue
            if each.sent and now - self._heard > self._give_up_s:
                raise TransportError(
                    f"no reply to step {each.outbox.step} for {self._give_up_s:g} s: "
                    "is the server up? look at psgl-server's output"
                )
            # Jitter keeps a fleet that lost its broker from coming back in one wave.
            each.resend_at = now + each.pause_s * random.uniform(1.0, 1.25)
            each.pause_s = min(2 * each.pause_s, _LONGEST_PAUSE * self._resend_s)
            self.traffic.resent += each.sent > 0
            each.sent += 1
            self._send(each.outbox.frames)

    def _send(self, frames: tuple[bytes, ...]) -> None:
        try:
            for frame in frames:
                self._transport.publish(self._up_topic, frame)
                self.traffic.bytes_sent += len(frame)
        except TransportError:
            # The queue is full because the broker is away: the same bytes go out after the pause.
            if max(map(len, frames)) > self._transport.max_packet_bytes:
                raise

    def _receive(self, timeout_s: float) -> None:
        """Take one message: an announcement is noted, a reply kept, anything else counted.

        It is acknowledged to the broker when the next one is asked for, so that a reply takes effect first.
        """
        if self._interrupted.is_set():
            raise KeyboardInterrupt
        while self._taken:
            self._taken.popleft().acknowledge()
        received = self._transport.receive(timeout_s)
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
                _refuse_version([foreign.version])

    def _take(self, topic: str, message: Message) -> None:
        if topic == self._model_topic:
            if message.kind == "model":
                self._heard = time.monotonic()
                self._note(message)
            return
        waiting = self._waiting.get(message.step) if message.session == self._session else None
        if waiting is None:
            return
        self._heard = time.monotonic()
        if message.kind == "missing":
            frames = waiting.outbox.frames
            self._send(tuple(frames[index] for index in message.fields["chunks"] if index < len(frames)))
        elif message.fields.get("reason") == "version":
            # The server speaks this version, so the frame was damaged on its way: it goes out again.
            self.traffic.rejected["version"] += 1
        elif message.kind in _REPLIES:
            del self._waiting[message.step]
            self._arrived.append(Reply(message, message.step, waiting.sent - 1))

    def _note(self, message: Message) -> None:
        fields = message.fields
        _refuse_version(fields.get("speaks", []))
        plan = Plan(
            run=message.run,
            bundle=str(fields["bundle"]),
            status=str(fields["status"]),
            rounds=int(fields["rounds"]),
            evaluate_every=int(fields["evaluate_every"]),
            batch=int(fields["batch"]),
            fronts=str(fields.get("fronts", "own")),
            front=int(fields.get("front", 0)),
            server=str(fields.get("server", "")),
        )
        if self._joined and self.plan is not None:
            if plan.run != self.plan.run:
                raise RefusedError(
                    "run", f"the server trains run {plan.run} now, not {self.plan.run}: start this device again"
                )
            if plan.status == "finished":
                raise RefusedError(
                    "run", f"the server ended run {self.plan.run}: start psgl-server train, then this device again"
                )
            if plan.server != self.plan.server:
                self._hurry()
        self.plan = plan


def _refuse_version(theirs: Sequence[object]) -> None:
    conflict = version_conflict(theirs, here="device", there="server")
    if conflict is not None:
        raise RefusedError("version", conflict)


def _unless_refused(reply: Reply) -> Reply:
    if reply.message.kind != "refused":
        return reply
    reason, detail = str(reply.message.fields["reason"]), str(reply.message.fields.get("detail", ""))
    raise RefusedError(reason, f"the server refused step {reply.step} ({reason}): {detail}")
