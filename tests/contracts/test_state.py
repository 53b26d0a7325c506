"""One contract for every backend of the device's state."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edge_sdk.errors import ConfigError
from edge_sdk.front import FrontState
from edge_sdk.state import MemoryState, OutboxStep, State

FRONT = FrontState(0, {"p.weight": np.zeros(3, np.float32)})
BACKENDS: dict[str, Callable[[FrontState], State]] = {"memory": MemoryState}


@pytest.fixture(params=BACKENDS)
def state(request: pytest.FixtureRequest) -> State:
    return BACKENDS[request.param](FRONT)


def test_steps_count_up_and_are_never_reused(state: State) -> None:
    drawn = [state.next_step() for _ in range(5)]
    assert drawn == sorted(set(drawn))


def test_a_step_stays_until_it_is_finished_with_its_front(state: State) -> None:
    number = state.next_step()
    state.begin(OutboxStep(number, (b"one", b"two"), np.ones((1, 2), np.float32)))
    assert state.pending is not None and state.pending.frames == (b"one", b"two")
    assert state.front.version == 0
    state.finish(number, FrontState(1, {"p.weight": np.ones(3, np.float32)}))
    assert state.pending is None
    assert state.front.version == 1 and (state.front.tensors["p.weight"] == 1).all()


def test_a_step_without_a_new_front_leaves_the_front(state: State) -> None:
    number = state.next_step()
    state.begin(OutboxStep(number, (b"infer",)))
    state.finish(number)
    assert state.pending is None and state.front.version == 0


def test_one_step_is_in_flight_at_a_time(state: State) -> None:
    state.begin(OutboxStep(state.next_step(), (b"",)))
    with pytest.raises(ConfigError, match="in flight"):
        state.begin(OutboxStep(state.next_step(), (b"",)))
    with pytest.raises(ConfigError, match="not in flight"):
        state.finish(77)


def test_two_lives_have_two_sessions() -> None:
    for make in BACKENDS.values():
        assert make(FRONT).session != make(FRONT).session
