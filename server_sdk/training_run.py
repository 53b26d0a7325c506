"""A training run as a function of its records: what the log replays to the same bits.

Everything that changes the run is a record, and ``apply`` is the only way in: live records are written to the log and
then applied, after a crash they are read from it and applied. Nothing in here knows time, network or disk.

    begin        the run's facts, once
    step         a device's message has come (``train``, ``store`` or ``front``); its body is kept with the record
    round        train on these steps, in this order
    synchronise  answer these fronts: with their mean, or by handing the front on
    epoch        from now on, train on the samples that are stored by now, in a new order
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_sdk.body import from_body
from edge_sdk.errors import WireError
from edge_sdk.wire import Message, encode
from server_sdk.activations import ActivationStore
from server_sdk.checkpoint import Checkpoint
from server_sdk.errors import CheckpointError, TrainingError
from server_sdk.fronts import mean_front, share_of
from server_sdk.log import Place, Record
from server_sdk.plan import TrainingPlan
from server_sdk.replies import Key, Replies
from server_sdk.screening import Screen
from server_sdk.trainer import StepResult, Trainer

__all__ = ["Outgoing", "Trained", "TrainingRun"]


@dataclass(frozen=True)
class Outgoing:
    """A reply that is ready to be sent.

    Attributes:
        device: to whom.
        frames: its bytes.
    """

    device: str
    frames: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True)
class Trained:
    """What a round did, for whoever watches.

    Attributes:
        round: its number, from 1.
        devices: who took part.
        absent: who was waited for and did not come.
        loss: the fused stream's (or the only stream's) loss.
        losses: of each stream.
        clipped: samples whose activations were scaled down to the screen's norm.
    """

    round: int
    devices: tuple[str, ...]
    absent: tuple[str, ...]
    loss: float
    losses: Mapping[str, float]
    clipped: int


@dataclass
class _Waiting:
    """A message that came and is not answered yet, and the position of its record."""

    message: Message
    position: int


class TrainingRun:
    """Applies records.

    Args:
        run: id of the run.
        bundle: id of the bundle.
        trainer: the back layers as they begin.
        plan: what the run is.
        screen: which activations are scaled down.

    Attributes:
        round: rounds that are done.
        position: of the last record that was applied.
        steps: training steps of each device that were trained.
        members: devices that a round waits for.
        waiting: device -> its training step, in the order of arrival.
        fronts: device -> the front that it gave or asks for.
        owing: devices that were told to give their fronts and have not.
        holder: whose turn it is (``relay``), or empty.
        last: whose turn it was last.
        turn: rounds that are left of this turn.
        version: of the synchronised front; 0: as exported.
        store: the samples that were sent once (``frozen``).
        trained: what the last record trained, or None.
        failed: why the last record trained nothing although it should have, or empty.
    """

    def __init__(
        self, run: str, bundle: str, trainer: Trainer, plan: TrainingPlan, screen: Screen | None = None
    ) -> None:
        self.run = run
        self.plan = plan
        self._bundle = bundle
        self._trainer = trainer
        self._screen = screen or Screen()
        self._replies = Replies()
        self.round = 0
        self.position = 0
        self.steps: dict[str, int] = {}
        self.members: set[str] = set()
        self.waiting: dict[str, _Waiting] = {}
        self.fronts: dict[str, _Waiting] = {}
        self.owing: set[str] = set()
        self.holder = ""
        self.last = ""
        self.turn = 0
        self.version = 0
        self.store = ActivationStore(plan.seed, plan.batch * plan.devices, plan.weights)
        self.trained: Trained | None = None
        self.failed = ""
        self._front: dict[str, NDArray[np.float32]] = {}

    @property
    def over(self) -> bool:
        """Whether every round is done."""
        return self.round >= self.plan.rounds

    def known(self, key: Key) -> tuple[bytes, ...] | None:
        """The answer to a step that was answered before; () for one that needs none (it waits, or is long past)."""
        device, session, step = key
        kept = self._replies.find(key)
        if kept is not None:
            return kept
        if self.store.holds(key):
            return self._encode(self._stored(key))
        for each in (self.waiting.get(device), self.fronts.get(device)):
            if each is not None and (each.message.session, each.message.step) == (session, step):
                return ()
        return () if self._replies.is_old(key) else None

    def apply(self, record: Record, place: Place | None = None, message: Message | None = None) -> list[Outgoing]:
        """Apply the next record.

        Args:
            record: its position is one above the last.
            place: where its body lies in the log; a ``store`` needs it.
            message: the decoded body of a ``step``, where the caller has it.

        Returns:
            The replies that it brings about.

        Raises:
            CheckpointError: the record does not fit the run: log and run do not belong together.
        """
        if record.position != self.position + 1:
            raise CheckpointError(
                f"record {record.position} follows {self.position}: log and checkpoint do not belong together"
            )
        self.trained, self.failed = None, ""
        try:
            replies = self._apply(record, place, message)
        except (KeyError, TypeError, ValueError, WireError) as exc:
            raise CheckpointError(
                f"record {record.position} ({record.kind}) is none of this run ({exc}): use the run's own folder"
            ) from exc
        self.position = record.position
        return replies

    def train_stored(self) -> Trained:
        """One round on stored samples (``frozen``); ``store.ready`` says whether there is one."""
        activations, labels, weights = self.store.next_batch()
        activations, clipped = self._clip(activations)
        result = self._trainer.step(activations, labels, weights)
        self.round += 1
        return self._report(self.store.devices, (), result, clipped)

    def dump(self) -> Checkpoint:
        """Everything that later records depend on."""
        replies, blobs = self._replies.dump()
        tensors = {f"trainer.{name}": value for name, value in self._trainer.state_dict().items()}
        tensors |= {f"front.{name}": torch.tensor(value) for name, value in self._front.items()}
        facts = {
            **self._identity(),
            "round": self.round,
            "steps": self.steps,
            "members": sorted(self.members),
            "waiting": [each.position for each in self.waiting.values()],
            "fronts": [each.position for each in self.fronts.values()],
            "owing": sorted(self.owing),
            "holder": self.holder,
            "last": self.last,
            "turn": self.turn,
            "version": self.version,
            "replies": replies,
            "store": self.store.dump(),
        }
        return Checkpoint(self.position, tensors, blobs, facts)

    @property
    def oldest_needed(self) -> int:
        """The first record of the log that a later ``load`` of this moment's ``dump`` will read."""
        if self.plan.fronts == "frozen":
            return 1
        held = [each.position for each in (*self.waiting.values(), *self.fronts.values())]
        return min([*held, self.position + 1])

    def load(self, checkpoint: Checkpoint, records: Iterable[tuple[Record, Place]]) -> None:
        """Go on from a ``dump``.

        Args:
            records: of the log, from ``oldest_needed`` on; those beyond the checkpoint are left for ``apply``.

        Raises:
            CheckpointError: a checkpoint of another run, plan, bundle or model, or one that the log does not fit.
        """
        facts = checkpoint.facts
        for name, mine in self._identity().items():
            if facts.get(name) != mine:
                raise CheckpointError(_difference(name, facts.get(name), mine))
        try:
            self._trainer.load_state_dict(_under("trainer.", checkpoint.tensors))
            self._front = {name: value.numpy() for name, value in _under("front.", checkpoint.tensors).items()}
            self.round, self.steps = int(facts["round"]), {name: int(n) for name, n in facts["steps"].items()}
            self._replies.load(facts["replies"], checkpoint.blobs)
            waiting, fronts = set(facts["waiting"]), set(facts["fronts"])
            for record, place in records:
                if record.position > checkpoint.position:
                    break
                if record.kind == "step" and (record.fields["kind"] == "store" or record.position in waiting | fronts):
                    self._step(str(record.fields["device"]), from_body(record.body), record, place)
            self.store.load(facts["store"])
            self.members, self.owing = set(facts["members"]), set(facts["owing"])
            self.holder, self.last = str(facts["holder"]), str(facts["last"])
            self.turn, self.version = int(facts["turn"]), int(facts["version"])
        except (KeyError, TypeError, ValueError, WireError) as exc:
            raise CheckpointError(f"the checkpoint is not whole ({exc}): use an earlier one, or --fresh") from exc
        self.position = checkpoint.position

    def _identity(self) -> dict[str, Any]:
        """What must be the same for records and checkpoints to fit."""
        return {
            "bundle": self._bundle,
            "run": self.run,
            "plan": asdict(self.plan),
            "screen": asdict(self._screen),
            "trainer": dict(self._trainer.options),
        }

    def _apply(self, record: Record, place: Place | None, message: Message | None) -> list[Outgoing]:
        fields = record.fields
        if record.kind == "step":
            arrived = from_body(record.body) if message is None else message
            return self._step(str(fields["device"]), arrived, record, place)
        if record.kind == "round":
            return self._round(_keys(fields["steps"]), tuple(map(str, fields["absent"])))
        if record.kind == "synchronise":
            return self._synchronise(_keys(fields["steps"]), bool(fields["mean"]), str(fields["holder"]))
        if record.kind == "epoch":
            while self.store.ready and not self.over:
                self.train_stored()
            self.store.begin_epoch()
            return []
        if record.kind == "begin":
            return []
        raise ValueError(f"unknown kind {record.kind!r}")

    def _step(self, device: str, message: Message, record: Record, place: Place | None) -> list[Outgoing]:
        key = (device, message.session, message.step)
        if message.kind == "store":
            if place is None:
                raise ValueError("a stored sample needs the log")
            self.store.add(device, message, record.body, place)
            return [Outgoing(device, self._encode(self._stored(key)))]
        if message.kind == "front":
            if device == self.holder:
                self._front = {name: np.array(value) for name, value in message.tensors.items()} or self._front
                self.version += 1
                self.holder = ""
            self.owing.discard(device)
            self.fronts[device] = _Waiting(message, record.position)
            return []
        self.members.add(device)
        self.waiting.pop(device, None)
        self.waiting[device] = _Waiting(message, record.position)
        return []

    def _round(self, keys: Sequence[Key], absent: tuple[str, ...]) -> list[Outgoing]:
        messages = [_take(self.waiting, key) for key in keys]
        # Whoever missed a deadline is waited for again only after its next step.
        self.members -= set(absent)
        sizes = [len(message.tensors["labels"]) for message in messages]
        activations = np.concatenate([message.tensors["activations"] for message in messages])
        labels = np.concatenate([message.tensors["labels"] for message in messages])
        activations, clipped = self._clip(activations)
        weights = None
        if self.plan.weights == "samples":
            shares = share_of([message.fields.get("samples") for message in messages], "samples")
            weights = np.repeat(np.array(shares, np.float32), sizes)
        try:
            result = self._trainer.step(activations, labels, weights)
        except TrainingError as exc:
            self.failed = str(exc)
            refusal = {"reason": "training", "detail": self.failed}
            return [self._reply(key, "refused", refusal) for key in keys]
        self.round += 1
        devices = tuple(key[0] for key in keys)
        for device in devices:
            self.steps[device] = self.steps.get(device, 0) + 1
        self.trained = self._report(devices, absent, result, clipped)
        due = self._due(devices)
        replies = []
        parts = np.split(result.gradient, np.cumsum(sizes)[:-1])
        for key, message, gradient in zip(keys, messages, parts, strict=True):
            fields: dict[str, Any] = {
                "front": message.fields["front"],
                "rate": result.rate,
                "loss": self.trained.loss,
                "round": self.round,
            }
            if key[0] in due:
                fields["synchronise"] = True
            replies.append(self._reply(key, "gradient", fields, {"gradient": gradient}))
        return replies

    def _due(self, devices: Sequence[str]) -> set[str]:
        """Who gives its front before its next step; after the last round each does so by itself."""
        due: set[str] = set()
        every = self.plan.synchronise_every
        if self.plan.fronts == "relay":
            self.turn -= 1
            if self.turn <= 0 and not self.over:
                due = set(devices)
        elif self.plan.fronts == "shared":
            if self.over:
                self.owing = set(self.members)
            elif self.plan.schedule == "async":
                due = {device for device in devices if self.steps[device] % every == 0}
            elif self.round % every == 0:
                due = set(devices)
            self.owing |= due
        return due

    def _synchronise(self, keys: Sequence[Key], mean: bool, holder: str) -> list[Outgoing]:
        messages = [_take(self.fronts, key) for key in keys]
        given = [message for message in messages if message.tensors]
        if mean and given:
            shares = share_of([message.fields.get("samples") for message in given], self.plan.weights)
            self._front = mean_front([message.tensors for message in given], shares)
            self.version += 1
        if mean:
            self.owing.clear()
        if holder:
            self.holder, self.last, self.turn = holder, holder, self.plan.synchronise_every
        fields = {"front": self.version, "round": self.round}
        return [self._reply(key, "synchronised", fields, self._front) for key in keys]

    def current_front(self, key: Key) -> Outgoing:
        """The synchronised front for a device that only asks, or comes too late to give; changes nothing."""
        fields = {"front": self.version, "round": self.round}
        message = Message("synchronised", self.run, key[1], key[2], fields, self._front)
        return Outgoing(key[0], self._encode(message))

    def _stored(self, key: Key) -> Message:
        return Message("stored", self.run, key[1], key[2], {"samples": self.store.count(key[0])})

    def _reply(
        self, key: Key, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Any] | None = None
    ) -> Outgoing:
        frames = self._encode(Message(kind, self.run, key[1], key[2], fields, tensors or {}))
        self._replies.keep(key, frames)
        return Outgoing(key[0], frames)

    def _encode(self, message: Message) -> tuple[bytes, ...]:
        codec = self.plan.codec if message.kind == "gradient" else "float32"
        return tuple(encode(message, codec=codec, chunk_bytes=self.plan.chunk_bytes))

    def _clip(self, activations: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
        return self._screen.check(activations) if self._screen.when_large == "clip" else (activations, 0)

    def _report(self, devices: tuple[str, ...], absent: tuple[str, ...], result: StepResult, clipped: int) -> Trained:
        loss = result.losses.get("fused", sum(result.losses.values()) / len(result.losses))
        return Trained(self.round, devices, absent, loss, result.losses, clipped)


def _keys(steps: Any) -> list[Key]:
    return [(str(device), str(session), int(step)) for device, session, step in steps]


def _take(waiting: dict[str, _Waiting], key: Key) -> Message:
    """The waiting message of that key, which waits no longer."""
    message = waiting.pop(key[0]).message
    if (message.session, message.step) != key[1:]:
        raise ValueError(f"step {key[2]} of {key[0]} does not wait")
    return message


def _under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _difference(name: str, theirs: Any, mine: Any) -> str:
    """One line about what is not the same."""
    if isinstance(theirs, Mapping) and isinstance(mine, Mapping):
        for key in sorted({*theirs, *mine}):
            if theirs.get(key) != mine.get(key):
                name, theirs, mine = f"{name}'s {key}", theirs.get(key), mine.get(key)
                break
    return (
        f"the run that is kept here has {name} {theirs}, this command {mine}: "
        "give the same options and bundle, another --out, or --fresh to forget that run"
    )
