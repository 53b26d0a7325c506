"""How much the outbox takes, and what gives way."""

from __future__ import annotations

import numpy as np
import pytest

from edge_sdk.errors import ConfigError, OutboxFullError
from edge_sdk.state import OutboxLimits, OutboxStep, room_for


def step_of(size: int) -> OutboxStep:
    return OutboxStep(9, "train", (bytes(size),))


def test_the_size_is_frames_batch_and_labels() -> None:
    x, label = np.zeros((2, 3), np.float32), np.zeros(2, np.int64)
    assert OutboxStep(1, "train", (b"abc", b"d")).size == 4
    assert OutboxStep(1, "train", (b"abc",), x).size == 3 + 24
    assert OutboxStep(1, "train", (b"abc",), x, label).size == 3 + 24 + 16


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"max_bytes": 0}, {"max_steps": -1}, {"when_full": "wait"}])
def test_limits_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        OutboxLimits(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sizes, size, dropped",
    [
        ({}, 100, ()),
        ({1: 50}, 50, ()),
        ({1: 50}, 51, (1,)),
        ({1: 10, 2: 10}, 80, ()),
        ({1: 10, 2: 10}, 81, (1,)),
        ({1: 1, 2: 1, 3: 1}, 1, (1,)),
        ({3: 1, 1: 60, 2: 30}, 40, (3, 1)),
        ({1: 1, 2: 1, 3: 1}, 100, (1, 2, 3)),
        (dict.fromkeys(range(6), 1), 1, (0, 1, 2, 3)),
    ],
)
@pytest.mark.parametrize("policy", ["block", "drop-oldest", "refuse"])
def test_only_as_many_as_needed_give_way_oldest_first(
    sizes: dict[int, int], size: int, dropped: tuple[int, ...], policy: str
) -> None:
    limits = OutboxLimits(3, 100, policy)  # type: ignore[arg-type]
    if dropped and policy != "drop-oldest":
        with pytest.raises(OutboxFullError, match=f"{len(sizes)} steps wait"):
            room_for(step_of(size), sizes, limits)
    else:
        assert room_for(step_of(size), sizes, limits) == dropped


@pytest.mark.parametrize("policy", ["block", "drop-oldest", "refuse"])
def test_a_step_above_the_limit_can_never_enter(policy: str) -> None:
    limits = OutboxLimits(3, 100, policy)  # type: ignore[arg-type]
    with pytest.raises(OutboxFullError, match="smaller batches"):
        room_for(step_of(101), {1: 1}, limits)
    assert room_for(step_of(100), {}, limits) == ()
