"""One contract for every backend of the device's state: in memory, SQLite, SQLite with a sealed outbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.errors import ConfigError, OutboxFullError, StateError
from edge_sdk.front import FrontState
from edge_sdk.sqlite_state import SqliteState
from edge_sdk.state import DEVICE, MemoryState, OutboxLimits, OutboxStep, State

FRONT = FrontState(
    0,
    {
        "p.weight": np.array([[0.1, -0.0], [1e-45, 3.4e38]], np.float32),
        "p.scale": np.array(0.1, np.float32),
        "b.running_mean": np.array([np.pi, -1], np.float32),
        "b.num_batches_tracked": np.array(7, np.int64),
        "s.momentum": np.array([np.nan, np.inf], np.float32),
    },
)
LATER = FrontState(5, {name: np.asarray(array + array.dtype.type(1)) for name, array in FRONT.tensors.items()})


def memory(folder: Path, limits: OutboxLimits | None, bundle: str = "b") -> State:
    return MemoryState(FRONT, limits)


def sqlite(folder: Path, limits: OutboxLimits | None, bundle: str = "b", key: bytes | None = None) -> State:
    def unexpected(note: str) -> None:
        raise AssertionError(note)

    return SqliteState(
        folder / "state.db", FRONT, bundle=bundle, fleet="f", device="d", limits=limits, key=key, on_note=unexpected
    )


def sealed(folder: Path, limits: OutboxLimits | None, bundle: str = "b") -> State:
    return sqlite(folder, limits, bundle, bytes(range(32)))


BACKENDS: dict[str, Callable[..., State]] = {
    "memory": memory,
    "sqlite": sqlite,
    "sealed": sealed,
}


class Backend:
    """Makes states of one kind, and opens a durable one again."""

    def __init__(self, name: str, folder: Path) -> None:
        self.durable = name != "memory"
        self._make, self._folder = BACKENDS[name], folder
        self._open: list[State] = []
        self._count = 0

    def new(self, limits: OutboxLimits | None = None) -> State:
        self._count += 1
        return self._remember(self._make(self._folder / str(self._count), limits))

    def again(self, state: State, bundle: str = "b") -> State:
        """What the next life of the process finds; its bundle is this one."""
        if not self.durable:
            return state
        self.close()
        return self._remember(self._make(self._folder / str(self._count), state.limits, bundle))

    def close(self) -> None:
        for state in self._open:
            state.close()

    def _remember(self, state: State) -> State:
        self._open.append(state)
        return state


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    made = Backend(request.param, tmp_path)
    yield made
    made.close()


def step_of(number: int, size: int = 8, kind: str = "train") -> OutboxStep:
    return OutboxStep(number, kind, (bytes(size),))


def numbers(state: State) -> list[int]:
    return [step.step for step in state.outbox]


def same_bits(one: FrontState, other: FrontState) -> bool:
    return (
        one.version == other.version
        and one.tensors.keys() == other.tensors.keys()
        and all(
            array.dtype == other.tensors[name].dtype
            and array.shape == other.tensors[name].shape
            and array.tobytes() == other.tensors[name].tobytes()
            for name, array in one.tensors.items()
        )
    )


def same_step(one: OutboxStep, other: OutboxStep) -> bool:
    pairs = ((one.x, other.x), (one.label, other.label))
    return (one.step, one.kind, one.frames, one.size) == (other.step, other.kind, other.frames, other.size) and all(
        (a is None and b is None)
        or (a is not None and b is not None and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()))
        for a, b in pairs
    )


def test_a_new_state_is_empty_and_has_the_given_front(backend: Backend) -> None:
    state = backend.new()
    for each in (state, backend.again(state)):
        assert (each.outbox, dict(each.counters), each.run) == ((), {}, "")
        assert same_bits(each.front, FRONT)


def test_steps_count_up_and_are_never_reused(backend: Backend) -> None:
    state = backend.new()
    drawn = []
    for _ in range(3):
        drawn += [state.next_step() for _ in range(300)]
        state = backend.again(state)
        for number in drawn[-3:-1]:
            state.begin(step_of(number))
            state.finish(number)
    assert min(drawn) > 0
    assert all(one < other for one, other in pairwise(drawn))


def test_a_run_goes_on_with_the_numbers(backend: Backend) -> None:
    state = backend.new()
    before = [state.next_step() for _ in range(3)]
    state.begin_run("second", FRONT)
    assert state.next_step() > before[-1]


def test_a_step_comes_back_as_it_was(backend: Backend) -> None:
    state = backend.new()
    rng = np.random.default_rng(1)
    given = [
        OutboxStep(3, "train", (b"one", b"", b"three"), rng.random((2, 3), np.float32), np.array([1, 0], np.int64)),
        OutboxStep(4, "train", (rng.bytes(70_000),), rng.random((3, 1, 5, 5), np.float32)),
        OutboxStep(5, "store", (b"frozen",), None, np.array([2], np.int64)),
        OutboxStep(6, "front", (b"mine",)),
        OutboxStep(7, "train", (b"turned",), rng.random((4, 6), np.float32).T),
    ]
    for step in given:
        state.begin(step)
    for each in (state, backend.again(state)):
        assert len(each.outbox) == len(given)
        assert all(same_step(one, other) for one, other in zip(each.outbox, given, strict=True))


def test_a_step_stays_until_it_is_finished_with_its_front(backend: Backend) -> None:
    state = backend.new()
    state.begin(step_of(state.next_step()))
    assert same_bits(backend.again(state).front, FRONT)
    state = backend.again(state)
    state.finish(numbers(state)[0], LATER, {"trained": 1})
    for each in (state, backend.again(state)):
        assert each.outbox == () and dict(each.counters) == {"trained": 1}
        assert same_bits(each.front, LATER)


def test_a_step_without_a_new_front_leaves_the_front(backend: Backend) -> None:
    state = backend.new()
    state.begin(step_of(1))
    state.finish(1)
    for each in (state, backend.again(state)):
        assert each.outbox == () and same_bits(each.front, FRONT)


def test_the_outbox_keeps_the_order_of_begin(backend: Backend) -> None:
    state = backend.new()
    for number in (4, 2, 9, 3):
        state.begin(step_of(number))
    assert numbers(state) == [4, 2, 9, 3]
    state = backend.again(state)
    state.finish(9)
    state.begin(step_of(1))
    assert numbers(state) == numbers(backend.again(state)) == [4, 2, 3, 1]


def test_a_number_is_in_flight_once(backend: Backend) -> None:
    state = backend.new()
    state.begin(step_of(1), {"batches": 1})
    for each in (state, backend.again(state)):
        with pytest.raises(ConfigError, match="in flight"):
            each.begin(step_of(1), {"batches": 2})
        with pytest.raises(ConfigError, match="not in flight"):
            each.finish(77, LATER, {"batches": 3})
        assert numbers(each) == [1] and dict(each.counters) == {"batches": 1} and each.front.version == 0


def test_counters_are_set_with_the_step_and_the_others_stay(backend: Backend) -> None:
    state = backend.new()
    state.begin(step_of(1), {"batches": 1, "epoch": 0})
    state.finish(1, None, {"trained": 2**62})
    state.begin(step_of(2), {"batches": -2})
    expected = {"batches": -2, "epoch": 0, "trained": 2**62}
    assert dict(state.counters) == dict(backend.again(state).counters) == expected


def test_counters_are_noted_without_a_step(backend: Backend) -> None:
    state = backend.new()
    state.begin(step_of(1), {"batches": 1, "round": 4})
    state.note({"done": 1, "round": 5})
    expected = {"batches": 1, "round": 5, "done": 1}
    assert dict(state.counters) == expected and numbers(state) == [1]
    again = backend.again(state)
    assert dict(again.counters) == expected and numbers(again) == [1]


def test_what_is_read_cannot_change_the_state(backend: Backend) -> None:
    state = backend.new()
    state.begin(step_of(1), {"batches": 1})
    dict.update(state.counters, batches=2)
    assert dict(state.counters) == {"batches": 1}


@pytest.mark.parametrize(
    "limits, sizes",
    [(OutboxLimits(3, 1000), [8, 8, 8]), (OutboxLimits(64, 100), [50, 45]), (OutboxLimits(1, 10), [10])],
    ids=["steps", "bytes", "one"],
)
def test_a_full_outbox_drops_the_oldest_and_counts_them(
    backend: Backend, limits: OutboxLimits, sizes: list[int]
) -> None:
    state = backend.new(OutboxLimits(limits.max_steps, limits.max_bytes, "drop-oldest"))
    for number, size in enumerate(sizes, 1):
        assert state.begin(step_of(number, size)) == ()
    assert state.begin(step_of(10, 10), {"batches": 9}) == (1,)
    assert numbers(state) == [*range(2, len(sizes) + 1), 10]
    assert dict(state.counters) == {"dropped": 1, "batches": 9}
    state = backend.again(state)
    assert numbers(state) == [*range(2, len(sizes) + 1), 10]
    waiting = tuple(numbers(state))
    assert state.begin(step_of(11, limits.max_bytes)) == waiting
    assert dict(backend.again(state).counters) == {"dropped": 1 + len(waiting), "batches": 9}


@pytest.mark.parametrize("policy", ["block", "refuse"])
def test_a_full_outbox_takes_nothing(backend: Backend, policy: str) -> None:
    state = backend.new(OutboxLimits(2, 100, policy))  # type: ignore[arg-type]
    state.begin(step_of(1, 50))
    for _ in range(2):
        with pytest.raises(OutboxFullError, match="1 steps wait"):
            state.begin(step_of(2, 51), {"batches": 1})
        assert numbers(state) == [1] and dict(state.counters) == {}
        state = backend.again(state)
    assert state.begin(step_of(2, 50)) == ()
    with pytest.raises(OutboxFullError, match="2 steps wait"):
        state.begin(step_of(3, 0))
    state.finish(1)
    assert state.begin(step_of(3, 0)) == ()


@pytest.mark.parametrize("policy", ["block", "drop-oldest", "refuse"])
def test_a_step_above_the_limit_drops_nothing(backend: Backend, policy: str) -> None:
    state = backend.new(OutboxLimits(2, 100, policy))  # type: ignore[arg-type]
    state.begin(step_of(1))
    with pytest.raises(OutboxFullError, match="smaller batches"):
        state.begin(step_of(2, 101))
    assert numbers(state) == [1]


def test_a_run_begins_with_its_front_and_nothing_else(backend: Backend) -> None:
    state = backend.new()
    state.begin(step_of(2), {"batches": 2})
    state.begin(step_of(1))
    assert state.begin_run("run-2", LATER) == (2, 1)
    for each in (state, backend.again(state)):
        assert (each.run, each.outbox, dict(each.counters)) == ("run-2", (), {})
        assert same_bits(each.front, LATER)
    state = backend.again(state)
    assert state.begin_run("run-3", FRONT) == ()
    assert same_bits(backend.again(state).front, FRONT)


def test_a_new_run_leaves_the_devices_own_counters(backend: Backend) -> None:
    state = backend.new()
    state.begin_run("run-1", FRONT)
    state.note({"trained": 3, f"{DEVICE}allowance": -7, f"{DEVICE}x": 1 << 60})
    state.begin_run("run-2", LATER)
    for each in (state, backend.again(state)):
        assert dict(each.counters) == {f"{DEVICE}allowance": -7, f"{DEVICE}x": 1 << 60}


def test_another_bundle_begins_with_its_front_and_keeps_what_is_the_devices(backend: Backend) -> None:
    state = backend.new()
    state.begin_run("run-1", LATER)
    numbers_before = [state.next_step() for _ in range(2)]
    for number in numbers_before:
        state.begin(step_of(number), {"batches": number})
    state.note({f"{DEVICE}allowance": -7})
    session, key = state.session, state.noise_key
    assert state.change_bundle("b2", FRONT) == tuple(numbers_before)
    for each in (state, backend.again(state, "b2")):
        assert (each.run, each.outbox, dict(each.counters)) == ("", (), {f"{DEVICE}allowance": -7})
        assert same_bits(each.front, FRONT) and (each.session, each.noise_key) == (session, key)
    state = backend.again(state, "b2")
    number = state.next_step()
    assert number > max(numbers_before)
    state.begin(step_of(number))
    assert numbers(backend.again(state, "b2")) == [number]


def test_a_new_run_has_all_the_room(backend: Backend) -> None:
    state = backend.new(OutboxLimits(2, 100, "refuse"))
    for run in ("one", "two"):
        state.begin(step_of(1, 50))
        state.begin(step_of(2, 50))
        assert state.begin_run(run, FRONT) == (1, 2)


def test_the_session_is_one_life_of_the_state(backend: Backend) -> None:
    one = backend.new()
    session = one.session
    assert len(session) == 16 and int(session, 16) >= 0
    assert backend.again(one).session == session
    assert backend.new().session != session


def test_the_noise_key_is_one_life_of_the_state_and_its_own(backend: Backend) -> None:
    state = backend.new()
    key = state.noise_key
    assert len(key) == 32
    assert backend.again(state).noise_key == key
    assert backend.new().noise_key != key


def test_the_limits_are_told(backend: Backend) -> None:
    assert backend.new().limits == OutboxLimits()
    assert backend.new(OutboxLimits(2, 3, "refuse")).limits == OutboxLimits(2, 3, "refuse")


def test_closing_twice_is_allowed(backend: Backend) -> None:
    state = backend.new()
    state.close()
    state.close()
    if backend.durable:
        with pytest.raises(StateError, match="open it again"):
            state.begin(step_of(1))
