"""Windows become decisions: by the server, by the guide, by nobody; and no bad day of sensor or network ends it."""

from __future__ import annotations

import io
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_sdk import topics
from edge_sdk.backlog import Backlog, BacklogLimits
from edge_sdk.budget import Allowance, Budget
from edge_sdk.client import EdgeClient
from edge_sdk.errors import BatchError, ConfigError, StateError, TransportError
from edge_sdk.front import FrontState
from edge_sdk.logs import configure
from edge_sdk.memory_transport import MemoryBroker, MemoryTransport
from edge_sdk.sources import array_windows
from edge_sdk.state import MemoryState
from edge_sdk.status import Condition
from edge_sdk.windows import Reading, Windowing
from edge_sdk.wire import Message
from tests.edge_sdk.test_client import decision_for, scripted_server

PATIENCE_S = 20.0


def client_of(broker: MemoryBroker, built: Any, **options: Any) -> EdgeClient:
    """One that connects by itself."""
    options = {"resend_s": 0.1, "give_up_s": 10.0, "decision_s": 5.0} | options
    return EdgeClient(built.bundle, lambda: MemoryTransport(broker, "d1"), device="d1", fleet="ward", **options)


def signals(built: Any, length: int = 8) -> Any:
    """A bundle whose input looks like a signal of 8 leads; only what stands before the front may run with it."""
    manifest = replace(built.bundle.manifest, input_shape=(8, length))
    return SimpleNamespace(bundle=replace(built.bundle, manifest=manifest))


