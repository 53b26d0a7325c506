"""EdgeClient, the device's public face: it composes the stations between a sensor batch and the front's update.

A step is done when its reply has come: until then the same bytes are sent again, after a pause that doubles, and at
once when the connection was lost and is back. A PUBACK of the broker is no reply.
"""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk import topics
from edge_sdk.batch import as_batch, as_labels
from edge_sdk.bundle import Bundle
from edge_sdk.errors import BatchError, ConfigError, RefusedError, TransportError, WireError
from edge_sdk.front import Front, FrontState
from edge_sdk.state import MemoryState, OutboxStep, State
from edge_sdk.transport import Received, Transport, Will
from edge_sdk.wire import Assembler, Limits, Message, decode_frame, encode
from edge_sdk.version import __version__

__all__ = ["Decision", "EdgeClient", "Plan", "TrainStep"]

NO_RUN = ""


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


@dataclass(frozen=True)
class TrainStep:
    """A training step that the server answered and the front has taken.

    Attributes:
        step: its number in the session.
        round: rounds that the server has finished, this one included.
        loss: the fused stream's cross-entropy over the whole round.
        resent: how often its bytes were sent again.
    """

    step: int
    round: int
    loss: float
    resent: int


@dataclass(frozen=True)
class Decision:
    """The server's decision on one batch.

    Attributes:
        probabilities: float32 (N, K), fused over the streams.
        streams: class of each stream by name, int64 (N).
        guide: class of the device's guide, int64 (N), or None where the profile has no guide.
    """

    probabilities: npt.NDArray[np.float32] = field(repr=False)
    streams: Mapping[str, npt.NDArray[np.int64]] = field(repr=False)
    guide: npt.NDArray[np.int64] | None = field(repr=False)

    @property
    def classes(self) -> npt.NDArray[np.int64]:
        """int64 (N): the most probable class of each sample."""
        return self.probabilities.argmax(axis=1)


