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
from edge_sdk.errors import ConfigError, OutboxFullError, RefusedError
from edge_sdk.exchange import Exchange, Plan, Reply, Traffic
from edge_sdk.front import Forward, Front, FrontState
from edge_sdk.ledger import bits_per_sample
from edge_sdk.state import MemoryState, OutboxStep, State
from edge_sdk.transport import Transport
from edge_sdk.wire import Message, Packing, encode

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

    Whatever stops the device, the next client on the same state goes on where it was: a step that waits for its reply
    is sent again, byte for byte, before anything new.

    Args:
        bundle: what export made.
        transport: a ``PahoTransport``, or a ``MemoryTransport`` in tests; the client opens and closes it.
        device: the device's name in the fleet, ``[A-Za-z0-9_-]{1,64}``.
        fleet: the fleet's name.
        state: where front and outbox are kept; by default in memory, which no restart survives. The caller closes it.
        codec: ``float32`` or ``float16`` activations on the wire, unless the bundle packs them into few bits.
        chunk_bytes: largest payload of one MQTT message; keep it below the broker's limit.
        resend_s: first pause before a step is sent again; it doubles up to 8 times of this.
        give_up_s: how long the server may stay silent while a step waits.
        threads: threads of onnxruntime.
        train_epsilon: perturbation budget of training steps in place of the bundle's; 0 trains on unperturbed inputs
            (protocol P2), which sends unprotected activations: to measure only. Keep it over a restart.

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
        train_epsilon: float | None = None,
    ) -> None:
        self._bundle = bundle
        self._device = device
        self._state: State = MemoryState(FrontState(0, dict(bundle.initial))) if state is None else state
        self._front = Front(bundle, threads=threads, noise_key=self._state.noise_key)
        self._train_epsilon = train_epsilon
        self._codec: str | Packing = bundle.manifest.packing or codec
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

    @property
    def device(self) -> str:
        """The device's name in the fleet."""
        return self._device

    @property
    def state(self) -> State:
        """Where the front and the steps in flight are kept."""
        return self._state

    @property
    def front(self) -> FrontState:
        """The front as of the last finished step."""
        return self._state.front

    @property
    def steps(self) -> int:
        """Training steps that the server answered and the front has taken, in this run."""
        return self._count("trained")

    @property
    def round(self) -> int:
        """Rounds that the server had finished when it last answered a training step."""
        return self._count("round")

    @property
    def batches(self) -> int:
        """Batches that were drawn for training in this run, refused ones included."""
        return self._count("batches")

    @property
    def sent(self) -> int:
        """Samples that were handed to ``store`` in this run."""
        return self._count("sent")

    @property
    def unperturbed(self) -> int:
        """Training samples that passed as they are, since their perturbation was zero everywhere."""
        return self._count("unperturbed")

    @property
    def bytes_per_sample(self) -> float:
        """Bytes that one training sample's activations cost on the wire, envelope included, repeats not."""
        return self._count("sample_bytes") / max(self._count("samples"), 1)

    @property
    def samples_sent(self) -> int:
        """Samples whose activations went out in this run, for training and for decisions; repeated frames do not count.

        A sample that is sent anew counts each time. Under the same front it has the same noise and the same bytes,
        which tell nothing new; so what was told is at most this many times ``bits_per_sample``.
        """
        return self._count("samples_sent")

    @property
    def bits_sent(self) -> float | None:
        """Upper bound on what activations told about this device's samples so far, in bits, or None for no bound.

        Counted for each send, as ``samples_sent`` is; see ``ledger.bits_per_sample`` for what it rests on.
        """
        each = bits_per_sample(self._bundle.manifest)
        return None if each is None else each * self.samples_sent

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
        """Connect, announce the device, wait for the server's announcement and join its run.

        Args:
            wait_s: how long to wait for a server that trains this bundle.

        Raises:
            TransportError: no broker, or no server within ``wait_s``.
            RefusedError: the server trains another bundle, or another run than an unfinished one that the state holds.
        """
        unfinished = "" if self._count("done") else self._state.run
        plan = self._exchange.open(wait_s, unfinished)
        if self._state.run == plan.run:
            return plan
        if unfinished and (self.steps or self.sent):
            raise RefusedError(
                "run",
                f"the server trains run {plan.run}, this device's state is of run {self._state.run} after "
                f"{self.steps} steps: resume that run on the server, or start this device over (psgl-edge run --fresh)",
            )
        self._state.begin_run(plan.run, self._front.initial_state())
        if plan.fronts == "relay":
            self._state.note({"synchronise": 1})  # ask for a turn before the first step
        return plan

    def stop(self) -> None:
        """Say goodbye and close the transport; never raises."""
        self._exchange.close()

    def tell(self, **fields: Any) -> None:
        """Publish the device's state (retained): status, progress and whatever figures it has.

        Raises:
            TransportError: the broker takes no more.
        """
        self._exchange.tell(**fields)

    def listen(self, timeout_s: float) -> Plan:
        """Wait for what the server announces, at most this long; the plan as it is then.

        Raises:
            RefusedError: the server ended the run.
        """
        self._exchange.listen(timeout_s)
        return self.plan

    def interrupt(self) -> None:
        """Make whoever waits for the server raise KeyboardInterrupt soon; from any thread or a signal handler."""
        self._exchange.interrupt()

    def finish_run(self) -> None:
        """Note that this device is through with the run, so that the next run may begin on this state."""
        self._state.note({"done": 1})

    def resume(self) -> TrainStep | None:
        """Finish what a stopped device left: answer every step of the outbox.

        Returns:
            The training step that was in flight, if there was one and the server took it.

        Raises:
            RefusedError, TransportError: as in ``train_step``.
        """
        done = None
        for outbox in self._state.outbox:
            if outbox.kind == "train":
                done = self._finish_training(outbox, None)
            elif outbox.kind == "front":
                self._finish_synchronising(outbox)
        self.flush()
        return done

    def train_step(self, x: npt.ArrayLike, y: npt.ArrayLike, *, samples: int | None = None) -> TrainStep | None:
        """Send one batch's activations, wait for the gradient, update the front.

        Args:
            x: (N, *input_shape) in [0, 1].
            y: integer labels (N).
            samples: how many training samples the device has, by which the server may weigh it.

        Returns:
            The answered step, or None when the run has all its rounds and wants no more.

        Raises:
            BatchError: the batch does not fit the bundle.
            ConfigError: the bundle's front is frozen: use ``store``.
            RefusedError: the server refused the step.
            StateError: the disk refuses.
            TransportError: the server was silent for ``give_up_s``.
        """
        if self._bundle.manifest.frozen:
            raise ConfigError(
                "the bundle's front is frozen: start the server with --fronts frozen and hand samples over with store()"
            )
        batch, labels = self._check(x, y)
        if self._state.outbox:
            self.resume()
        if self._count("synchronise"):
            self.synchronise(samples=samples)
        elif self.plan.fronts == "shared" and self.plan.front > self._count("front"):
            self.synchronise(give=False)  # a mean was made while this device was away
        before = self._state.front
        attacked = labels if self._bundle.manifest.perturb_towards == "label" else None
        forward = self._front.forward(before, batch, attacked, training=True, epsilon=self._train_epsilon)
        weight = {} if samples is None else {"samples": samples}
        tensors: dict[str, npt.NDArray[Any]] = {"activations": forward.activations, "labels": labels}
        message = self._message("train", {"front": before.version, **weight}, tensors)
        outbox = OutboxStep(message.step, "train", self._frames(message), batch, attacked)
        self._state.begin(outbox, {"batches": self._count("batches") + 1, **self._told(batch)})
        return self._finish_training(outbox, forward)

    def synchronise(self, *, give: bool = True, samples: int | None = None) -> None:
        """Give the front away and take what the server makes of all fronts: their mean, or a predecessor's front.

        Args:
            give: False only asks for the current one.
            samples: the front's weight in the mean.

        Raises:
            RefusedError, StateError, TransportError: as in ``train_step``.
        """
        front = self._state.front
        weight = {} if samples is None else {"samples": samples}
        tensors: Mapping[str, npt.NDArray[Any]] = front.tensors if give else {}
        message = self._message("front", {"front": front.version, **weight}, tensors)
        outbox = OutboxStep(message.step, "front", tuple(encode(message, chunk_bytes=self._chunk_bytes)))
        self._state.begin(outbox, {"synchronise": 0})
        self._finish_synchronising(outbox)

    def store(self, x: npt.ArrayLike, y: npt.ArrayLike, *, first: int, total: int) -> None:
        """Hand samples to the server, once: of a frozen front, which needs no gradient. Does not wait for the reply.

        Args:
            x: (N, *input_shape) in [0, 1].
            y: integer labels (N).
            first: number of the first of them among the device's ``total`` samples, from 0.

        Raises:
            BatchError: the batch does not fit the bundle.
            OutboxFullError: too many wait for the server and the state's policy is ``refuse``.
            RefusedError, StateError, TransportError: as in ``train_step``.
        """
        batch, labels = self._check(x, y)
        front = self._state.front
        forward = self._front.forward(front, batch, None, training=False, epsilon=self._train_epsilon)
        fields = {"front": front.version, "first": first, "total": total}
        message = self._message("store", fields, {"activations": forward.activations, "labels": labels})
        outbox = OutboxStep(message.step, "store", self._frames(message))
        counters = {
            "sent": first + len(batch),
            **self._told(batch),
            "samples": self._count("samples") + len(batch),
            "sample_bytes": self._count("sample_bytes") + sum(map(len, outbox.frames)),
            "unperturbed": self._count("unperturbed") + forward.unperturbed,
        }
        while True:
            try:
                self._exchange.forget(self._state.begin(outbox, counters))
                break
            except OutboxFullError:
                if self._state.limits.when_full != "block" or not self._state.outbox:
                    raise
                self._send_left()
                self._collect(1.0)
        self._exchange.send(outbox)
        self._collect(0.0)

    def flush(self) -> None:
        """Wait until everything that was stored has its reply.

        Raises:
            RefusedError, StateError, TransportError: as in ``train_step``.
        """
        self._send_left()
        while self._state.outbox:
            self._collect(1.0)

    def infer(self, x: npt.ArrayLike, *, epsilon: float | None = None) -> Decision:
        """Ask the server to decide on a batch; the guide's decision takes the place of a label.

        A question is not kept: who asked is gone after a restart.

        Args:
            x: (N, *input_shape) in [0, 1].
            epsilon: perturbation budget in place of the bundle's. 0 sends unprotected activations: to measure only.

        Raises:
            BatchError, RefusedError, StateError, TransportError: as in ``train_step``.
        """
        manifest = self._bundle.manifest
        batch = as_batch(x, manifest.input_shape, max_batch=manifest.max_batch, input_range=manifest.input_range)
        front = self._state.front
        forward = self._front.forward(front, batch, None, training=False, epsilon=epsilon)
        message = self._message("infer", {"front": front.version}, {"activations": forward.activations})
        question = OutboxStep(message.step, "infer", self._frames(message))
        self._state.note(self._told(batch))
        reply = self._exchange.ask(question).message
        probabilities = reply.tensors.get("probabilities")
        if probabilities is None or probabilities.shape != (len(batch), len(manifest.classes)):
            raise RefusedError("shape", "the server's decision does not fit the batch: compare the versions of psgl")
        streams = {
            name.removeprefix("class."): value for name, value in reply.tensors.items() if name.startswith("class.")
        }
        guide = None if forward.guide is None else forward.guide.argmax(axis=1)
        return Decision(probabilities, streams, guide)

    def _finish_training(self, outbox: OutboxStep, forward: Forward | None) -> TrainStep | None:
        """Wait for a step's gradient and take it; ``forward`` is None after a restart and is computed again."""
        before = self._state.front
        if outbox.x is None:
            raise ConfigError(f"step {outbox.step} of the outbox has no batch: start this device over")
        x, label = outbox.x, outbox.label
        prepared: Forward | None = None

        def prepare() -> None:
            nonlocal forward, prepared
            if forward is None:
                forward = self._front.forward(before, x, label, training=True, epsilon=self._train_epsilon)
            prepared = self._front.prepare(before, forward)

        try:
            reply = self._exchange.ask(outbox, prepare)
        except RefusedError as exc:
            # Of a turn that went to another device: a new one is asked for before the next step.
            self._state.finish(outbox.step, None, {"synchronise": int(exc.reason == "turn")})
            if exc.reason == "finished":
                return None
            raise
        fields = reply.message.fields
        gradient = reply.message.tensors.get("gradient")
        if prepared is None or gradient is None or gradient.shape != prepared.activations.shape:
            raise RefusedError("shape", "the server's gradient does not fit the step: compare the versions of psgl")
        if not 0 <= fields["rate"] <= 1:
            raise RefusedError("shape", "the server's rate is not in [0, 1]: compare the versions of psgl")
        rate = self._bundle.manifest.learning_rate * float(fields["rate"])
        after = self._front.backward(before, prepared, gradient, rate=rate)
        counters = {
            "trained": self._count("trained") + 1,
            "round": int(fields["round"]),
            "synchronise": int(bool(fields.get("synchronise"))),
            "samples": self._count("samples") + len(x),
            "sample_bytes": self._count("sample_bytes") + sum(map(len, outbox.frames)),
            "unperturbed": self._count("unperturbed") + prepared.unperturbed,
        }
        self._state.finish(outbox.step, after, counters)
        return TrainStep(outbox.step, int(fields["round"]), float(fields["loss"]), reply.resent)

    def _finish_synchronising(self, outbox: OutboxStep) -> None:
        try:
            reply = self._exchange.ask(outbox).message
        except RefusedError:
            self._state.finish(outbox.step)
            raise
        before = self._state.front
        given = reply.tensors
        if given and (
            given.keys() != before.tensors.keys()
            or any(given[name].shape != value.shape for name, value in before.tensors.items())
        ):
            self._state.finish(outbox.step)
            raise RefusedError("shape", "the server's front is not of this bundle: compare the versions of psgl")
        after = FrontState(before.version, dict(given)) if given else before
        self._state.finish(outbox.step, after, {"front": int(reply.fields["front"])})

    def _send_left(self) -> None:
        """Send what an earlier life of this device left in the outbox."""
        for outbox in self._state.outbox:
            if outbox.step not in self._exchange.waiting:
                self._exchange.send(outbox)

    def _collect(self, timeout_s: float) -> None:
        """Take the replies that have come; waits for one at most this long."""
        reply = self._exchange.reply(timeout_s)
        while reply is not None:
            self._stored(reply)
            reply = self._exchange.reply(0.0)

    def _stored(self, reply: Reply) -> None:
        if all(each.step != reply.step for each in self._state.outbox):
            return  # it gave way to newer ones while it was under way
        self._state.finish(reply.step)
        if reply.message.kind == "refused":
            fields = reply.message.fields
            raise RefusedError(
                str(fields["reason"]), f"the server refused samples ({fields['reason']}): {fields.get('detail', '')}"
            )

    def _check(self, x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        manifest = self._bundle.manifest
        batch = as_batch(x, manifest.input_shape, max_batch=manifest.max_batch, input_range=manifest.input_range)
        return batch, as_labels(y, len(batch), len(manifest.classes))

    def _told(self, batch: npt.NDArray[np.float32]) -> dict[str, int]:
        """The counter after one more send; committed before anything leaves."""
        return {"samples_sent": self._count("samples_sent") + len(batch)}

    def _count(self, name: str) -> int:
        return self._state.counters.get(name, 0)

    def _message(self, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any]]) -> Message:
        return Message(kind, self.plan.run, self._state.session, self._state.next_step(), fields, tensors)

    def _frames(self, message: Message) -> tuple[bytes, ...]:
        return tuple(encode(message, codec=self._codec, chunk_bytes=self._chunk_bytes))
