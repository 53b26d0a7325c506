"""The training service: it composes inbox, schedule, trainer and replies into one run over a broker."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_sdk import topics
from edge_sdk.bundle import Bundle
from edge_sdk.errors import TransportError, WireError
from edge_sdk.training import Evaluation
from edge_sdk.transport import Transport
from edge_sdk.version import __version__
from edge_sdk.wire import Message, encode
from server_sdk.errors import ServerError
from server_sdk.inbox import Arrival, Inbox, Refusal
from server_sdk.replies import Replies
from server_sdk.schedule import Round, Rounds
from server_sdk.streams import STREAMS
from server_sdk.trainer import Trainer

__all__ = ["TrainingPlan", "TrainingService", "summary"]

Event = dict[str, Any]


@dataclass(frozen=True)
class TrainingPlan:
    """What one run is.

    Attributes:
        devices: devices to wait for before the first round.
        rounds: optimizer steps of the back layers.
        batch: samples of each device in one round.
        evaluate_every: rounds between two evaluations, 0 for none before the end.
        deadline_s: how long a round waits for absent devices.
        idle_s: end the run when no device says anything for this long.
        codec: ``float32`` or ``float16`` gradients on the wire.
        chunk_bytes: largest payload of one MQTT message.
    """

    devices: int
    rounds: int
    batch: int = 32
    evaluate_every: int = 0
    deadline_s: float = 60.0
    idle_s: float = 600.0
    codec: str = "float16"
    chunk_bytes: int = 65536


def summary(reports: Sequence[Evaluation]) -> dict[str, Any]:
    """The counts of several devices as shares of all their samples."""
    samples = max(sum(report.samples for report in reports), 1)
    names = [name for name in STREAMS if any(name in report.streams for report in reports)]
    shares: dict[str, Any] = {
        "samples": sum(report.samples for report in reports),
        "accuracy": sum(report.fused for report in reports) / samples,
        "streams": {name: sum(r.streams.get(name, 0) for r in reports) / samples for name in names},
    }
    if reports and all(report.has_guide for report in reports):
        right = sum(report.guide_right for report in reports)
        wrong = samples - right
        shares["guide_accuracy"] = right / samples
        shares["guide_agreement"] = sum(report.guide_agreed for report in reports) / samples
        shares["follow_when_wrong"] = sum(r.guide_followed for r in reports) / wrong if wrong else 0.0
    return shares


@dataclass
class _Device:
    """What the server knows of one device."""

    bundle: str = ""
    status: str = "online"
    round: int = 0
    steps: int = 0
    bytes_per_sample: float = 0.0
    reports: dict[str, Evaluation] = field(default_factory=dict)


class TrainingService:
    """One training run of a fleet.

    Args:
        bundle: the bundle that the devices have.
        trainer: the back layers.
        transport: the service opens and closes it.
        plan: what the run is.
        fleet: name of the fleet.
        on_event: called with a plain dictionary for everything that an operator may want to see.
    """

    def __init__(
        self,
        bundle: Bundle,
        trainer: Trainer,
        transport: Transport,
        plan: TrainingPlan,
        *,
        fleet: str = "default",
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._bundle = bundle
        self._trainer = trainer
        self._transport = transport
        self._plan = plan
        self._fleet = topics.check_name(fleet)
        self._on_event = on_event
        self.run_id = secrets.token_hex(8)
        manifest = bundle.manifest
        self._inbox = Inbox(fleet, self.run_id, manifest.cut_shape, len(manifest.classes), manifest.max_batch)
        self._rounds = Rounds(plan.devices, deadline_s=plan.deadline_s)
        self._replies = Replies()
        self._devices: dict[str, _Device] = {}
        self._generation = -1
        self._announced = ""
        self._round = 0
        self._evaluated = 0
        self._bytes = Counter[str]()

    @property
    def rejected(self) -> Counter[str]:
        """Messages that were rejected, by reason."""
        return self._inbox.rejected

    def run(self) -> dict[str, Any]:
        """Train until every round is done and every device has said so.

        Returns:
            The run's figures: ``rounds``, ``steps``, ``seconds``, last ``evaluation`` and ``clean``, ``devices``.

        Raises:
            TransportError: the broker cannot be reached.
            ServerError: no device said anything for ``idle_s``, or training failed.
        """
        self._transport.open(None)
        try:
            return self._serve()
        finally:
            self._farewell()
            self._transport.close()

    def _serve(self) -> dict[str, Any]:
        self._transport.subscribe(topics.every_step(self._fleet))
        self._transport.subscribe(topics.every_state(self._fleet))
        self._on_event({"event": "waiting", "run": self.run_id, "devices": self._plan.devices})
        started = 0.0
        heard = time.monotonic()
        while not self._finished():
            self._announce("training" if self._round else "waiting")
            received = self._transport.receive(0.25)
            if received is not None:
                heard = time.monotonic()
                self._bytes["received"] += len(received.payload)
                self._take(self._inbox.take(received))
                received.acknowledge()
            elif time.monotonic() - heard > self._patience():
                if self._round >= self._plan.rounds:
                    break
                raise ServerError(
                    f"no device said anything for {self._plan.idle_s:g} s and "
                    f"{self._round} of {self._plan.rounds} rounds are done: "
                    f"start psgl-edge run on {self._plan.devices} devices in fleet {self._fleet!r}"
                )
            closed = self._rounds.close() if self._round < self._plan.rounds else None
            if closed is not None:
                started = started or time.monotonic()
                self._train(closed)
        return self._figures(time.monotonic() - started)

    def _patience(self) -> float:
        return self._plan.idle_s if self._round < self._plan.rounds else self._plan.deadline_s

    def _finished(self) -> bool:
        """Every round is done and so is every device that took part, or it has gone."""
        members = [device for device in self._devices.values() if device.steps]
        return self._round >= self._plan.rounds and all(d.status in ("done", "offline") for d in members)

    def _figures(self, seconds: float) -> dict[str, Any]:
        done = {name: device for name, device in sorted(self._devices.items()) if device.status == "done"}
        figures: dict[str, Any] = {
            "run": self.run_id,
            "rounds": self._round,
            "steps": sum(device.steps for device in self._devices.values()),
            "seconds": round(seconds, 3),
            "bytes_received": self._bytes["received"],
            "bytes_sent": self._bytes["sent"],
            "bytes_per_sample": self._bytes_per_sample(),
            "rejected": dict(self._inbox.rejected),
            "devices": sorted(name for name, device in self._devices.items() if device.steps),
        }
        for kind in ("evaluation", "clean"):
            reports = [device.reports[kind] for device in done.values() if kind in device.reports]
            if reports:
                figures[kind] = summary(reports)
        return figures

    def _bytes_per_sample(self) -> float:
        """Mean over the devices of what they say one training sample's activations cost on the wire."""
        costs = [device.bytes_per_sample for device in self._devices.values() if device.bytes_per_sample]
        return round(sum(costs) / max(len(costs), 1), 1)

    def _announce(self, status: str) -> None:
        """Publish the run (retained) when its status changes and after every new connection."""
        generation = self._transport.generation
        if (status, generation) == (self._announced, self._generation):
            return
        self._announced, self._generation = status, generation
        fields = {
            "bundle": self._bundle.id,
            "status": status,
            "rounds": self._plan.rounds,
            "evaluate_every": self._plan.evaluate_every,
            "batch": self._plan.batch,
            "versions": {"psgl": __version__},
        }
        message = Message("model", self.run_id, "", 0, fields, {})
        self._publish(topics.down_model(self._fleet), tuple(encode(message)), retain=True)

    def _farewell(self) -> None:
        with contextlib.suppress(TransportError):
            self._announce("finished")

    def _publish(self, topic: str, frames: Sequence[bytes], *, retain: bool = False) -> None:
        try:
            for frame in frames:
                self._transport.publish(topic, frame, retain=retain)
                self._bytes["sent"] += len(frame)
        except TransportError as exc:
            # The device will ask again, and the reply is kept.
            self._on_event({"event": "unsent", "topic": topic, "why": str(exc)})

    def _reply(self, to: Arrival | Refusal, kind: str, fields: dict[str, Any], tensors: Mapping[str, Any]) -> None:
        session, step = (to.session, to.step) if isinstance(to, Refusal) else (to.message.session, to.message.step)
        message = Message(kind, self.run_id, session, step, fields, tensors)
        frames = tuple(encode(message, codec=self._plan.codec, chunk_bytes=self._plan.chunk_bytes))
        if kind != "refused":
            self._replies.keep(to.device, session, step, frames)
        self._publish(topics.down_step(self._fleet, to.device), frames)

    def _take(self, arrival: Arrival | Refusal | None) -> None:
        if arrival is None:
            return
        if isinstance(arrival, Refusal):
            self._refuse(arrival)
        elif arrival.message.kind == "state":
            self._note(arrival)
        else:
            self._step(arrival)

    def _refuse(self, refusal: Refusal) -> None:
        self._on_event({"event": "refused", "device": refusal.device, "reason": refusal.reason, "why": refusal.detail})
        self._reply(refusal, "refused", {"reason": refusal.reason, "detail": refusal.detail}, {})

    def _note(self, arrival: Arrival) -> None:
        """Note what a device says of itself; a report that is no map of counts is rejected."""
        fields = arrival.message.fields
        device = self._devices.get(arrival.device) or _Device()
        if arrival.device not in self._devices and len(self._devices) >= self._inbox.max_devices:
            self._inbox.rejected["devices"] += 1
            return
        try:
            reports = {kind: Evaluation.from_fields(fields[kind]) for kind in ("evaluation", "clean") if kind in fields}
        except WireError as exc:
            self._inbox.rejected[exc.reason] += 1
            return
        self._devices[arrival.device] = device
        device.bundle = str(fields["manifest"])
        device.status = str(fields["status"])
        device.round = int(fields.get("round", 0))
        device.bytes_per_sample = float(fields.get("bytes_per_sample", 0.0))
        device.reports = reports
        self._on_event({"event": "device", "device": arrival.device, "status": device.status, "round": device.round})
        if "evaluation" in reports:
            members = [d for d in self._devices.values() if d.steps]
            everyone = all(d.round == device.round and "evaluation" in d.reports for d in members)
            if members and everyone and device.round > self._evaluated:
                self._evaluated = device.round
                shares = summary([d.reports["evaluation"] for d in members])
                self._on_event({"event": "evaluation", "round": device.round, **shares})

    def _step(self, arrival: Arrival) -> None:
        message = arrival.message
        key = (arrival.device, message.session, message.step)
        kept = self._replies.find(*key)
        if kept is not None:
            self._publish(topics.down_step(self._fleet, arrival.device), kept)
            return
        if self._replies.is_old(*key):
            return
        device = self._devices.setdefault(arrival.device, _Device())
        if device.bundle and device.bundle != self._bundle.id:
            detail = f"this server trains bundle {self._bundle.id}: copy it to the device"
            self._refuse(Refusal(*key, "bundle", detail))
        elif message.kind == "infer":
            try:
                decision = self._trainer.decide(message.tensors["activations"])
            except ServerError as exc:
                self._refuse(Refusal(*key, "decision", str(exc)))
                return
            classes = {f"class.{name}": value for name, value in decision.streams.items()}
            self._reply(arrival, "decision", {}, {"probabilities": decision.probabilities, **classes})
        elif self._round >= self._plan.rounds:
            self._reply(arrival, "refused", {"reason": "finished", "detail": "the run has all its rounds"}, {})
        else:
            self._rounds.offer(arrival)

    def _train(self, closed: Round) -> None:
        messages = [arrival.message for arrival in closed.steps]
        sizes = [len(message.tensors["labels"]) for message in messages]
        activations = np.concatenate([message.tensors["activations"] for message in messages])
        labels = np.concatenate([message.tensors["labels"] for message in messages])
        try:
            result = self._trainer.step(activations, labels)
        except ServerError as exc:
            for arrival, message in zip(closed.steps, messages, strict=True):
                self._refuse(Refusal(arrival.device, message.session, message.step, "training", str(exc)))
            return
        self._round += 1
        loss = result.losses.get("fused", sum(result.losses.values()) / len(result.losses))
        gradients = np.split(result.gradient, np.cumsum(sizes)[:-1])
        for arrival, message, gradient in zip(closed.steps, messages, gradients, strict=True):
            self._devices[arrival.device].steps += 1
            fields = {
                "front": message.fields["front"],
                "rate": result.rate,
                "loss": loss,
                "round": self._round,
            }
            self._reply(arrival, "gradient", fields, {"gradient": gradient})
        self._on_event(
            {
                "event": "round",
                "round": self._round,
                "rounds": self._plan.rounds,
                "at_s": round(time.monotonic(), 6),
                "loss": loss,
                "losses": result.losses,
                "devices": [arrival.device for arrival in closed.steps],
                "absent": list(closed.absent),
                "bytes_received": self._bytes["received"],
                "bytes_sent": self._bytes["sent"],
            }
        )