class EdgeClient:
    """A device in a fleet: trains its front layers and asks for decisions over a transport.

    Args:
        bundle: what export made.
        transport: a ``PahoTransport``, or a ``MemoryTransport`` in tests; the client opens and closes it.
        device: the device's name in the fleet, ``[A-Za-z0-9_-]{1,64}``.
        fleet: the fleet's name.
        state: where front and outbox are kept; by default in memory.
        codec: ``float32`` or ``float16`` activations on the wire.
        chunk_bytes: largest payload of one MQTT message; keep it below the broker's limit.
        resend_s: first pause before a step is sent again; it doubles up to 8 times of this.
        give_up_s: how long one step may stay without a reply.
        threads: threads of onnxruntime.

    Raises:
        ConfigError: a name that no topic can carry.
        BundleError: this onnxruntime cannot run the bundle.
    """

    def __init__(
        self,
        bundle: Bundle,
        transport: Transport,
        *,
        device: str,
        fleet: str = "default",
        state: State | None = None,
        codec: str = "float32",
        chunk_bytes: int = 65536,
        resend_s: float = 5.0,
        give_up_s: float = 300.0,
        threads: int = 1,
    ) -> None:
        self._bundle = bundle
        self._transport = transport
        self._device = topics.check_name(device)
        self._fleet = topics.check_name(fleet)
        self._front = Front(bundle, threads=threads)
        self._state: State = MemoryState(self._front.initial_state()) if state is None else state
        self._codec = codec
        self._chunk_bytes = chunk_bytes
        self._resend_s = resend_s
        self._give_up_s = give_up_s
        self._limits = Limits()
        self._assembler = Assembler(self._limits)
        self._model_topic = topics.down_model(self._fleet)
        self._generation = -1
        self._status: dict[str, Any] = {"status": "online"}
        self._plan: Plan | None = None
        self._joined = False
        self.bytes_sent = 0
        self.bytes_received = 0
        self.steps = 0
        self.resent = 0
        self.rejected: dict[str, int] = {}
        self._trained_samples = 0
        self._trained_bytes = 0

    @property
    def device(self) -> str:
        """The device's name in the fleet."""
        return self._device

    @property
    def state(self) -> State:
        """Where the front and the step in flight are kept."""
        return self._state

    @property
    def front(self) -> FrontState:
        """The front as of the last finished step."""
        return self._state.front

    @property
    def bytes_per_sample(self) -> float:
        """Bytes that one training sample's activations cost on the wire, envelope included, repeats not."""
        return self._trained_bytes / max(self._trained_samples, 1)

    @property
    def plan(self) -> Plan:
        """The latest announcement of the server.

        Raises:
            ConfigError: the client was not started.
        """
        if self._plan is None:
            raise ConfigError("the client has no plan yet: call start() first")
        return self._plan

    def __enter__(self) -> EdgeClient:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *, wait_s: float = 60.0) -> Plan:
        """Connect, announce the device and wait for the server's announcement.

        Args:
            wait_s: how long to wait for a server that trains this bundle.

        Raises:
            TransportError: no broker, or no server within ``wait_s``.
            RefusedError: the server trains another bundle.
        """
        will = self._encode_state({"status": "offline"})
        self._transport.open(Will(topics.up_state(self._fleet, self._device), will, retain=True))
        self._transport.subscribe(topics.down_step(self._fleet, self._device))
        self._transport.subscribe(self._model_topic)
        deadline = time.monotonic() + wait_s
        while self._plan is None or self._plan.status == "finished":
            self._greet()
            if time.monotonic() > deadline:
                raise TransportError(
                    f"no server announced a run in fleet {self._fleet!r} within {wait_s:g} s: "
                    "start psgl-server train on this broker, with the same --fleet"
                )
            self._receive(min(1.0, wait_s))
        if self._plan.bundle != self._bundle.id:
            raise RefusedError(
                "bundle",
                f"the server trains bundle {self._plan.bundle}, this device has {self._bundle.id}: copy the server's bundle here",
            )
        self._joined = True
        return self._plan

    def stop(self) -> None:
        """Say goodbye and close the transport; never raises."""
        try:
            if self._status.get("status") != "done":
                self.tell(status="offline")
        except (TransportError, WireError):
            pass
        finally:
            self._transport.close()

    def tell(self, **fields: Any) -> None:
        """Publish the device's state (retained): status, progress and whatever figures it has.

        Raises:
            TransportError: the broker takes no more.
        """
        self._status = {**self._status, **fields}
        self._transport.publish(
            topics.up_state(self._fleet, self._device), self._encode_state(self._status), retain=True
        )

    def train_step(self, x: npt.ArrayLike, y: npt.ArrayLike) -> TrainStep | None:
        """Send one batch's activations, wait for the gradient, update the front.

        Args:
            x: (N, *input_shape) in [0, 1].
            y: integer labels (N).

        Returns:
            The answered step, or None when the run has all its rounds and wants no more.

        Raises:
            BatchError: the batch does not fit the bundle.
            RefusedError: the server refused the step.
            TransportError: no reply within ``give_up_s``.
        """
        batch = as_batch(x, self._bundle.manifest.input_shape, max_batch=self._bundle.manifest.max_batch)
        labels = as_labels(y, len(batch), len(self._bundle.manifest.classes))
        before = self._state.front
        attacked = labels if self._bundle.manifest.perturb_towards == "label" else None
        forward = self._front.forward(before, batch, attacked, training=True)
        message = self._message(
            "train", before, {"activations": forward.activations, "labels": labels}
        )
        outbox = OutboxStep(message.step, self._frames(message), forward.perturbed, forward.map)
        self._state.begin(outbox)
        try:
            reply, resent = self._exchange(outbox)
        except RefusedError as exc:
            self._state.finish(outbox.step)
            if exc.reason == "finished":
                return None
            raise
        gradient = reply.tensors["gradient"]
        if reply.kind != "gradient" or gradient.shape != forward.activations.shape:
            raise RefusedError("shape", "the server's gradient does not fit the activations: compare the versions of psgl")
        rate = self._bundle.manifest.learning_rate * float(reply.fields["rate"])
        after = self._front.backward(before, forward.perturbed, forward.map, gradient, rate=rate)
        self._state.finish(outbox.step, after)
        self.steps += 1
        self._trained_samples += len(batch)
        self._trained_bytes += sum(map(len, outbox.frames))
        return TrainStep(outbox.step, int(reply.fields["round"]), float(reply.fields["loss"]), resent)

    def infer(self, x: npt.ArrayLike, *, epsilon: float | None = None) -> Decision:
        """Ask the server to decide on a batch; the guide's decision takes the place of a label.

        Args:
            x: (N, *input_shape) in [0, 1].
            epsilon: perturbation budget in place of the bundle's. 0 sends unprotected activations: for measurements only.

        Raises:
            BatchError, RefusedError, TransportError: as in ``train_step``.
        """
        batch = as_batch(x, self._bundle.manifest.input_shape, max_batch=self._bundle.manifest.max_batch)
        front = self._state.front
        forward = self._front.forward(front, batch, None, training=False, epsilon=epsilon)
        message = self._message("infer", front, {"activations": forward.activations})
        outbox = OutboxStep(message.step, self._frames(message))
        self._state.begin(outbox)
        try:
            reply, _ = self._exchange(outbox)
        finally:
            self._state.finish(outbox.step)
        probabilities = reply.tensors["probabilities"]
        if reply.kind != "decision" or probabilities.shape != (len(batch), len(self._bundle.manifest.classes)):
            raise RefusedError("shape", "the server's decision does not fit the batch: compare the versions of psgl")
        streams = {
            name.removeprefix("class."): value for name, value in reply.tensors.items() if name.startswith("class.")
        }
        guide = None if forward.guide is None else forward.guide.argmax(axis=1)
        return Decision(probabilities, streams, guide)

    def _message(self, kind: str, front: FrontState, tensors: Mapping[str, npt.NDArray[Any]]) -> Message:
        return Message(
            kind, self.plan.run, self._state.session, self._state.next_step(), {"front": front.version}, tensors
        )

    def _frames(self, message: Message) -> tuple[bytes, ...]:
        return tuple(encode(message, codec=self._codec, chunk_bytes=self._chunk_bytes))

    def _encode_state(self, fields: Mapping[str, Any]) -> bytes:
        versions = {"psgl": __version__, "python": platform.python_version()}
        body = {"manifest": self._bundle.id, "versions": versions, **fields}
        (frame,) = encode(Message("state", NO_RUN, self._state.session, 0, body, {}), chunk_bytes=1 << 20)
        return frame

    def _greet(self) -> None:
        """Tell the state anew after every new connection."""
        generation = self._transport.generation
        if generation != self._generation:
            self._generation = generation
            self.tell()

    def _exchange(self, outbox: OutboxStep) -> tuple[Message, int]:
        """Send until the reply comes; returns it and the number of repeats."""
        start = time.monotonic()
        pause = self._resend_s
        resent = -1
        while True:
            resent += 1
            generation = self._transport.generation
            self._greet()
            self._send(outbox)
            # Jitter keeps a fleet that lost its broker from coming back in one wave.
            resend_at = time.monotonic() + pause * random.uniform(1.0, 1.25)
            pause = min(2 * pause, 8 * self._resend_s)
            while self._transport.generation == generation and (now := time.monotonic()) < resend_at:
                reply = self._receive(min(0.25, resend_at - now))
                if reply is None or (reply.session, reply.step) != (self._state.session, outbox.step):
                    continue
                self.resent += resent
                if reply.kind == "refused":
                    reason, detail = str(reply.fields["reason"]), str(reply.fields["detail"])
                    raise RefusedError(reason, f"the server refused step {outbox.step} ({reason}): {detail}")
                return reply, resent
            if time.monotonic() - start > self._give_up_s:
                raise TransportError(
                    f"no reply to step {outbox.step} for {self._give_up_s:g} s: is the server up? look at psgl-server's output"
                )

    def _send(self, outbox: OutboxStep) -> None:
        topic = topics.up_step(self._fleet, self._device)
        try:
            for frame in outbox.frames:
                self._transport.publish(topic, frame)
                self.bytes_sent += len(frame)
        except TransportError:
            # The queue is full because the broker is away: the same bytes go out after the pause.
            if max(map(len, outbox.frames)) > self._transport.max_packet_bytes:
                raise

    def _receive(self, timeout_s: float) -> Message | None:
        """Take one message from the broker: an announcement is noted, a reply is returned, anything else is counted."""
        received = self._transport.receive(timeout_s)
        if received is None:
            return None
        self.bytes_received += len(received.payload)
        try:
            message = self._assembler.add(decode_frame(received.payload, self._limits))
            if message is None:
                return None
            if received.topic == self._model_topic:
                self._note(message)
                return None
            return message if message.kind in ("gradient", "decision", "refused") else None
        except WireError as exc:
            self.rejected[exc.reason] = self.rejected.get(exc.reason, 0) + 1
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
        joined = self._plan if self._joined else None
        if joined is not None and (plan.run != joined.run or plan.status == "finished"):
            raise RefusedError(
                "run", f"the server ended run {joined.run}: start psgl-server train, then this device again"
            )
        self._plan = plan
