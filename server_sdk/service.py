"""The training service: it composes inbox, journal, run, schedule and replies into one run over a broker."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_sdk import topics
from edge_sdk.bundle import Bundle
from edge_sdk.errors import TransportError, WireError
from edge_sdk.transport import Received, Transport
from edge_sdk.version import __version__
from edge_sdk.wire import VERSION, Message, encode
from server_sdk.errors import CheckpointError, LogError, ServerError
from server_sdk.inbox import Arrival, Flood, Gap, Inbox, Refusal
from server_sdk.journal import Durability, Journal
from server_sdk.parts import BundleParts, Unavailable
from server_sdk.plan import TrainingPlan, fronts_for
from server_sdk.quarantine import Quarantine
from server_sdk.rates import RateLimits, Rates
from server_sdk.roster import Roster
from server_sdk.schedule import Schedule
from server_sdk.screening import Screen
from server_sdk.trainer import Trainer
from server_sdk.training_run import Outgoing, Trained, TrainingRun

__all__ = ["TrainingService"]

Event = dict[str, Any]
_CHUNK = 1 << 20  # of what must be one packet


class TrainingService:
    """One training run of a fleet.

    Args:
        bundle: the bundle that the devices have.
        trainer: the back layers as exported; a resumed run brings its own weights.
        transport: the service opens and closes it.
        plan: what the run is.
        journal: where the run is kept; None keeps it in memory. The caller closes it.
        resume: id of the run that the journal holds and that goes on; None begins a new one.
        fleet: name of the fleet.
        deadline_s: how long a round waits for absent devices.
        idle_s: give up when no device says anything for this long.
        screen: which activations are too large, and what becomes of them.
        rates: how much a device may send.
        bundle_file: the bytes of the bundle's file, for devices that follow announced bundles; None: they get nothing.
        on_event: called with a plain dictionary for everything that an operator may want to see; ``at_s`` is when, on
            the machine's monotonic clock.

    Raises:
        ConfigError: a frozen front is to be trained.
    """

    def __init__(
        self,
        bundle: Bundle,
        trainer: Trainer,
        transport: Transport,
        plan: TrainingPlan,
        *,
        journal: Journal | None = None,
        resume: str | None = None,
        fleet: str = "default",
        deadline_s: float = 60.0,
        idle_s: float = 600.0,
        screen: Screen | None = None,
        rates: RateLimits | None = None,
        bundle_file: bytes | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        fronts_for(bundle.manifest, plan.fronts)
        self._bundle = bundle
        self._trainer = trainer
        self._transport = transport
        self._plan = plan
        self._journal = journal or Journal(Path(), Durability("off"))
        self._resume = resume
        self._fleet = topics.check_name(fleet)
        self._deadline_s = deadline_s
        self._idle_s = idle_s
        self._report = on_event
        self._life = secrets.token_hex(4)
        screen = screen or Screen()
        self._run = TrainingRun(resume or secrets.token_hex(8), bundle.id, trainer, plan, screen)
        manifest = bundle.manifest
        self._inbox = Inbox(
            fleet,
            self._run.run,
            manifest.cut_shape,
            len(manifest.classes),
            manifest.max_batch,
            front={name: tensor.shape for name, tensor in bundle.initial.items()},
            screen=screen,
            rates=Rates(rates or RateLimits()),
        )
        self._parts = BundleParts(bundle.id, bundle_file)
        self._schedule = Schedule(deadline_s)
        self._roster = Roster(self._inbox.max_devices)
        self._quarantine = Quarantine(
            transport, self._fleet, max_devices=self._inbox.max_devices, on_event=self._on_event
        )
        self._stop = threading.Event()
        self._announced: tuple[Any, ...] = ()
        self._trouble: dict[str, str] = {}  # what the disk refuses (record, checkpoint), and why
        self._bytes = Counter[str]()

    def _on_event(self, event: Event) -> None:
        self._report({**event, "at_s": round(time.monotonic(), 6)})

    @property
    def run_id(self) -> str:
        """Id of the run."""
        return self._run.run

    @property
    def rejected(self) -> Counter[str]:
        """Messages that were rejected, by reason."""
        return self._inbox.rejected

    def stop(self) -> None:
        """End ``run`` soon, with a checkpoint, so that the run can go on later; from any thread or a signal handler."""
        self._stop.set()

    def run(self) -> dict[str, Any]:
        """Train until every round is done and every device has said so, or until ``stop``.

        Returns:
            The run's figures: ``rounds``, ``steps``, ``seconds``, last ``evaluation`` and ``clean``, ``devices``,
            ``finished`` (False after ``stop``).

        Raises:
            TransportError: the broker cannot be reached.
            ServerError: no device said anything for ``idle_s``, training failed, or the disk refuses.
        """
        if self._resume is not None:
            self._journal.restore(self._run)
            for name in {*self._run.steps, *self._run.store.devices}:
                self._roster.join(name)
                self._quarantine.known(name)
        self._transport.open(None)
        if self._resume is None:
            self._begin()
        status = "paused" if self._journal.durable else "finished"
        try:
            figures = self._serve()
            if figures["finished"]:
                status = "finished"
            self._journal.checkpoint(self._run)
            return figures
        finally:
            with contextlib.suppress(TransportError):
                self._announce(status)
                self._quarantine.close()
            self._transport.close()

    def _begin(self) -> None:
        """Keep a new run before any device hears of it, and only where there is a broker to hear of it."""
        try:
            self._journal.begin(self._run)
        except BaseException:
            self._transport.close()
            raise

    def finish(self) -> None:
        """Mark the run as finished, once its results are where they belong; its log is not needed any more."""
        self._journal.checkpoint(self._run, finished=True)

    def _serve(self) -> dict[str, Any]:
        self._quarantine.open()
        self._on_event({"event": "waiting", "run": self._run.run, "devices": self._plan.devices})
        started = 0.0
        heard = time.monotonic()
        while not self._stop.is_set() and not self._finished():
            self._announce(self._status())
            self._quarantine.tend()
            busy = self._run.store.ready and not self._run.over
            received = self._receive(0.0 if busy else 0.25)
            if received is not None:
                heard = time.monotonic()
                self._bytes["received"] += len(received.payload)
                self._take(self._inbox.take(received))
            elif busy:
                heard = time.monotonic()
            elif time.monotonic() - heard > self._patience():
                if self._run.over:
                    break
                raise ServerError(
                    f"no device said anything for {self._idle_s:g} s and "
                    f"{self._run.round} of {self._plan.rounds} rounds are done: "
                    f"start psgl-edge run on {self._plan.devices} devices in fleet {self._fleet!r}, "
                    "and this server again with --resume"
                )
            while (proposal := self._schedule.next(self._run)) is not None:
                started = started or time.monotonic()
                if not self._write(proposal.kind, proposal.fields):
                    break
            if received is not None:
                received.acknowledge()  # behind the replies: who waits for them waits less
            if busy:
                self._show(self._run.train_stored())
            self._keep()
        return self._figures(time.monotonic() - started if started else 0.0)

    def _receive(self, timeout_s: float) -> Received | None:
        try:
            return self._transport.receive(timeout_s)
        except TransportError as exc:
            # The broker refuses a subscription; the transport goes on asking, and the operator can correct it.
            self._on_event({"event": "broker", "why": str(exc)})
            return None

    def _status(self) -> str:
        if self._run.over:
            return "evaluating"
        return "training" if self._run.round or self._run.store.epoch else "waiting"

    def _patience(self) -> float:
        return self._deadline_s if self._run.over else self._idle_s

    def _finished(self) -> bool:
        """Every round is done and so is every device that took part."""
        return self._run.over and self._roster.done

    def _figures(self, seconds: float) -> dict[str, Any]:
        return {
            "run": self._run.run,
            "rounds": self._run.round,
            "steps": sum(self._run.steps.values()),
            "seconds": round(seconds, 3),
            "finished": self._run.over,
            "bytes_received": self._bytes["received"],
            "bytes_sent": self._bytes["sent"],
            "rejected": dict(self._inbox.rejected),
            **self._roster.figures(),
        }

    def _keep(self) -> None:
        """Write a checkpoint if one is due; a disk that refuses is tried again with the next round."""
        try:
            if self._journal.checkpoint_if_due(self._run):
                self._complain("checkpoint", None)
        except (CheckpointError, LogError) as exc:
            self._complain("checkpoint", exc)

    def _complain(self, what: str, error: ServerError | None) -> None:
        """Say once that the disk refuses, and once that it takes all again: until then devices keep their steps."""
        before = bool(self._trouble)
        if error is None:
            self._trouble.pop(what, None)
        else:
            self._trouble[what] = str(error)
        if bool(self._trouble) != before:
            self._on_event({"event": "disk", "ok": before, "why": "" if error is None else str(error)})

    def _announce(self, status: str) -> None:
        """Publish the run (retained) when it changes and after every new connection."""
        state = (status, self._run.version, self._transport.generation)
        if state == self._announced:
            return
        self._announced = state
        fields = {
            "bundle": self._bundle.id,
            "status": status,
            "rounds": self._plan.rounds,
            "round": self._run.round,
            "evaluate_every": self._plan.evaluate_every,
            "batch": self._plan.batch,
            "fronts": self._plan.fronts,
            "front": self._run.version,
            "server": self._life,
            "speaks": [VERSION],
            "versions": {"psgl": __version__},
        }
        frames = encode(Message("model", self._run.run, "", 0, fields, {}), chunk_bytes=_CHUNK)
        self._publish(topics.down_model(self._fleet), frames, retain=True)

    def _publish(self, topic: str, frames: Sequence[bytes], *, retain: bool = False) -> None:
        try:
            for frame in frames:
                self._transport.publish(topic, frame, retain=retain)
                self._bytes["sent"] += len(frame)
        except TransportError as exc:
            # The device will ask again, and the reply is kept.
            self._on_event({"event": "unsent", "topic": topic, "why": str(exc)})

    def _send(self, outgoing: Outgoing) -> None:
        self._publish(topics.down_step(self._fleet, outgoing.device), outgoing.frames)

    def _answer(
        self,
        to: Arrival | Refusal | Gap,
        kind: str,
        fields: Mapping[str, Any],
        tensors: Mapping[str, Any] | None = None,
    ) -> None:
        """Answer what leaves no trace in the run: a question, a refusal, a gap."""
        session, step = (to.message.session, to.message.step) if isinstance(to, Arrival) else (to.session, to.step)
        message = Message(kind, self._run.run, session, step, fields, tensors or {})
        frames = tuple(encode(message, codec=self._plan.codec, chunk_bytes=self._plan.chunk_bytes))
        self._send(Outgoing(to.device, frames))

    def _take(self, arrival: Arrival | Refusal | Gap | Flood | None) -> None:
        if isinstance(arrival, Arrival):
            self._quarantine.known(arrival.device)
        if arrival is None:
            return
        if isinstance(arrival, Flood):
            self._quarantine.blame(arrival.device, arrival.channel)
        elif isinstance(arrival, Gap):
            self._answer(arrival, "missing", {"chunks": list(arrival.chunks)})
        elif isinstance(arrival, Refusal):
            self._refuse(arrival, arrival.reason, arrival.detail)
        elif arrival.message.kind == "state":
            self._note(arrival)
        else:
            self._step(arrival)

    def _refuse(self, what: Arrival | Refusal, reason: str, detail: str) -> None:
        self._on_event({"event": "refused", "device": what.device, "reason": reason, "why": detail})
        self._answer(what, "refused", {"reason": reason, "detail": detail})

    def _note(self, arrival: Arrival) -> None:
        """Note what a device says of itself; a report that is no map of counts is rejected."""
        try:
            self._on_event(self._roster.note(arrival.device, arrival.message))
        except WireError as exc:
            self._inbox.rejected[exc.reason] += 1
            self._on_event({"event": "rejected", "device": arrival.device, "reason": exc.reason, "why": str(exc)})
            return
        evaluation = self._roster.evaluation()
        if evaluation is not None:
            self._on_event({"event": "evaluation", **evaluation})

    def _step(self, arrival: Arrival) -> None:
        message = arrival.message
        if message.kind == "fetch":  # of a device with another bundle
            self._hand_out(arrival)
            return
        known = self._run.known(arrival.key)
        if known is not None:
            self._send(Outgoing(arrival.device, known))
            return
        bundle = self._roster.bundle(arrival.device)
        if bundle and bundle != self._bundle.id:
            self._refuse(arrival, "bundle", f"this server trains bundle {self._bundle.id}: copy it to the device")
        elif message.kind == "infer":
            self._decide(arrival)
        elif message.kind not in _KINDS[self._plan.fronts]:
            detail = f"the fronts of this run are {self._plan.fronts}: upgrade psgl on the device"
            self._refuse(arrival, "fronts", detail)
        elif message.kind == "train" and self._run.over:
            self._answer(arrival, "refused", {"reason": "finished", "detail": "the run has all its rounds"})
        elif message.kind == "train" and self._plan.fronts == "relay" and arrival.device != self._run.holder:
            self._refuse(arrival, "turn", "it is another device's turn: ask for the next one")
        elif message.kind == "front" and self._plan.fronts == "shared" and not self._awaited(arrival.device):
            self._send(self._run.current_front(arrival.key))
        else:
            self._roster.join(arrival.device)
            device, session, step = arrival.key
            fields = {"device": device, "kind": message.kind, "session": session, "step": step}
            if self._write("step", fields, arrival) and message.kind == "store":
                samples = self._run.store.count(device)
                self._on_event({"event": "stored", "device": device, "samples": samples})

    def _awaited(self, device: str) -> bool:
        """Whether a device's front is part of the next mean; of the last one is whoever comes before it is made."""
        return device in self._run.owing or (self._run.over and bool(self._run.owing or self._run.fronts))

    def _hand_out(self, arrival: Arrival) -> None:
        """Answer a device that fetches the bundle; one that asks for too much gets no answer, so that it asks later."""
        found = self._parts.find(arrival.device, arrival.message.fields)
        if found is None:
            self._inbox.rejected["rate"] += 1
        elif isinstance(found, Unavailable):
            self._refuse(arrival, found.reason, found.detail)
        else:
            self._answer(arrival, "part", found.fields, {"part": found.data})

    def _decide(self, arrival: Arrival) -> None:
        try:
            decision = self._trainer.decide(arrival.message.tensors["activations"])
        except ServerError as exc:
            self._refuse(arrival, "decision", str(exc))
            return
        classes = {f"class.{name}": value for name, value in decision.streams.items()}
        self._answer(arrival, "decision", {}, {"probabilities": decision.probabilities, **classes})

    def _write(self, kind: str, fields: Mapping[str, Any], arrival: Arrival | None = None) -> bool:
        """Write a record, apply it, send the replies that it brings about; False when the disk refuses it."""
        body, message = (arrival.body, arrival.message) if arrival is not None else (b"", None)
        try:
            replies = self._journal.write(self._run, kind, fields, body, message)
        except LogError as exc:
            self._complain("record", exc)
            return False
        self._complain("record", None)
        for outgoing in replies:
            self._send(outgoing)
        if self._run.trained is not None:
            self._show(self._run.trained)
        if self._run.failed:
            devices = ", ".join(sorted({outgoing.device for outgoing in replies}))
            self._on_event({"event": "refused", "device": devices, "reason": "training", "why": self._run.failed})
        return True

    def _show(self, trained: Trained) -> None:
        self._on_event(
            {
                "event": "round",
                "round": trained.round,
                "rounds": self._plan.rounds,
                "loss": trained.loss,
                "losses": dict(trained.losses),
                "devices": list(trained.devices),
                "absent": list(trained.absent),
                "clipped": trained.clipped,
                "bytes_received": self._bytes["received"],
                "bytes_sent": self._bytes["sent"],
            }
        )


_KINDS = {
    "own": ("train",),
    "shared": ("train", "front"),
    "relay": ("train", "front"),
    "frozen": ("store",),
}
