"""The counts of an evaluation: what a device says of itself, and what a message may claim."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_sdk.batch import Samples
from edge_sdk.decisions import Decision
from edge_sdk.errors import WireError
from edge_sdk.plan import Plan
from edge_sdk.training import Evaluation, evaluate


class Decider:
    """Stands for a client: decides class 1 always, its guide says what it is told."""

    def __init__(self, guide: list[int] | None) -> None:
        self.guide = guide
        self.epsilons: list[float | None] = []
        self.asked = 0
        self.plan = Plan("run", "bundle", "training", rounds=1, evaluate_every=0, batch=32)

    def ask(self, x: Any, *, epsilon: float | None = None) -> Decision:
        self.epsilons.append(epsilon)
        probabilities = np.tile(np.array([0.1, 0.9, 0.0], np.float32), (len(x), 1))
        guide = None if self.guide is None else np.array(self.guide[self.asked : self.asked + len(x)])
        self.asked += len(x)
        return Decision(probabilities, {"attacked": np.zeros(len(x), np.int64)}, guide)


SAMPLES = Samples(np.zeros((5, 1, 8, 8), np.uint8), np.array([1, 1, 0, 0, 2]))


def test_every_count_by_hand() -> None:
    # labels    1 1 0 0 2
    # decision  1 1 1 1 1   right: 2
    # guide     1 0 1 0 1   right: samples 0 and 3; agrees: 0, 2, 4; wrong and followed: 2, 4
    result = evaluate(Decider([1, 0, 1, 0, 1]), SAMPLES, epsilon=0.0)  # type: ignore[arg-type]
    assert result == Evaluation(5, 2, {"attacked": 2}, guide_right=2, guide_agreed=3, guide_followed=2, has_guide=True)
    assert Evaluation.from_fields(result.as_fields()) == result


def test_every_sample_is_asked_once_in_batches() -> None:
    many = Samples(np.zeros((70, 1, 8, 8), np.uint8), np.ones(70, np.int64))
    decider = Decider(None)
    result = evaluate(decider, many)  # type: ignore[arg-type]
    assert (result.samples, result.fused, decider.asked, len(decider.epsilons)) == (70, 70, 70, 3)
    assert not result.has_guide


@pytest.mark.parametrize(
    "change",
    [
        {"samples": -1},
        {"fused": 11},
        {"samples": True},
        {"guide_right": 1.5},
        {"streams": {"attacked": 11}},
        {"streams": {1: 2}},
        {"streams": {str(n): 0 for n in range(9)}},
        {"streams": "no map"},
        {"samples": None},
    ],
)
def test_a_message_cannot_claim_nonsense(change: dict[str, Any]) -> None:
    with pytest.raises(WireError) as caught:
        Evaluation.from_fields(Evaluation(samples=10).as_fields() | change)
    assert caught.value.reason == "schema"
