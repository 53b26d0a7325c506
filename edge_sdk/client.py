"""EdgeClient, the device's public face: it composes the stations between a sensor batch and the front's update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.batch import as_batch, as_labels
from edge_sdk.bundle import Bundle
from edge_sdk.errors import ConfigError, RefusedError
from edge_sdk.exchange import Exchange, Plan, Traffic
from edge_sdk.front import Front, FrontState
from edge_sdk.state import MemoryState, OutboxStep, State
from edge_sdk.transport import Transport
from edge_sdk.wire import Message, encode

__all__ = ["Decision", "EdgeClient", "TrainStep"]


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
        classes: npt.NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return classes


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
        self._device = device
        self._front = Front(bundle, threads=threads)
        self._state: State = MemoryState(self._front.initial_state()) if state is None else state
        self._codec = codec
        self._chunk_bytes = chunk_bytes
        self._exchange = Exchange(
            transport,
            fleet=fleet,
            device=device,
            session=self._state.session,
            bundle=bundle.id,
            resend_s=resend_s,
            give_up_s=give_up_s,
        )
        self.steps = 0
        self.unperturbed = 0
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
        if self._exchange.plan is None:
            raise ConfigError("the client has no plan yet: call start() first")
        return self._exchange.plan

    @property
    def traffic(self) -> Traffic:
        """What this client has sent, received and rejected so far."""
        return self._exchange.traffic

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
        return self._exchange.open(wait_s)

    def stop(self) -> None:
        """Say goodbye and close the transport; never raises."""
        self._exchange.close()

    def tell(self, **fields: Any) -> None:
        """Publish the device's state (retained): status, progress and whatever figures it has.

        Raises:
            TransportError: the broker takes no more.
        """
        self._exchange.tell(**fields)

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
        message = self._message("train", before, {"activations": forward.activations, "labels": labels})
        outbox = OutboxStep(message.step, self._frames(message), batch, attacked)
        self._state.begin(outbox)

        def prepare() -> None:
            nonlocal forward
            forward = self._front.prepare(before, forward)

        try:
            reply, resent = self._exchange.ask(outbox, prepare)
        except RefusedError as exc:
            self._state.finish(outbox.step)
            if exc.reason == "finished":
                return None
            raise
        gradient = reply.tensors.get("gradient")
        if gradient is None or gradient.shape != forward.activations.shape or not 0 <= reply.fields["rate"] <= 1:
            raise RefusedError("shape", "the server's gradient does not fit the step: compare the versions of psgl")
        rate = self._bundle.manifest.learning_rate * float(reply.fields["rate"])
        after = self._front.backward(before, forward, gradient, rate=rate)
        self._state.finish(outbox.step, after)
        self.steps += 1
        self._trained_samples += len(batch)
        self.unperturbed += forward.unperturbed
        self._trained_bytes += sum(map(len, outbox.frames))
        return TrainStep(outbox.step, int(reply.fields["round"]), float(reply.fields["loss"]), resent)

    def infer(self, x: npt.ArrayLike, *, epsilon: float | None = None) -> Decision:
        """Ask the server to decide on a batch; the guide's decision takes the place of a label.

        Args:
            x: (N, *input_shape) in [0, 1].
            epsilon: perturbation budget in place of the bundle's. 0 sends unprotected activations: to measure only.

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
            reply, _ = self._exchange.ask(outbox)
        finally:
            self._state.finish(outbox.step)
        probabilities = reply.tensors.get("probabilities")
        if probabilities is None or probabilities.shape != (len(batch), len(self._bundle.manifest.classes)):
            raise RefusedError("shape", "the server's decision does not fit the batch: compare the versions of psgl")
        streams = {
            name.removeprefix("class."): value for name, value in reply.tensors.items() if name.startswith("class.")
        }
        guide = None if forward.guide is None else forward.guide.argmax(axis=1)
        return Decision(probabilities, streams, guide)

    def _message(self, kind: str, front: FrontState, tensors: Mapping[str, npt.NDArray[Any]]) -> Message:
        return Message(
            kind,
            self.plan.run,
            self._state.session,
            self._state.next_step(),
            {"front": front.version},
            tensors,
        )

    def _frames(self, message: Message) -> tuple[bytes, ...]:
        return tuple(encode(message, codec=self._codec, chunk_bytes=self._chunk_bytes))
