"""Decisions: the server's, or in its absence that of the device's own guide, or none; each says whose it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import RefusedError
from edge_sdk.front import Forward
from edge_sdk.state import OutboxStep
from edge_sdk.station import Station
from edge_sdk.wire import Message

__all__ = ["ABSENCES", "Absence", "Decision", "decide", "question", "without_server"]

By = Literal["server", "guide", "none"]
ABSENCES = {
    "offline": "there is no connection to the broker",
    "no-server": "no server that serves this bundle has announced itself",
    "late": "the server did not answer in time",
    "refused": "the server refused the question",
    "budget": "the bytes of this hour are spent",
}
"""Why a decision is not the server's: each code with its sentence."""


@dataclass(frozen=True)
class Decision:
    """A decision on one batch.

    Attributes:
        probabilities: float32 (N, K): by the server, fused over the streams; by the guide, its softmax; NaN where there
            is no decision.
        streams: class of each of the server's streams by name, int64 (N); empty where the server did not decide.
        guide: class of the device's guide, int64 (N), or None where the bundle has no guide, or one that is asked
            only where the server is not there.
        by: ``server``; ``guide``: the server could not be asked; ``none``: it could not be asked and the bundle has no
            guide.
        why: a key of ``ABSENCES`` where the server did not decide, else empty.
    """

    probabilities: npt.NDArray[np.float32] = field(repr=False)
    streams: Mapping[str, npt.NDArray[np.int64]] = field(repr=False)
    guide: npt.NDArray[np.int64] | None = field(repr=False)
    by: By = "server"
    why: str = ""

    @property
    def classes(self) -> npt.NDArray[np.int64]:
        """int64 (N): the most probable class of each sample, -1 where there is no decision."""
        if self.by == "none":
            return np.full(len(self.probabilities), -1, np.int64)
        classes: npt.NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return classes


class Absence(Exception):
    """The server cannot decide; ``why`` is a key of ``ABSENCES``."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


def question(station: Station, forward: Forward) -> OutboxStep:
    """What asks the server to decide on a batch. A question is not kept: who asked is gone after a restart."""
    message = station.message("infer", {"front": station.state.front.version}, {"activations": forward.activations})
    return OutboxStep(message.step, "infer", station.frames(message))


def decide(station: Station, forward: Forward, asked: OutboxStep, within_s: float | None) -> Decision:
    """Ask the server to decide on a batch.

    Args:
        station: a connected one, with a plan.
        forward: the front's inference on the batch.
        asked: the question.
        within_s: how long to wait for the reply; None for as long as the exchange waits.

    Raises:
        Absence: no reply within that time, or no bytes left to ask.
        RefusedError, StateError, TransportError: see ``EdgeClient.ask``.
    """
    if within_s is not None and not station.exchange.affords(asked.frames):
        raise Absence("budget")
    station.state.note(station.told(forward.activations))
    if within_s is None:
        message = station.exchange.ask(asked).message
    else:
        reply = station.exchange.ask_within(asked, within_s)
        if reply is None:
            raise Absence("late")
        message = reply.message
    return _decision(station, forward, message)


def without_server(station: Station, forward: Forward, why: str) -> Decision:
    """What the device can say alone."""
    count, classes = len(forward.activations), len(station.manifest.classes)
    logits = station.front.guide(forward)
    if logits is None:
        return Decision(np.full((count, classes), np.nan, np.float32), {}, None, "none", why)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return Decision(probabilities, {}, logits.argmax(axis=1), "guide", why)


def _decision(station: Station, forward: Forward, message: Message) -> Decision:
    probabilities = message.tensors.get("probabilities")
    shape = (len(forward.activations), len(station.manifest.classes))
    if probabilities is None or probabilities.shape != shape:
        raise RefusedError("shape", "the server's decision does not fit the batch: compare the versions of psgl")
    streams = {
        name.removeprefix("class."): value for name, value in message.tensors.items() if name.startswith("class.")
    }
    guide = None if forward.guide is None else forward.guide.argmax(axis=1)
    return Decision(probabilities, streams, guide)
