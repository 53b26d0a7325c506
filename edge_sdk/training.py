"""What a training device does from its first announcement to its last evaluation: follow the server's rounds.

The device scores itself: labels of test samples never leave it, only counts do (in its state message).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from edge_sdk.batch import Samples, batches, shuffled
from edge_sdk.client import EdgeClient
from edge_sdk.errors import RefusedError, WireError
from edge_sdk.steps import TrainStep

__all__ = ["Evaluation", "evaluate", "follow"]

_INTERIM_SAMPLES = 256
_COUNTS = ("samples", "fused", "guide_right", "guide_agreed", "guide_followed")
Event = dict[str, Any]


@dataclass
class Evaluation:
    """Counts over a test set; counts of several devices add up.

    Attributes:
        samples: number of samples.
        fused: samples that the fused decision got right.
        streams: the same for each stream by name.
        guide_right: samples that the guide got right.
        guide_agreed: samples on which the decision is the guide's.
        guide_followed: samples on which the guide is wrong and the decision is the guide's.
        has_guide: False where the profile has no guide.
    """

    samples: int = 0
    fused: int = 0
    streams: dict[str, int] = field(default_factory=dict)
    guide_right: int = 0
    guide_agreed: int = 0
    guide_followed: int = 0
    has_guide: bool = False

    def as_fields(self) -> dict[str, Any]:
        """The counts as plain values, for a message or a file."""
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: Any) -> Evaluation:
        """Counts that arrived in a message.

        Raises:
            WireError: they are not counts, or contradict each other.
        """
        try:
            counts = {name: fields[name] for name in _COUNTS}
            streams = dict(fields["streams"])
            everything = (*counts.values(), *streams.values())
            sound = all(type(count) is int and 0 <= count <= counts["samples"] for count in everything)
            if not sound or len(streams) > 8 or not all(type(name) is str for name in streams):
                raise ValueError
            return cls(**counts, streams=streams, has_guide=fields["has_guide"] is True)
        except (KeyError, TypeError, ValueError) as exc:
            raise WireError("schema", "the evaluation is not a map of counts") from exc


def evaluate(client: EdgeClient, samples: Samples, *, epsilon: float | None = None) -> Evaluation:
    """Ask the server to decide on every sample, in batches as the plan has them, and count who was right.

    Args:
        client: a started client.
        samples: the device's test set; its labels stay on the device.
        epsilon: perturbation budget in place of the bundle's; 0 sends the samples unperturbed.

    Raises:
        BatchError, RefusedError, TransportError: as in ``EdgeClient.ask``.
    """
    total = Evaluation()
    batch = client.plan.batch
    for start in range(0, len(samples), batch):
        part = samples.take(np.arange(start, min(start + batch, len(samples))))
        decision = client.ask(part.x, epsilon=epsilon)
        right = decision.classes == part.y
        total.samples += len(part)
        total.fused += int(right.sum())
        for name, classes in decision.streams.items():
            total.streams[name] = total.streams.get(name, 0) + int((classes == part.y).sum())
        if decision.guide is not None:
            guide_right = decision.guide == part.y
            agreed = decision.classes == decision.guide
            total.has_guide = True
            total.guide_right += int(guide_right.sum())
            total.guide_agreed += int(agreed.sum())
            total.guide_followed += int((agreed & ~guide_right).sum())
    return total


def follow(
    client: EdgeClient,
    train: Samples,
    test: Samples | None,
    *,
    seed: int,
    shift: int = 0,
    measure_clean: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> None:
    """Take part in a run until the server has all its rounds, evaluating when the plan says so and once at the end.

    A client whose state was kept goes on where it stopped, with the batch that comes next. If the run ended while it
    was away, nothing is left to do.

    Args:
        client: a started client.
        train: the device's training samples.
        test: its test samples, or None. Evaluations before the end take the first 256 of them.
        seed: order of the batches, together with the device's name.
        shift: augmentation, see ``batches``; a frozen front sends each sample once, as it is.
        measure_clean: evaluate once more at the end with unperturbed inputs (these activations are unprotected).
        on_event: called with a plain dictionary after every step and evaluation.

    Raises:
        BatchError, RefusedError, StateError, TransportError: as in ``EdgeClient.train_step``.
    """
    if client.plan.status == "finished":
        on_event({"event": "over", "round": client.round, "left": len(client.state.outbox)})
        client.finish_run()
        return
    client.tell(status="training", round=client.round)
    if client.plan.fronts == "frozen":
        _store(client, train, seed, on_event)
    else:
        _train(client, train, test, seed, shift, on_event)
    final: dict[str, Any] = {}
    if test is not None:
        final["evaluation"] = evaluate(client, test).as_fields()
        on_event({"event": "evaluation", "round": client.round, **final["evaluation"]})
        if measure_clean:
            final["clean"] = evaluate(client, test, epsilon=0.0).as_fields()
            on_event({"event": "clean", "round": client.round, **final["clean"]})
    client.tell(
        status="done",
        round=client.round,
        steps=client.steps,
        bytes_sent=client.traffic.bytes_sent,
        bytes_received=client.traffic.bytes_received,
        bytes_per_sample=client.bytes_per_sample,
        **final,
    )
    client.finish_run()


def _train(
    client: EdgeClient,
    train: Samples,
    test: Samples | None,
    seed: int,
    shift: int,
    on_event: Callable[[Event], None],
) -> None:
    """Train the front, round after round."""

    def report(step: TrainStep) -> None:
        on_event({"event": "step", "step": step.step, "round": step.round, "loss": step.loss, "resent": step.resent})

    plan = client.plan
    resumed = client.resume()
    if resumed is not None:
        report(resumed)
    order = batches(train, plan.batch, seed=seed, device=client.device, shift=shift, skip=client.batches)
    while client.round < plan.rounds:
        batch = next(order)
        try:
            step = client.train_step(batch.x, batch.y, samples=len(train))
        except RefusedError as exc:
            if exc.reason != "turn":
                raise
            on_event({"event": "turn", "why": str(exc)})
            continue
        if step is None:
            break
        report(step)
        due = plan.evaluate_every and step.round % plan.evaluate_every == 0 and step.round < plan.rounds
        if test is not None and due:
            figures = evaluate(client, test.take(np.arange(min(len(test), _INTERIM_SAMPLES)))).as_fields()
            client.tell(round=step.round, evaluation=figures)
            on_event({"event": "evaluation", "round": step.round, **figures})
    if plan.fronts in ("shared", "relay"):
        client.synchronise(samples=len(train))


def _store(client: EdgeClient, train: Samples, seed: int, on_event: Callable[[Event], None]) -> None:
    """Send each sample once and wait until the server has trained on them."""
    client.resume()
    order = shuffled(train, seed=seed, device=client.device)
    size = client.plan.batch
    for first in range(client.sent, len(order), size):
        part = order.take(np.arange(first, min(first + size, len(order))))
        client.store(part.x, part.y, first=first, total=len(order))
        on_event({"event": "stored", "samples": client.sent, "of": len(order)})
    client.flush()
    while client.plan.status not in ("evaluating", "finished"):
        client.listen(1.0)
    client.state.note({"round": client.plan.rounds})
