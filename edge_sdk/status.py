"""What a device is doing, in one word and one sentence: for its log, its service manager and its fleet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import Enum

__all__ = ["Condition", "Status"]


class Condition(Enum):
    """The states of a device. ``value`` is the word that is published, ``sentence`` what it means."""

    STARTING = "starting"
    CONNECTING = "connecting"
    OFFLINE = "offline"
    TRAINING = "training"
    DECIDING = "deciding"
    GUIDED = "guided"
    UNDECIDED = "undecided"
    SLEEPING = "sleeping"
    SAVING = "saving-bytes"
    SENSOR_SILENT = "sensor-silent"
    SENSOR_RATE = "sensor-rate"
    SENSOR_VALUES = "sensor-values"
    DISK = "disk-refuses"
    STOPPING = "stopping"
    DONE = "done"
    FAILED = "failed"

    @property
    def sentence(self) -> str:
        """One sentence for a person."""
        return _SENTENCES[self]


_SENTENCES = {
    Condition.STARTING: "bundle and state are being read",
    Condition.CONNECTING: "waiting for the broker and for a server that serves this bundle",
    Condition.OFFLINE: "the broker or the server cannot be reached, it is tried again and again",
    Condition.TRAINING: "the device takes part in the server's rounds",
    Condition.DECIDING: "windows are decided by the server",
    Condition.GUIDED: "the server cannot be asked, windows are decided by the device's own guide",
    Condition.UNDECIDED: "the server cannot be asked and the bundle has no guide, windows stay without a decision",
    Condition.SLEEPING: "windows are gathered until the next connection",
    Condition.SAVING: "the bytes of this hour are spent, the device waits for more",
    Condition.SENSOR_SILENT: "no sample came for longer than silent_s, it goes on when the sensor is back",
    Condition.SENSOR_RATE: "samples do not come at the configured hz, their windows are refused",
    Condition.SENSOR_VALUES: "samples are NaN, infinite, out of range or of another shape, their windows are refused",
    Condition.DISK: "the disk refuses; what was accepted is not lost: free space or make it writable, then start again",
    Condition.STOPPING: "the device was asked to stop, a step in flight stays in its outbox",
    Condition.DONE: "the work is done",
    Condition.FAILED: "the device cannot go on, its last line says why and what to do",
}


class Status:
    """The device's condition and what it counted; whoever wants to know of a change is called.

    Attributes:
        condition: what the device is doing now.
        counts: windows ``seen``, ``refused``, ``dropped``, and ``decided`` by ``server``, ``guide`` and ``none``; under
            ``refused.<fault>`` why windows were refused.
    """

    def __init__(self) -> None:
        self.condition = Condition.STARTING
        self.counts: Counter[str] = Counter()
        self._listeners: list[Callable[[Condition], None]] = []

    def listen(self, listener: Callable[[Condition], None]) -> None:
        """From now on call this with every new condition, in the thread that brings it about."""
        self._listeners.append(listener)

    def enter(self, condition: Condition) -> None:
        """The device does this now; nobody is called where it did so before."""
        if condition is self.condition:
            return
        self.condition = condition
        for listener in self._listeners:
            listener(condition)
