"""Bytes from the broker become decoded, validated steps and states; everything else is counted by reason.

A device is who the topic says it is (the broker's access rules protect topics), never who a payload claims to be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from edge_sdk import topics
from edge_sdk.errors import WireError
from edge_sdk.transport import Received
from edge_sdk.wire import (
    Assembler,
    Frame,
    Limits,
    Message,
    decode_body,
    decode_frame,
    foreign_version,
    unknown_kind,
    version_conflict,
)
from server_sdk.rates import RateLimits, Rates
from server_sdk.screening import Screen

__all__ = ["Arrival", "Flood", "Gap", "Inbox", "Refusal"]

_STEPS = ("train", "store", "front", "infer", "fetch")
_DAMAGED = ("crc", "truncated", "header")  # on the way: the step is sent again
_MAX_TOTAL = 1 << 32
_MAX_STATE_BYTES = 64 << 10
_WRONG = RateLimits(messages_per_s=50.0, bytes_per_s=4e6)


@dataclass(frozen=True)
class Arrival:
    """A whole, valid message of a device.

    Attributes:
        device: from the topic.
        message: of kind ``train``, ``store``, ``front``, ``infer``, ``fetch`` or ``state``.
        body: its bytes, as they came.
    """

    device: str
    message: Message
    body: bytes = field(default=b"", repr=False)

    @property
    def key(self) -> tuple[str, str, int]:
        """(device, session, step): which step it is."""
        return self.device, self.message.session, self.message.step


@dataclass(frozen=True)
class Refusal:
    """A whole message that the run cannot take, and the answer that its device deserves.

    Attributes:
        reason: short code, see docs/wire.md, section 13.
        detail: one sentence for the device's operator.
    """

    device: str
    session: str
    step: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Gap:
    """The last chunk of a message has come and others have not.

    Attributes:
        chunks: numbers of those that are missing, from 0.
    """

    device: str
    session: str
    step: int
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class Flood:
    """A message was dropped and gets no answer: its device sends more than it may.

    Attributes:
        channel: ``step`` or ``state``.
    """

    device: str
    channel: str


@dataclass
class Inbox:
    """Decode and check what arrives for one training run.

    Args:
        fleet: name of the fleet.
        run: id of the training run.
        cut_shape: shape of one sample's activations.
        classes: number of classes K.
        max_batch: largest number of samples in one step.
        front: shape of each of the front's tensors by name.
        screen: which activations are too large.
        rates: how much a device may send.
        wrong: how much of it may be what is rejected or refused.
        max_devices: devices beyond this number are not listened to.
        limits: of the wire; a ``state`` is one frame of at most 64 KiB besides.
        max_held_bytes: of unfinished messages, over all devices; beyond it the device that holds most loses its own,
            counted as ``memory``.
        rejected: messages that were rejected, by reason.
    """

    fleet: str
    run: str
    cut_shape: tuple[int, ...]
    classes: int
    max_batch: int
    front: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    screen: Screen = field(default_factory=Screen)
    rates: Rates = field(default_factory=Rates)
    wrong: Rates = field(default_factory=lambda: Rates(_WRONG))
    max_devices: int = 1024
    limits: Limits = field(default_factory=Limits)
    max_held_bytes: int = 512 << 20
    rejected: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._assemblers: dict[tuple[str, str], Assembler] = {}
        self._held_bytes = 0
        state_bytes = min(_MAX_STATE_BYTES, self.limits.max_chunk_bytes, self.limits.max_message_bytes)
        one_frame = replace(self.limits, max_message_bytes=state_bytes, max_chunk_bytes=state_bytes, max_chunks=1)
        self._limits = {"step": self.limits, "state": one_frame}

    @property
    def held_bytes(self) -> int:
        """Bytes of unfinished messages, over all devices."""
        return self._held_bytes

    def take(self, received: Received) -> Arrival | Refusal | Gap | Flood | None:
        """Take one MQTT message; None while a message is incomplete or when it was rejected (and counted)."""
        try:
            topic = topics.parse(received.topic)
            if topic.fleet != self.fleet or topic.direction != "up":
                raise WireError("topic", f"{received.topic!r} is not for this server")
        except WireError as exc:
            self.rejected[exc.reason] += 1
            return None
        if not self.rates.allow(topic.device, len(received.payload)):
            self.rejected["rate"] += 1
            return Flood(topic.device, topic.channel)
        source = (topic.device, topic.channel)
        if source not in self._assemblers and len(self._assemblers) >= 2 * self.max_devices:
            self.rejected["devices"] += 1
            return None
        refusal: Refusal | None = None
        try:
            taken = self._read(source, received.payload)
            if not isinstance(taken, Refusal):
                return taken
            refusal, reason = taken, taken.reason
        except WireError as exc:
            reason = exc.reason
            if topic.channel == "step":
                refusal = _foreign(topic.device, received.payload)
        self.rejected[reason] += 1
        allowed = self.wrong.allow(topic.device, len(received.payload))
        return refusal if allowed else Flood(topic.device, topic.channel)

    def _read(self, source: tuple[str, str], payload: bytes) -> Arrival | Refusal | Gap | None:
        """Read one frame of a device's channel; None while its message is incomplete.

        Raises:
            WireError: it is to be rejected.
        """
        device, channel = source
        limits = self._limits[channel]
        assembler = self._assemblers.setdefault(source, Assembler(limits))
        frame = decode_frame(payload, limits)
        body = self._whole(frame, assembler)
        if body is None:
            return _gap(device, frame, assembler) if source in self._assemblers else None
        try:
            message = decode_body(frame, body, limits)
        except WireError as exc:
            if frame.kind not in _STEPS or exc.reason in _DAMAGED:
                raise
            return Refusal(device, frame.session, frame.step, exc.reason, str(exc))
        if message.kind not in (("state",) if channel == "state" else _STEPS):
            raise WireError("kind", f"a message of kind {message.kind} does not belong on the {channel} topic")
        wrong = None if channel == "state" else self._wrong(message)
        if wrong is not None:
            return Refusal(device, message.session, message.step, *wrong)
        return Arrival(device, message, body)

    def _whole(self, frame: Frame, assembler: Assembler) -> bytes | None:
        """Add a frame to its message and bound what all unfinished messages hold. See ``Assembler.whole``."""
        self._held_bytes -= assembler.held_bytes
        try:
            return assembler.whole(frame)
        finally:
            self._held_bytes += assembler.held_bytes
            while self._held_bytes > self.max_held_bytes:
                largest = max(self._assemblers, key=lambda source: self._assemblers[source].held_bytes)
                self._held_bytes -= self._assemblers.pop(largest).held_bytes
                self.rejected["memory"] += 1

    def _wrong(self, message: Message) -> tuple[str, str] | None:
        """Reason and detail of why the run cannot take a step."""
        if message.run != self.run:
            return "run", f"this server trains run {self.run}: start the device again to join it"
        if message.kind == "fetch":
            return None
        if message.kind == "front":
            shapes = {name: tensor.shape for name, tensor in message.tensors.items()}
            if shapes and shapes != dict(self.front):
                return "shape", "the front is not of this server's bundle: copy that bundle to the device"
            return None
        activations = message.tensors["activations"]
        if activations.shape[1:] != self.cut_shape or not 1 <= len(activations) <= self.max_batch:
            expected = "x".join(map(str, self.cut_shape))
            got = "x".join(map(str, activations.shape))
            return (
                "shape",
                f"activations are 1 to {self.max_batch} samples of {expected}, got {got}: use the server's bundle",
            )
        try:
            self.screen.check(activations)
        except WireError as exc:
            return exc.reason, str(exc)
        if message.kind == "infer":
            return None
        labels = message.tensors["labels"]
        if labels.shape != (len(activations),) or int(labels.max()) >= self.classes:
            return "labels", f"a training step needs one label from 0 to {self.classes - 1} for each sample"
        if message.kind == "store":
            first, total = message.fields["first"], message.fields["total"]
            if first + len(activations) > total or total > _MAX_TOTAL:
                return "range", f"samples {first} to {first + len(activations) - 1} of {total} cannot be: count from 0"
        return None


def _foreign(device: str, payload: bytes) -> Refusal | None:
    """The answer to a frame of another protocol version or of an unknown kind, where it says which step it is."""
    other, unknown = foreign_version(payload), unknown_kind(payload)
    frame = other or unknown
    if frame is None or frame.session is None or frame.step is None:
        return None
    detail = version_conflict([frame.version], here="server", there="device")
    if detail is not None:
        return Refusal(device, frame.session, frame.step, "version", detail)
    detail = f"this server knows no message of kind {frame.kind!r}: upgrade psgl on the server"
    return Refusal(device, frame.session, frame.step, "kind", detail)


def _gap(device: str, frame: Frame, assembler: Assembler) -> Gap | None:
    if frame.index < frame.count - 1:
        return None
    return Gap(device, frame.session, frame.step, tuple(assembler.missing(frame.key)))
