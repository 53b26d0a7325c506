"""The training step: activations out, gradient back, the front's update in one commit; the exchange of fronts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ConfigError, RefusedError
from edge_sdk.front import Forward, FrontState
from edge_sdk.state import OutboxStep
from edge_sdk.station import Station

__all__ = ["TrainStep", "finish_synchronising", "finish_training", "synchronise", "train"]


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


def train(
    station: Station, batch: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], samples: int | None
) -> TrainStep | None:
    """Send one checked batch and finish its step. See ``EdgeClient.train_step``."""
    before = station.state.front
    attacked = labels if station.manifest.perturb_towards == "label" else None
    forward = station.front.forward(before, batch, attacked, training=True, epsilon=station.train_epsilon)
    weight = {} if samples is None else {"samples": samples}
    tensors: dict[str, npt.NDArray[Any]] = {"activations": forward.activations, "labels": labels}
    message = station.message("train", {"front": before.version, **weight}, tensors)
    outbox = OutboxStep(message.step, "train", station.frames(message), batch, attacked)
    station.state.begin(outbox, {"batches": station.count("batches") + 1, **station.told(batch)})
    return finish_training(station, outbox, forward)


def finish_training(station: Station, outbox: OutboxStep, forward: Forward | None) -> TrainStep | None:
    """Wait for a step's gradient and take it; ``forward`` is None after a restart and is computed again."""
    before = station.state.front
    if outbox.x is None:
        raise ConfigError(f"step {outbox.step} of the outbox has no batch: start this device over")
    x, label = outbox.x, outbox.label
    prepared: Forward | None = None

    def prepare() -> None:
        nonlocal forward, prepared
        if forward is None:
            forward = station.front.forward(before, x, label, training=True, epsilon=station.train_epsilon)
        prepared = station.front.prepare(before, forward)

    try:
        reply = station.exchange.ask(outbox, prepare)
    except RefusedError as exc:
        # Of a turn that went to another device: a new one is asked for before the next step.
        station.state.finish(outbox.step, None, {"synchronise": int(exc.reason == "turn")})
        if exc.reason == "finished":
            return None
        raise
    fields = reply.message.fields
    gradient = reply.message.tensors.get("gradient")
    if prepared is None or gradient is None or gradient.shape != prepared.activations.shape:
        raise RefusedError("shape", "the server's gradient does not fit the step: compare the versions of psgl")
    if not 0 <= fields["rate"] <= 1:
        raise RefusedError("shape", "the server's rate is not in [0, 1]: compare the versions of psgl")
    rate = station.manifest.learning_rate * float(fields["rate"])
    after = station.front.backward(before, prepared, gradient, rate=rate)
    counters = {
        "trained": station.count("trained") + 1,
        "round": int(fields["round"]),
        "synchronise": int(bool(fields.get("synchronise"))),
        "samples": station.count("samples") + len(x),
        "sample_bytes": station.count("sample_bytes") + outbox.frames_size,
        "unperturbed": station.count("unperturbed") + prepared.unperturbed,
    }
    station.state.finish(outbox.step, after, counters)
    return TrainStep(outbox.step, int(fields["round"]), float(fields["loss"]), reply.resent)


def synchronise(station: Station, *, give: bool, samples: int | None) -> None:
    """Give the front away and take what comes back. See ``EdgeClient.synchronise``."""
    front = station.state.front
    weight = {} if samples is None else {"samples": samples}
    tensors: Mapping[str, npt.NDArray[Any]] = front.tensors if give else {}
    message = station.message("front", {"front": front.version, **weight}, tensors)
    outbox = OutboxStep(message.step, "front", station.frames(message, packed=False))
    station.state.begin(outbox, {"synchronise": 0})
    finish_synchronising(station, outbox)


def finish_synchronising(station: Station, outbox: OutboxStep) -> None:
    """Wait for the answer to a front, and take the front in it."""
    try:
        reply = station.exchange.ask(outbox).message
    except RefusedError:
        station.state.finish(outbox.step)
        raise
    before = station.state.front
    given = reply.tensors
    if given and (
        given.keys() != before.tensors.keys()
        or any(given[name].shape != value.shape for name, value in before.tensors.items())
    ):
        station.state.finish(outbox.step)
        raise RefusedError("shape", "the server's front is not of this bundle: compare the versions of psgl")
    after = FrontState(before.version, dict(given)) if given else before
    station.state.finish(outbox.step, after, {"front": int(reply.fields["front"])})