class Sensor:
    """A source whose samples a test sends one by one."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Any] = queue.Queue()

    def send(self, *items: Any) -> None:
        for item in items:
            self._queue.put(item)

    def end(self) -> None:
        self._queue.put(StopIteration)

    def __iter__(self) -> Iterator[Any]:
        while (item := self._queue.get(timeout=PATIENCE_S)) is not StopIteration:
            if isinstance(item, Exception):
                raise item
            yield item


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


IMAGES = np.random.default_rng(3).integers(0, 256, (7, 1, 8, 8), dtype=np.uint8)


@pytest.mark.parametrize("own", [False, True])
def test_every_window_is_decided_by_the_server_in_order(own: bool, built: dict[str, Any]) -> None:
    broker = MemoryBroker()
    made = built["paper"]
    with scripted_server(broker, made.bundle.id, lambda m, n: [decision_for(m)]) as seen:
        with client_of(broker, made) if own else started(broker, made) as client:
            if own:
                client.start()
            decisions = list(client.stream(array_windows(IMAGES), most=3, limits=BacklogLimits(9)))
    assert [each.number for each in decisions] == list(range(7))
    assert {(each.by, each.why, each.class_number) for each in decisions} == {("server", "", 1)}
    assert decisions[0].class_name == made.bundle.manifest.classes[1]
    assert np.allclose(decisions[0].probabilities, [0.1, 0.7, 0.2])
    assert (
        sum(len(m.tensors["activations"]) for m in seen) == 7 and max(len(m.tensors["activations"]) for m in seen) <= 3
    )
    assert client.status.counts["server"] == client.status.counts["seen"] == 7
    assert client.status.condition is Condition.DECIDING


def started(broker: MemoryBroker, built: Any) -> EdgeClient:
    return EdgeClient(built.bundle, MemoryTransport(broker, "d1"), device="d1", fleet="ward", resend_s=0.1)


@pytest.mark.parametrize(("profile", "by"), [("paper", "guide"), ("vanilla", "none"), ("hardened", "guide")])
def test_without_a_broker_the_guide_decides_or_nobody(profile: str, by: str, built: dict[str, Any]) -> None:
    broker = MemoryBroker()
    broker.stop()
    with client_of(broker, built[profile]) as client:
        decision = client.infer(IMAGES)
        streamed = list(client.stream(array_windows(IMAGES)))
    assert (decision.by, decision.why) == (by, "offline") and decision.streams == {}
    assert [(each.by, each.why) for each in streamed] == [(by, "offline")] * 7
    if by == "guide":
        assert decision.guide is not None and decision.classes.tolist() == decision.guide.tolist()
        assert np.allclose(decision.probabilities.sum(axis=1), 1)
        assert [each.class_number for each in streamed] == decision.classes.tolist()
        assert client.status.condition is Condition.GUIDED
    else:
        assert decision.classes.tolist() == [-1] * 7 and np.isnan(decision.probabilities).all()
        assert {(each.class_number, each.class_name) for each in streamed} == {(-1, "")}
        assert client.status.condition is Condition.UNDECIDED
    assert client.samples_sent == 0


def test_a_server_that_is_slow_gives_way_to_the_guide_and_a_late_reply_is_ignored(built: dict[str, Any]) -> None:
    broker, made = MemoryBroker(), built["paper"]
    held: list[Message] = []

    def answer(m: Message, n: int) -> list[Message]:
        held.append(m)
        return [] if m.step == held[0].step else [decision_for(held[0]), decision_for(m)]

    with scripted_server(broker, made.bundle.id, answer), started(broker, made) as client:
        began = time.monotonic()
        late = client.infer(IMAGES[:2], within_s=0.3)
        assert 0.3 <= time.monotonic() - began < 2.0
        assert (late.by, late.why) == ("guide", "late")
        again = client.infer(IMAGES[:5], within_s=5.0)
        assert again.by == "server" and len(again.classes) == 5


def test_a_client_is_back_with_the_server_as_soon_as_there_is_one(built: dict[str, Any]) -> None:
    broker, made = MemoryBroker(), built["paper"]
    sensor = Sensor()
    with client_of(broker, made) as client:
        stream = client.stream(sensor)
        sensor.send(*array_windows(IMAGES[:1]))
        assert next(stream).why in ("offline", "no-server")
        with scripted_server(broker, made.bundle.id, lambda m, n: [decision_for(m)]):
            asked = 0
            while True:
                sensor.send(*array_windows(IMAGES[:1]))
                asked += 1
                if next(stream).by == "server":
                    break
                assert asked < 200
            broker.stop()
            sensor.send(*array_windows(IMAGES[:1]))
            assert (last := next(stream)).by == "guide" and last.why == "offline"
            broker.start()
            sensor.send(*array_windows(IMAGES[:1]))
            assert next(stream).by == "server"
        stream.close()


def test_a_server_that_refuses_or_is_of_another_bundle_ends_nothing(built: dict[str, Any]) -> None:
    def refuse(m: Message, n: int) -> list[Message]:
        return [Message("refused", m.run, m.session, m.step, {"reason": "decision", "detail": "no"}, {})]

    broker, made = MemoryBroker(), built["paper"]
    with scripted_server(broker, made.bundle.id, refuse), started(broker, made) as client:
        assert (decision := client.infer(IMAGES)).by == "guide" and decision.why == "refused"
    broker = MemoryBroker()
    with scripted_server(broker, built["vanilla"].bundle.id, refuse) as seen, client_of(broker, made) as client:
        until(lambda: client.infer(IMAGES[:1]).why == "no-server")
        assert seen == []


def test_windows_that_must_not_be_used_are_counted_and_never_sent(built: dict[str, Any]) -> None:
    broker, made = MemoryBroker(), built["paper"]
    good = IMAGES[0].astype(np.float32) / 255
    nan, inf, wide, odd = good.copy(), good.copy(), good * 2, np.zeros((1, 9, 9), np.float32)
    nan[0, 3, 3], inf[0, 0, 0], wide[0, 0, 0] = np.nan, np.inf, 1.7
    source = [window for x in (good, nan, inf, wide, odd, good) for window in array_windows(x[None])]
    with (
        scripted_server(broker, made.bundle.id, lambda m, n: [decision_for(m)]) as seen,
        started(broker, made) as client,
    ):
        decisions = list(client.stream(source))
        assert [each.why for each in decisions] == ["", "not-finite", "not-finite", "range", "shape", ""]
        assert [each.by for each in decisions] == ["server", *["none"] * 4, "server"]
        assert sum(len(m.tensors["activations"]) for m in seen) == client.samples_sent == 2
        assert client.status.counts["refused"] == 4 and client.status.counts["refused.not-finite"] == 2
        list(client.stream(array_windows(nan[None])))
        assert client.status.condition is Condition.SENSOR_VALUES


def test_a_sensor_that_changes_its_rate_is_seen_and_its_windows_are_refused(built: dict[str, Any]) -> None:
    broker = MemoryBroker()
    made = signals(built["paper"])
    windowing = Windowing(8, channels=8, hz=100.0)
    slow = [Reading(number / 50, np.full(8, 0.5)) for number in range(16)]
    with EdgeClient(made.bundle, lambda: MemoryTransport(broker, "d1"), device="d1", fleet="ward") as client:
        decisions = list(client.stream(slow, windowing=windowing))
        assert [(each.by, each.why) for each in decisions] == [("none", "rate")] * 2
        assert client.status.condition is Condition.SENSOR_RATE and client.samples_sent == 0
        with pytest.raises(ConfigError, match="windows are 8x9"):
            client.stream(slow, windowing=Windowing(9, channels=8))


def test_a_silent_sensor_is_a_state_and_goes_on_when_it_is_back(built: dict[str, Any]) -> None:
    broker, made = MemoryBroker(), built["paper"]
    sensor, decided, conditions = Sensor(), queue.Queue[Any](), queue.Queue[Condition]()
    with scripted_server(broker, made.bundle.id, lambda m, n: [decision_for(m)]), client_of(broker, made) as client:
        client.start()
        client.status.listen(conditions.put)

        def work() -> None:
            for each in client.stream(sensor, silent_s=0.3):
                decided.put(each)

        worker = threading.Thread(target=work)
        worker.start()
        sensor.send(*array_windows(IMAGES[:1]))
        assert decided.get(timeout=PATIENCE_S).by == "server"
        while conditions.get(timeout=PATIENCE_S) is not Condition.SENSOR_SILENT:
            pass
        sensor.send(*array_windows(IMAGES[:1]))
        assert decided.get(timeout=PATIENCE_S).by == "server"
        while conditions.get(timeout=PATIENCE_S) is not Condition.DECIDING:
            pass
        sensor.end()
        worker.join(PATIENCE_S)
        assert not worker.is_alive()


def test_a_drivers_error_ends_the_stream_behind_its_last_window_without_its_text(built: dict[str, Any]) -> None:
    broker = MemoryBroker()
    sensor = Sensor()
    sensor.send(*array_windows(IMAGES[:2]), RuntimeError("pulse 0.123456"))
    with client_of(broker, built["paper"]) as client:
        stream = client.stream(sensor)
        assert [next(stream).number for _ in range(2)] == [0, 1]
        with pytest.raises(BatchError, match="RuntimeError") as caught:
            next(stream)
        assert "0.123456" not in str(caught.value)
        with pytest.raises(ConfigError, match="give a windowing"):
            list(client.stream([0.5]))


@pytest.mark.parametrize(
    ("when_full", "left", "dropped"), [("drop-oldest", [6, 7, 8, 9], 6), ("refuse", [0, 1, 2, 3], 6)]
)
def test_a_full_backlog_drops_and_counts(when_full: Any, left: list[int], dropped: int) -> None:
    backlog = Backlog(array_windows(np.zeros((10, 4))), limits=BacklogLimits(4, when_full))
    until(lambda: backlog.over)
    assert backlog.full and backlog.waiting == 4 and backlog.dropped == dropped
    assert [each.number for each in backlog.take(99)] == left and backlog.take(1) == []
    backlog.close()


def test_a_source_that_may_wait_does_and_loses_nothing() -> None:
    backlog = Backlog(array_windows(np.zeros((10, 4))), limits=BacklogLimits(4, "block"), silent_s=0.01)
    taken: list[int] = []
    while not (backlog.over and not backlog.waiting):
        backlog.wait(PATIENCE_S)
        assert backlog.waiting <= 4 and not (backlog.full and backlog.silent), "it is not the sensor that is silent"
        taken += [each.number for each in backlog.take(3)]
    assert taken == list(range(10)) and backlog.dropped == 0


def test_a_slow_broker_makes_nothing_grow(built: dict[str, Any]) -> None:
    broker, made = MemoryBroker(), built["paper"]
    release, most = threading.Event(), 8

    def answer(m: Message, n: int) -> list[Message]:
        assert release.wait(PATIENCE_S)
        return [decision_for(m)]

    fed = threading.Event()

    def source() -> Iterator[Any]:
        yield from array_windows(np.repeat(IMAGES[:1], 500, axis=0))
        fed.set()

    with scripted_server(broker, made.bundle.id, answer), client_of(broker, made, decision_s=PATIENCE_S) as client:
        client.start()
        stream = client.stream(source(), limits=BacklogLimits(most), most=2)
        worker_saw: list[int] = []
        worker = threading.Thread(target=lambda: worker_saw.extend(each.number for each in stream))
        worker.start()
        assert fed.wait(PATIENCE_S), "the sensor was never held up"
        release.set()
        worker.join(PATIENCE_S)
    assert len(worker_saw) <= most + 2 + 8 and worker_saw == sorted(worker_saw) and worker_saw[-1] == 499
    assert client.status.counts["dropped"] == 500 - len(worker_saw)


def test_windows_are_gathered_between_connections(built: dict[str, Any]) -> None:
    broker, made = MemoryBroker(), built["paper"]
    transports: list[MemoryTransport] = []

    def make() -> MemoryTransport:
        transports.append(MemoryTransport(broker, "d1"))
        return transports[-1]

    sensor = Sensor()
    options: Any = {"device": "d1", "fleet": "ward", "budget": Budget(connect_every_s=3600.0)}
    with scripted_server(broker, made.bundle.id, lambda m, n: [decision_for(m)]) as seen:
        with EdgeClient(made.bundle, make, **options) as client:
            decided = queue.Queue[Any]()
            stream = client.stream(sensor, limits=BacklogLimits(3, "block"))
            worker = threading.Thread(target=lambda: [decided.put(each) for each in stream])
            worker.start()
            sensor.send(*array_windows(IMAGES[:2]))
            until(lambda: client.status.condition is Condition.SLEEPING)
            assert transports == [] and decided.empty()
            sensor.send(*array_windows(IMAGES[2:3]))  # full: it connects before its time
            assert [decided.get(timeout=PATIENCE_S).by for _ in range(3)] == ["server"] * 3
            until(lambda: not client.station.exchange.is_open)
            sensor.send(*array_windows(IMAGES[3:5]))
            sensor.end()
            assert [decided.get(timeout=PATIENCE_S).by for _ in range(2)] == ["server"] * 2
            worker.join(PATIENCE_S)
    assert len(transports) == 2 and [len(m.tensors["activations"]) for m in seen] == [3, 2]


def test_the_bytes_of_an_hour_hold_over_a_restart_and_a_new_run(built: dict[str, Any]) -> None:
    made = built["paper"]
    state = MemoryState(FrontState(0, dict(made.bundle.initial)))
    now = [1000.0]
    first = Allowance(6000, state, lambda: now[0])
    assert first.left == 1000 and first.wait_s(1000) == 0
    first.spend(900)
    again = Allowance(6000, state, lambda: now[0])
    assert again.left == 100 and again.wait_s(600) == pytest.approx(500 / (5000 / 3600))
    state.begin_run("run-2", state.front)
    assert again.left == 100, "a new run brings no bytes"
    now[0] -= 500
    assert again.left == 100, "a clock that is set back brings nothing"
    now[0] += 500 + 360
    assert again.left == pytest.approx(600, abs=1)
    now[0] += 1e6
    assert again.left == 1000 and again.wait_s(5000) == 0, "a large message waits for a full bucket"
    again.spend(5000)
    assert again.left == -4000 and again.wait_s(10) > 2800
    sent, size = 0, 250
    start = now[0]
    while now[0] - start < 3600 * 3:
        if again.wait_s(size) == 0:
            again.spend(size)
            sent += size
        now[0] += 10
    assert sent <= 3 * 6000


def test_when_the_bytes_are_spent_the_guide_decides(built: dict[str, Any]) -> None:
    broker, made = MemoryBroker(), built["paper"]
    with scripted_server(broker, made.bundle.id, lambda m, n: [decision_for(m)]) as seen:
        with client_of(broker, made, budget=Budget(max_bytes_per_hour=30_000)) as client:
            client.start()
            decisions = [client.infer(IMAGES[:1]) for _ in range(30)]
            whose = [each.by for each in decisions]
            assert whose[0] == "server" and whose == sorted(whose, reverse=True) and decisions[-1].why == "budget"
            assert client.traffic.bytes_sent <= 5_000
            list(client.stream(array_windows(IMAGES[:1])))
            assert client.status.condition is Condition.SAVING
    assert len(seen) == whose.count("server") == client.samples_sent


def test_a_disk_that_refuses_is_an_error_of_its_own(built: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    broker, made = MemoryBroker(), built["paper"]
    with scripted_server(broker, made.bundle.id, lambda m, n: [decision_for(m)]), started(broker, made) as client:

        def refuse(counters: Any) -> None:
            raise StateError("the disk is full: free some space")

        monkeypatch.setattr(client.state, "note", refuse)
        with pytest.raises(StateError, match="free some space"):
            list(client.stream(array_windows(IMAGES)))


def test_the_log_is_json_and_says_nothing_of_a_patient(built: dict[str, Any]) -> None:
    broker, names = MemoryBroker(), ("sinus-rhythm", "atrial-flutter", "fibrillation")
    manifest = replace(built["paper"].bundle.manifest, classes=names)
    made = SimpleNamespace(bundle=replace(built["paper"].bundle, manifest=manifest))
    telling = np.float32(0.734567)
    x = np.full((2, 1, 8, 8), telling)
    probabilities = np.tile(np.array([0.111213, 0.777879, 0.110908], np.float32), (2, 1))

    def answer(m: Message, n: int) -> list[Message]:
        count = len(m.tensors["activations"])
        tensors = {"probabilities": probabilities[:count], "class.fused": np.ones(count, np.int64)}
        return [Message("decision", m.run, m.session, m.step, {}, tensors)]

    text = io.StringIO()
    handler = configure("debug", text)
    try:
        with scripted_server(broker, made.bundle.id, answer) as seen, client_of(broker, made) as client:
            client.start()
            client.infer(x)
            list(client.stream([*array_windows(x), *array_windows(np.full((1, 1, 8, 8), 1.734567))]))
            broker.forbid(topics.up_step("ward", "d1"))
            client.infer(x)
            with pytest.raises(TransportError):
                client.ask(x)
    finally:
        logging.getLogger("edge_sdk").removeHandler(handler)
        logging.getLogger("edge_sdk").propagate = True
    lines = [json.loads(line) for line in text.getvalue().splitlines()]
    events = {line["event"] for line in lines}
    assert {"joined", "decided", "state", "refused"} <= events
    assert all(line["level"] and line["time"].endswith("Z") for line in lines)
    decided = next(line for line in lines if line["event"] == "decided")
    assert decided["bytes_sent"] > 0 and decided["samples"] == 2 and decided["seconds"] >= 0
    secrets = [telling, *probabilities[0], *seen[0].tensors["activations"].reshape(-1)[:50]]
    for value in {f"{value:.4g}" for value in secrets if value not in (0, 1)}:
        assert value not in text.getvalue(), value
    assert not any(name in text.getvalue() for name in names)
