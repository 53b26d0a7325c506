"""Bytes from the broker become decoded, validated steps and states; everything else is counted by reason.

A device is who the topic says it is (the broker's access rules protect topics), never who a payload claims to be.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from edge_sdk import topics
from edge_sdk.errors import WireError
from edge_sdk.transport import Received
from edge_sdk.wire import Assembler, Limits, Message, decode_frame

__all__ = ["Arrival", "Inbox", "Refusal"]

MAX_ACTIVATION = 1e6


@dataclass(frozen=True)
class Arrival:
    """A whole, valid message of a device.

    Attributes:
        device: from the topic.
        message: of kind ``train``, ``infer`` or ``state``.
    """

    device: str
    message: Message


@dataclass(frozen=True)
class Refusal:
    """A whole message that the run cannot take, and the answer that its device deserves.

    Attributes:
        reason: short code (``run``, ``shape``, ``range``, ``labels``).
        detail: one sentence for the device's operator.
    """

    device: str
    session: str
    step: int
    reason: str
    detail: str


@dataclass
class Inbox:
    """Decode and check what arrives for one training run.

    Args:
        fleet: name of the fleet.
        run: id of the training run.
        cut_shape: shape of one sample's activations.
        classes: number of classes K.
        max_batch: largest number of samples in one step.
        max_devices: devices beyond this number are not listened to.
        limits: of the wire.
    """

    fleet: str
    run: str
    cut_shape: tuple[int, ...]
    classes: int
    max_batch: int
    max_devices: int = 1024
    limits: Limits = field(default_factory=Limits)
    rejected: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._assemblers: dict[tuple[str, str], Assembler] = {}

    def take(self, received: Received) -> Arrival | Refusal | None:
        """Take one MQTT message; None while a message is incomplete or when it was rejected (and counted)."""
        try:
            topic = topics.parse(received.topic)
            if topic.fleet != self.fleet or topic.direction != "up":
                raise WireError("topic", f"{received.topic!r} is not for this server")
        except WireError as exc:
            self.rejected[exc.reason] += 1
            return None
        source = (topic.device, topic.channel)
        if source not in self._assemblers and len(self._assemblers) >= 2 * self.max_devices:
            self.rejected["devices"] += 1
            return None
        assembler = self._assemblers.setdefault(source, Assembler(self.limits))
        try:
            message = assembler.add(decode_frame(received.payload, self.limits))
        except WireError as exc:
            self.rejected[exc.reason] += 1
            return None
        if message is None:
            return None
        expected = ("state",) if topic.channel == "state" else ("train", "infer")
        if message.kind not in expected:
            self.rejected["kind"] += 1
            return None
        if message.kind == "state":
            return Arrival(topic.device, message)
        return self._check(topic.device, message)

    def _check(self, device: str, message: Message) -> Arrival | Refusal:
        reason, detail = "", ""
        activations = message.tensors["activations"]
        labels = message.tensors.get("labels")
        if message.run != self.run:
            reason, detail = "run", f"this server trains run {self.run}: start the device again to join it"
        elif activations.shape[1:] != self.cut_shape or not 1 <= len(activations) <= self.max_batch:
            expected = "x".join(map(str, self.cut_shape))
            got = "x".join(map(str, activations.shape))
            reason, detail = (
                "shape",
                f"activations are 1 to {self.max_batch} samples of {expected}, got {got}: use the server's bundle",
            )
        elif float(np.abs(activations).max()) > MAX_ACTIVATION:
            reason, detail = (
                "range",
                f"activations beyond {MAX_ACTIVATION:g}: the front has diverged, start it from the bundle again",
            )
        elif message.kind == "train" and (
            labels is None or labels.shape != (len(activations),) or int(labels.max()) >= self.classes
        ):
            reason, detail = (
                "labels",
                f"a training step needs one label from 0 to {self.classes - 1} for each sample",
            )
        if reason:
            self.rejected[reason] += 1
            return Refusal(device, message.session, message.step, reason, detail)
        return Arrival(device, message)
