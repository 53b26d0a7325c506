"""A step goes out and its reply comes back: the device's end of the conversation with its server.

A step is done when its reply has come: until then the same bytes are sent again, after a pause that doubles, and at
once when the connection was lost and is back. A PUBACK of the broker is no reply.
"""

from __future__ import annotations

import platform
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edge_sdk import topics
from edge_sdk.errors import RefusedError, TransportError, WireError
from edge_sdk.state import OutboxStep
from edge_sdk.transport import Transport, Will
from edge_sdk.version import __version__
from edge_sdk.wire import Assembler, Limits, Message, decode_frame, encode

__all__ = ["Exchange", "Plan", "Traffic"]

_NO_RUN = ""
_REPLIES = ("gradient", "decision", "refused")


@dataclass(frozen=True)
class Plan:
    """What the server announced (retained, so that a device that joins late has it too).

    Attributes:
        run: id of the training run; a message of another run is refused.
        bundle: id of the bundle that the server trains.
        status: ``waiting`` for devices, ``training`` or ``finished``.
        rounds: rounds of the whole run.
        evaluate_every: rounds between two evaluations, 0 for none before the end.
        batch: samples of each device in one step.
    """

    run: str
    bundle: str
    status: str
    rounds: int
    evaluate_every: int
    batch: int


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


class Exchange:
    """Send steps and wait for their replies.

    Args:
        transport: opened and closed here.
        fleet, device: names, checked.
        session: of the device's state.
        bundle: id of the device's bundle.
        resend_s: first pause before a step is sent again; it doubles up to 8 times of this.
        give_up_s: how long one step may stay without a reply.

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
        self._status: dict[str, Any] = {"status": "online"}
        self._joined = False
        self.plan: Plan | None = None
        self.traffic = Traffic()

    def open(self, wait_s: float) -> Plan:
        """Connect, announce the device and wait for a server that trains this bundle.

        Raises:
            TransportError: no broker, or no server within ``wait_s``.
            RefusedError: the server trains another bundle.
        """
        self._transport.open(Will(self._state_topic, self._encode({"status": "offline"}), retain=True))
        self._transport.subscribe(self._down_topic)
        self._transport.subscribe(self._model_topic)
        deadline = time.monotonic() + wait_s
        while self.plan is None or self.plan.status == "finished":
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

    def ask(self, outbox: OutboxStep, meanwhile: Callable[[], None] = lambda: None) -> tuple[Message, int]:
        """Send a step until its reply comes.

        Args:
            outbox: the step.
            meanwhile: called once, after the step was sent for the first time.

        Returns:
            The reply, and how often the step was sent again.

        Raises:
            RefusedError: the server refused the step, or ended the run.
            TransportError: no reply within ``give_up_s``, or a packet that no broker takes.
        """
        start = time.monotonic()
        pause = self._resend_s
        resent = -1
        while True:
            resent += 1
            generation = self._transport.generation
            self._greet()
            self._send(outbox)
            if not resent:
                meanwhile()
            # Jitter keeps a fleet that lost its broker from coming back in one wave.
            resend_at = time.monotonic() + pause * random.uniform(1.0, 1.25)
            pause = min(2 * pause, 8 * self._resend_s)
            while self._transport.generation == generation and (now := time.monotonic()) < resend_at:
                reply = self._receive(min(0.25, resend_at - now))
                if reply is None or (reply.session, reply.step) != (self._session, outbox.step):
                    continue
                self.traffic.resent += resent
                if reply.kind == "refused":
                    reason, detail = str(reply.fields["reason"]), str(reply.fields.get("detail", ""))
                    raise RefusedError(reason, f"the server refused step {outbox.step} ({reason}): {detail}")
                return reply, resent
            if time.monotonic() - start > self._give_up_s:
                raise TransportError(
                    f"no reply to step {outbox.step} for {self._give_up_s:g} s: "
                    "is the server up? look at psgl-server's output"
                )

    def _encode(self, fields: dict[str, Any]) -> bytes:
        versions = {"psgl": __version__, "python": platform.python_version()}
        body = {"manifest": self._bundle, "versions": versions, **fields}
        (frame,) = encode(Message("state", _NO_RUN, self._session, 0, body, {}), chunk_bytes=1 << 20)
        return frame

    def _greet(self) -> None:
        """Tell the state anew after every new connection."""
        generation = self._transport.generation
        if generation != self._generation:
            self._generation = generation
            self.tell()

    def _send(self, outbox: OutboxStep) -> None:
        try:
            for frame in outbox.frames:
                self._transport.publish(self._up_topic, frame)
                self.traffic.bytes_sent += len(frame)
        except TransportError:
            # The queue is full because the broker is away: the same bytes go out after the pause.
            if max(map(len, outbox.frames)) > self._transport.max_packet_bytes:
                raise

    def _receive(self, timeout_s: float) -> Message | None:
        """Take one message: an announcement is noted, a reply is returned, anything else is counted."""
        received = self._transport.receive(timeout_s)
        if received is None:
            return None
        self.traffic.bytes_received += len(received.payload)
        try:
            message = self._assembler.add(decode_frame(received.payload, self._limits))
            if message is not None and received.topic == self._model_topic:
                self._note(message)
                return None
            return message if message is not None and message.kind in _REPLIES else None
        except WireError as exc:
            self.traffic.rejected[exc.reason] += 1
            return None
        finally:
            received.acknowledge()

    def _note(self, message: Message) -> None:
        if message.kind != "model":
            return
        fields = message.fields
        plan = Plan(
            run=message.run,
            bundle=str(fields["bundle"]),
            status=str(fields["status"]),
            rounds=int(fields["rounds"]),
            evaluate_every=int(fields["evaluate_every"]),
            batch=int(fields["batch"]),
        )
        if self._joined and self.plan is not None and (plan.run != self.plan.run or plan.status == "finished"):
            raise RefusedError(
                "run", f"the server ended run {self.plan.run}: start psgl-server train, then this device again"
            )
        self.plan = plan
