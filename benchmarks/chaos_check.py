"""What a run did, told by its log, and the same steps once more without any disturbance.

The twin walks through the log in its order: each device's front starts as exported, computes the activations of its
next batch, which must be the logged bytes, and takes the gradient that an undisturbed server gives for them. In the end
the twin's bits are compared with those that the real devices and the real server left.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from edge_sdk.batch import Samples, as_batch, batches, shuffled
from edge_sdk.body import from_body, to_body
from edge_sdk.bundle import Bundle, load_bundle
from edge_sdk.codec import unpack_tensors
from edge_sdk.dataset import load_dataset
from edge_sdk.front import Forward, Front, FrontState
from edge_sdk.wire import Assembler, Message, decode_frame
from server_sdk.assembly import back_path, trainer_from
from server_sdk.errors import CheckpointError
from server_sdk.plan import TrainingPlan
from server_sdk.segments import Damage, Place, Record, scan
from server_sdk.training_run import Outgoing, TrainingRun

__all__ = ["Verdict", "check"]


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    Attributes:
        lost: steps that a device has finished and the server has not trained, or the reverse.
        repeated: steps that were trained, or samples that were stored, more than once.
        equal: whether server and fronts end in the twin's bits.
        differences: what was not as it should be, in words.
    """

    lost: int
    repeated: int
    equal: bool
    differences: tuple[str, ...]


class _Device:
    """A device that nothing disturbs."""

    def __init__(self, name: str, bundle: Bundle, front: Front, train: Samples, plan: TrainingPlan, seed: int) -> None:
        self._bundle = bundle
        self._front = front
        self._train = train
        self._order: Iterator[Samples] = batches(train, plan.batch, seed=seed, device=name)
        self._once = shuffled(train, seed=seed, device=name)
        self._prepared: dict[int, Forward] = {}
        self.state = front.initial_state()

    def message(self, logged: Message) -> Message:
        """What this device would have sent as that step."""
        manifest = self._bundle.manifest
        fields = dict(logged.fields)
        tensors: Mapping[str, Any]
        if logged.kind == "front":
            tensors = self.state.tensors
        elif logged.kind == "store":
            first = int(fields["first"])
            part = self._once.take(np.arange(first, first + len(logged.tensors["labels"])))
            x = as_batch(part.x, manifest.input_shape, max_batch=manifest.max_batch)
            forward = self._front.forward(self.state, x, None, training=False)
            tensors = {"activations": forward.activations, "labels": part.y}
        else:
            batch = next(self._order)
            x = as_batch(batch.x, manifest.input_shape, max_batch=manifest.max_batch)
            forward = self._front.forward(self.state, x, None, training=True)
            self._prepared[logged.step] = self._front.prepare(self.state, forward)
            tensors = {"activations": forward.activations, "labels": batch.y}
        return Message(logged.kind, logged.run, logged.session, logged.step, fields, tensors)

    def take(self, reply: Message) -> None:
        """Go on with a reply."""
        if reply.kind == "gradient":
            rate = self._bundle.manifest.learning_rate * float(reply.fields["rate"])
            prepared = self._prepared.pop(reply.step)
            self.state = self._front.backward(self.state, prepared, reply.tensors["gradient"], rate=rate)
        elif reply.kind == "synchronised" and reply.tensors:
            self.state = FrontState(self.state.version, dict(reply.tensors))


def check(
    folder: Path, bundle_path: Path, shards: tuple[Path, ...], plan: TrainingPlan, *, learning_rate: float, seed: int
) -> Verdict:
    """Compare a finished run with its undisturbed twin.

    Args:
        folder: of the run: ``log/`` with every record, ``server.safetensors``, and of each device its ``.json`` report
            and ``.front.cbor``.
        bundle_path, shards, plan, learning_rate, seed: what the run was given.
    """
    torch.set_num_threads(1)
    bundle = load_bundle(bundle_path)
    items = _records(folder / "log")
    trainer = trainer_from(bundle, back_path(bundle_path), rounds=plan.rounds, learning_rate=learning_rate)
    run = TrainingRun(str(items[0][0].fields["run"]), bundle.id, trainer, plan)
    front = Front(bundle)
    names = [f"device-{number}" for number in range(1, len(shards) + 1)]
    devices = {
        name: _Device(name, bundle, front, load_dataset(shard).train, plan, seed)
        for name, shard in zip(names, shards, strict=True)
    }
    differences: list[str] = []
    trained = Counter[tuple[str, str, int]]()
    stored = Counter[tuple[str, int]]()
    for record, place in items:
        if record.kind == "step":
            name, logged = str(record.fields["device"]), from_body(record.body)
            codec = "float32" if logged.kind == "front" else plan.codec
            if to_body(devices[name].message(logged), codec) != record.body:
                differences.append(f"record {record.position}: {name}'s {logged.kind} is not what its twin sends")
            if logged.kind == "store":
                first = int(logged.fields["first"])
                stored.update((name, first + index) for index in range(len(logged.tensors["labels"])))
        elif record.kind == "round":
            trained.update((str(d), str(s), int(n)) for d, s, n in record.fields["steps"])
        try:
            replies = run.apply(record, place)
        except CheckpointError as exc:
            differences.append(str(exc))
            break
        for outgoing in replies:
            devices[outgoing.device].take(_decoded(outgoing))
    while run.store.ready and not run.over:
        run.train_stored()
    repeated = sum(count - 1 for count in (*trained.values(), *stored.values()))
    lost = abs(plan.rounds - run.round)
    for name, shard in zip(names, shards, strict=True):
        report = json.loads((folder / f"{name}.json").read_text())
        of_device = sum(device == name for device, _, _ in trained)
        lost += abs(report["steps"] - of_device)
        if plan.fronts == "frozen":
            lost += len(load_dataset(shard).train) - len({index for device, index in stored if device == name})
        left = unpack_tensors((folder / f"{name}.front.cbor").read_bytes())
        if not _equal(left, devices[name].state.tensors):
            differences.append(f"{name}'s front is not its twin's")
    server = safetensors.numpy.load_file(folder / "server.safetensors")
    if not _equal(server, {name: value.numpy() for name, value in trainer.state_dict().items()}):
        differences.append("the server's weights are not its twin's")
    return Verdict(lost, repeated, not differences, tuple(differences))


def _records(log: Path) -> list[tuple[Record, Place]]:
    items = []
    for item in scan(log):
        if isinstance(item, Damage):
            raise ValueError(f"the log is damaged: {item}")
        items.append(item)
    return items


def _decoded(outgoing: Outgoing) -> Message:
    assembler = Assembler()
    message = None
    for frame in outgoing.frames:
        message = assembler.add(decode_frame(frame))
    if message is None:
        raise ValueError("a reply without its last chunk")
    return message


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(value, other[name]) for name, value in one.items())
