"""Bad days of a fleet in one process: devices that vanish, come late or are slow, clocks that jump, chunks that get
lost, outboxes that run full, activations that are no numbers. What must not change does not, and the run ends well."""

from __future__ import annotations

import ast
import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_sdk
import server_sdk
from edge_sdk import topics
from edge_sdk.batch import Samples
from edge_sdk.body import from_body, to_body
from edge_sdk.chunks import cut
from edge_sdk.client import EdgeClient
from edge_sdk.errors import OutboxFullError, RefusedError, WireError
from edge_sdk.memory_transport import MemoryBroker, MemoryTransport
from edge_sdk.state import MemoryState, OutboxLimits
from edge_sdk.training import follow
from edge_sdk.transport import Received
from edge_sdk.wire import Assembler, Limits, Message, decode_frame
from server_sdk.checkpoint import Checkpoint, Checkpoints
from server_sdk.errors import CheckpointError
from server_sdk.journal import Durability, Journal
from server_sdk.plan import TrainingPlan
from server_sdk.screening import Screen
from server_sdk.segments import Damage, Record, scan
from server_sdk.service import TrainingService

Draw = Callable[[int, int], Samples]
Event = dict[str, Any]
PATIENCE_S = 60.0
PLAN = TrainingPlan(devices=2, rounds=12, batch=6)


class Gate(MemoryTransport):
    """A server's transport that receives nothing while it is shut."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker, "server")
        self.opened = threading.Event()
        self.opened.set()

    def receive(self, timeout_s: float) -> Received | None:
        if not self.opened.wait(timeout_s):
            return None
        return super().receive(timeout_s)


class Lossy(MemoryTransport):
    """Loses one chunk of the first training step, once."""

    def __init__(self, broker: MemoryBroker, client_id: str, lost: int) -> None:
        super().__init__(broker, client_id)
        self._lost: int | None = lost
        self.sent: list[int] = []

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        frame = decode_frame(payload, Limits())
        if frame.kind == "train":
            self.sent.append(frame.index)
            if self._lost is not None and frame.index == self._lost % frame.count:
                self._lost = None
                return
        super().publish(topic, payload, retain=retain)


@dataclass
class Watch:
    """What happened so far; whoever waits for something is woken when it has happened."""

    seen: list[Any] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, what: Any) -> None:
        with self._changed:
            self.seen.append(what)
            self._changed.notify_all()

    def until(self, wanted: Callable[[Any], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: any(map(wanted, self.seen)), PATIENCE_S), "it never happened"


class Fleet:
    """A service with its journal, devices in threads, and a spy who reads all that devices and server say."""

    def __init__(self, built: Any, samples: Draw, folder: Path, plan: TrainingPlan = PLAN, **options: Any) -> None:
        self.built, self.samples, self.folder, self.plan = built, samples, folder, plan
        self.broker, self.events, self.said = MemoryBroker(), Watch(), Watch()
        self.figures: dict[str, Any] = {}
        self.clients: dict[str, EdgeClient] = {}
        self.errors: list[Exception] = []
        self.trainer = built.trainer(plan.rounds)
        self.gate = Gate(self.broker)
        self._journal = Journal(folder, Durability(checkpoint_every=options.pop("every", 50), keep_log=True))
        self._service = TrainingService(
            built.bundle,
            self.trainer,
            self.gate,
            plan,
            journal=self._journal,
            fleet="ward",
            on_event=self.events,
            **({"idle_s": PATIENCE_S, "deadline_s": PATIENCE_S} | options),
        )
        self._spy = MemoryTransport(self.broker, "spy")
        self._threads: list[threading.Thread] = []
        self._over = threading.Event()
        self._spy.open(None)
        for direction in ("up", "down"):
            self._spy.subscribe(topics.every_step("ward").replace("/up/", f"/{direction}/"))
        self._spying = threading.Thread(target=self._listen)
        self._spying.start()

    def serve(self) -> None:
        def work() -> None:
            self.figures = self._service.run()

        self.start(work)

    def start(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except Exception as exc:
                self.errors.append(exc)

        self._threads.append(threading.Thread(target=guarded))
        self._threads[-1].start()

    def client(self, name: str, **options: Any) -> EdgeClient:
        transport = options.pop("transport", None) or MemoryTransport(self.broker, name)
        options = {"resend_s": 0.5, "give_up_s": PATIENCE_S} | options
        self.clients[name] = EdgeClient(self.built.bundle, transport, device=name, fleet="ward", **options)
        return self.clients[name]

    def follow(self, name: str, on_event: Callable[[Event], None] = lambda event: None, **options: Any) -> None:
        """Start a device that takes part until the end; its samples depend on its name alone."""

        def work() -> None:
            with self.client(name, **options) as client:
                follow(client, self.samples(30, int(name[1:])), None, seed=0, on_event=on_event)

        self.start(work)

    def end(self) -> None:
        """Wait until all have ended well."""
        for thread in self._threads:
            thread.join(PATIENCE_S)
        alive = any(thread.is_alive() for thread in self._threads)
        self.close()
        assert not alive and self.errors == []

    def close(self) -> None:
        self._service.stop()
        self.gate.opened.set()
        self._over.set()
        for thread in (*self._threads, self._spying):
            thread.join(PATIENCE_S)
        self._journal.close()
        self._spy.close()

    def rounds(self) -> list[Event]:
        return [event for event in self.events.seen if event["event"] == "round"]

    def trained(self) -> list[tuple[Any, ...]]:
        """Key of every step in the order of training."""
        return [tuple(key) for record in self.records("round") for key in record.fields["steps"]]

    def records(self, kind: str) -> list[Record]:
        items = list(scan(self.folder / "log"))
        assert not any(isinstance(item, Damage) for item in items)
        return [item[0] for item in items if not isinstance(item, Damage) and item[0].kind == kind]

    def same_fronts(self, one: str, other: str) -> bool:
        tensors = self.clients[other].front.tensors
        return all(np.array_equal(value, tensors[name]) for name, value in self.clients[one].front.tensors.items())

    def _listen(self) -> None:
        assembler = Assembler(Limits(), max_partial=64)
        while not self._over.is_set():
            received = self._spy.receive(0.05)
            if received is not None:
                received.acknowledge()
                with contextlib.suppress(WireError):
                    message = assembler.add(decode_frame(received.payload, Limits()))
                    if message is not None:
                        self.said((topics.parse(received.topic).device, message))


Make = Callable[..., Fleet]


@pytest.fixture
def fleet(built: dict[str, Any], samples: Draw, tmp_path: Path) -> Iterator[Make]:
    made: list[Fleet] = []

    def make(plan: TrainingPlan = PLAN, folder: str = "run", **options: Any) -> Fleet:
        made.append(Fleet(built["vanilla"], samples, tmp_path / folder, plan, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def stop_at(number: int, until: Callable[[], None]) -> Callable[[Event], None]:
    """A device that does nothing after its step of that round until something has happened."""
    return lambda event: until() if event["event"] == "step" and event["round"] == number else None


# --- absent, late, slow ---


@pytest.mark.parametrize("fronts", ["own", "shared"])
def test_a_device_that_was_away_longer_than_the_deadline_catches_up(fronts: str, fleet: Make, samples: Draw) -> None:
    ward = fleet(replace(PLAN, fronts=fronts, synchronise_every=3), deadline_s=1.0)
    ward.serve()
    back = threading.Event()

    def is_back() -> None:
        assert back.wait(PATIENCE_S)
        ward.said.until(lambda said: said[0] == "d0" and said[1].kind == "train" and said[1].step > gone_at)

    ward.follow("d1", stop_at(8, is_back))
    transport = MemoryTransport(ward.broker, "d0")
    away = ward.client("d0", transport=transport)
    away.start()
    batch = samples(6, 0)
    for _ in range(2):
        assert away.train_step(batch.x, batch.y) is not None
    gone_at = 2
    transport.kill()
    ward.events.until(lambda event: event["event"] == "round" and event["round"] == 8)
    assert [event["devices"] for event in ward.rounds()[2:]] == [["d1"]] * 6, "the other one goes on"
    assert ward.rounds()[2]["absent"] == ["d0"] and not any(event["absent"] for event in ward.rounds()[3:])
    back.set()
    ward.follow("d0", state=away.state)
    ward.end()
    assert ward.figures["rounds"] == 12 and "d0" in ward.rounds()[8]["devices"], "it takes part again at once"
    kinds = [message.kind for name, message in ward.said.seen if name == "d0" and message.step > gone_at]
    up = [kind for kind in kinds if kind in ("front", "train")]
    assert up[0] == ("front" if fronts == "shared" else "train"), "the current mean comes before its next step"
    assert ward.same_fronts("d0", "d1") == (fronts == "shared")
    trained = ward.trained()
    assert len(trained) == len(set(trained)) == sum(client.steps for client in ward.clients.values())


@pytest.mark.parametrize("fronts", ["own", "shared"])
def test_a_late_joiner_takes_part_from_then_on(fronts: str, fleet: Make) -> None:
    ward = fleet(replace(PLAN, fronts=fronts, synchronise_every=3))
    ward.serve()
    joined = stop_at(6, lambda: ward.said.until(lambda said: said[0] == "d2" and said[1].kind == "train"))
    for name in ("d0", "d1"):
        ward.follow(name, joined)
    ward.events.until(lambda event: event["event"] == "round" and event["round"] == 6)
    ward.follow("d2")
    ward.end()
    present = [event["devices"] for event in ward.rounds()]
    assert present == [["d0", "d1"]] * 6 + [["d0", "d1", "d2"]] * 6
    assert ward.clients["d2"].steps == 6 and ward.figures["devices"] == ["d0", "d1", "d2"]
    assert ward.same_fronts("d0", "d2") == (fronts == "shared")


def test_a_slow_device_holds_nobody_up_and_none_of_its_steps_is_lost(fleet: Make) -> None:
    ward = fleet(deadline_s=0.2)
    ward.serve()

    def dawdle(event: Event) -> None:
        if event["event"] == "step":
            reached = min(event["round"] + 3, PLAN.rounds)
            ward.events.until(lambda other: other["event"] == "round" and other["round"] >= reached)

    ward.follow("d0")
    ward.follow("d1", dawdle)
    ward.end()
    steps = {name: [key for key in ward.trained() if key[0] == name] for name in ("d0", "d1")}
    assert len(ward.rounds()) == 12 and len(steps["d1"]) == ward.clients["d1"].steps <= 4
    assert any(event["absent"] == ["d1"] for event in ward.rounds())
    assert len(steps["d0"]) == ward.clients["d0"].steps >= 8


def test_a_device_that_comes_back_after_the_last_round_ends_with_the_last_mean(fleet: Make, samples: Draw) -> None:
    ward = fleet(TrainingPlan(3, 4, 6, fronts="shared", synchronise_every=2), deadline_s=1.0)
    ward.serve()
    back = threading.Event()

    def hold(event: Event) -> None:
        if event["event"] == "step" and event["round"] == 4:
            assert back.wait(PATIENCE_S)

    ward.follow("d1")
    ward.follow("d2", hold)
    transport = MemoryTransport(ward.broker, "d0")
    away = ward.client("d0", transport=transport)
    away.start()
    batch = samples(6, 0)
    assert away.train_step(batch.x, batch.y) is not None
    transport.kill()
    ward.events.until(lambda event: event["event"] == "round" and event["round"] == 4)
    ward.follow("d0", state=away.state)
    ward.said.until(lambda said: said[0] == "d0" and said[1].kind == "front")
    back.set()
    ward.end()
    assert [event["devices"] for event in ward.rounds()][1:] == [["d1", "d2"]] * 3
    assert ward.same_fronts("d1", "d2") and ward.same_fronts("d0", "d1")


# --- disks ---


def test_a_disk_that_takes_records_and_no_checkpoints_is_said_once(
    fleet: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ward = fleet(every=3)
    write, tried, full = Checkpoints.write, 0, True

    def refuse(self: Checkpoints, checkpoint: Checkpoint) -> Path:
        nonlocal tried
        tried += 1
        if tried > 1 and full:
            raise CheckpointError("no space left: free some")
        return write(self, checkpoint)

    def free() -> None:
        nonlocal full
        full = False

    monkeypatch.setattr(Checkpoints, "write", refuse)
    ward.serve()
    ward.follow("d0", stop_at(9, free))
    ward.follow("d1")
    ward.end()
    assert [event["ok"] for event in ward.events.seen if event["event"] == "disk"] == [False, True]
    assert tried <= 7, "the first, the last, and one at most every 3 rounds"


# --- clocks ---


def test_a_clock_that_jumps_changes_no_bit(fleet: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole_run(folder: str) -> Fleet:
        ward = fleet(replace(PLAN, fronts="shared", synchronise_every=4), folder)
        ward.serve()
        for name in ("d0", "d1"):
            ward.follow(name)
        ward.end()
        return ward

    steady = whole_run("steady")
    now, generator = time.time(), random.Random(0)
    years = 365.25 * 24 * 3600
    monkeypatch.setattr(time, "time", lambda: now + generator.uniform(-30, 30) * years)
    monkeypatch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))
    jumping = whole_run("jumping")
    assert abs(time.time() - time.time()) > 3600
    weights = jumping.trainer.state_dict()
    assert all(np.array_equal(value, weights[name]) for name, value in steady.trainer.state_dict().items())
    for name, client in steady.clients.items():
        tensors = jumping.clients[name].front.tensors
        assert all(np.array_equal(value, tensors[key]) for key, value in client.front.tensors.items())
    assert jumping.figures["seconds"] < PATIENCE_S


ALLOWED_CLOCKS = {
    "report.py": "the date of an audit, for its reader",
    "logs.py": "the time of a record, for its reader",
    "budget.py": "bytes of an hour, which no monotonic clock counts over a restart",
}
"""File -> why it may look at the wall clock: it is shown to people, or must outlive the machine's boot."""

_WALL_CLOCKS = {
    "time": {"time", "time_ns", "localtime", "gmtime", "ctime", "asctime", "strftime", "clock_gettime"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
}


def wall_clocks(source: str) -> list[str]:
    """Uses of a clock that an operator or NTP can set, as ``module.name``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
            found += [f"time.{each.name}" for each in node.names if each.name in _WALL_CLOCKS["time"]]
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            found += [f"{name}.{node.attr}"] if node.attr in _WALL_CLOCKS.get(name, ()) else []
    return found


def test_no_code_path_looks_at_the_wall_clock() -> None:
    assert (
        wall_clocks("import time\ntime.time()\nfrom time import time\nfrom time import monotonic") == ["time.time"] * 2
    )
    assert wall_clocks("import datetime\ndatetime.datetime.now()\ntime.monotonic()") == ["datetime.now"]
    files = [path for package in (edge_sdk, server_sdk) for path in Path(str(package.__file__)).parent.rglob("*.py")]
    using = {path.name: found for path in files if (found := wall_clocks(path.read_text()))}
    assert len(files) > 50 and using.keys() == ALLOWED_CLOCKS.keys(), using


# --- chunks ---


@pytest.mark.parametrize("lost", [0, 1, -2])
def test_only_the_chunk_that_was_lost_is_sent_again(lost: int, fleet: Make, samples: Draw) -> None:
    ward = fleet(replace(PLAN, devices=1, rounds=1))
    ward.serve()
    transport = Lossy(ward.broker, "d0", lost)
    ward.follow("d0", transport=transport, chunk_bytes=1024, resend_s=30)
    ward.end()
    client = ward.clients["d0"]
    chunks = max(transport.sent) + 1
    assert chunks >= 4 and transport.sent == [*range(chunks), lost % chunks]
    assert [message.fields["chunks"] for _, message in ward.said.seen if message.kind == "missing"] == [[lost % chunks]]
    assert client.traffic.resent == 0 and client.steps == 1


def test_a_lost_last_chunk_costs_one_repeat(fleet: Make) -> None:
    ward = fleet(replace(PLAN, devices=1, rounds=1))
    ward.serve()
    transport = Lossy(ward.broker, "d0", -1)
    ward.follow("d0", transport=transport, chunk_bytes=1024, resend_s=0.2)
    ward.end()
    assert ward.clients["d0"].traffic.resent >= 1 and ward.clients["d0"].steps == 1 == len(ward.trained())


# --- what the server refuses ---


class Stranger:
    """Sends steps by hand."""

    def __init__(self, ward: Fleet, name: str = "x") -> None:
        self._ward, self._name = ward, name
        self._transport = MemoryTransport(ward.broker, name)
        self._transport.open(None)
        self._down = MemoryTransport(ward.broker, f"{name}-down")
        self._down.open(None)
        self._down.subscribe(topics.down_step("ward", name))

    def send(self, message: Message, body: bytes | None = None) -> None:
        frames = cut(message, to_body(message) if body is None else body, 65536)
        for frame in frames:
            self._transport.publish(topics.up_step("ward", self._name), frame)

    def answer(self) -> Message:
        received = self._down.receive(PATIENCE_S)
        assert received is not None, "no answer"
        received.acknowledge()
        message = Assembler(Limits()).add(decode_frame(received.payload, Limits()))
        assert message is not None
        return message


def step_of(ward: Fleet, run: str, step: int, value: float) -> Message:
    shape = (3, *ward.built.bundle.manifest.cut_shape)
    tensors: dict[str, Any] = {"activations": np.full(shape, value, np.float32), "labels": np.arange(3)}
    return Message("train", run, "s", step, {"front": 0}, tensors)


def test_steps_that_cannot_be_trained_are_refused_with_a_reason_and_counted(fleet: Make) -> None:
    ward = fleet(replace(PLAN, devices=1, rounds=2), screen=Screen(max_norm=100.0))
    ward.serve()
    ward.events.until(lambda event: event["event"] == "waiting")
    run, stranger = ward._service.run_id, Stranger(ward)
    stranger.send(step_of(ward, "a run that is over", 1, 0.5))
    unknown = stranger.answer()
    assert (unknown.kind, unknown.step, unknown.fields["reason"]) == ("refused", 1, "run")
    assert run in unknown.fields["detail"] and "start the device again" in unknown.fields["detail"]
    for step, value in ((2, 1e9), (3, 50.0)):
        stranger.send(step_of(ward, run, step, value))
        refused = stranger.answer()
        assert (refused.kind, refused.step, refused.fields["reason"]) == ("refused", step, "range")
    damaged = step_of(ward, run, 4, 0.5)
    for value in (np.nan, np.inf, -np.inf):
        body = to_body(damaged).replace(np.float32(0.5).tobytes(), np.float32(value).tobytes(), 1)
        stranger.send(damaged, body)
        refused = stranger.answer()
        assert (refused.kind, refused.step, refused.fields["reason"]) == ("refused", 4, "nonfinite")
    ward.follow("d0")
    ward.end()
    assert ward.figures["rejected"] == {"run": 1, "range": 2, "nonfinite": 3}
    assert {key[0] for key in ward.trained()} == {"d0"}


def test_activations_above_the_norm_are_clipped_and_reported(fleet: Make) -> None:
    ward = fleet(replace(PLAN, devices=1, rounds=2), screen=Screen(max_norm=1.0, when_large="clip"))
    ward.serve()
    ward.follow("d0")
    ward.end()
    assert [event["clipped"] for event in ward.rounds()] == [6, 6] and ward.figures["rejected"] == {}


def test_a_device_whose_activations_are_refused_ends_with_the_reason(fleet: Make, samples: Draw) -> None:
    ward = fleet(replace(PLAN, devices=1, rounds=1), screen=Screen(max_norm=1e-3))
    ward.serve()
    batch = samples(6, 0)
    with ward.client("d0") as client:
        with pytest.raises(RefusedError, match=r"beyond the norm 0\.001: the front has diverged") as caught:
            client.train_step(batch.x, batch.y)
        assert caught.value.reason == "range" and client.front.version == 0 and client.state.outbox == ()
    ward.close()
    assert ward.figures["rejected"] == {"range": 1} and ward.trained() == []


# --- the outbox ---


FROZEN = TrainingPlan(devices=1, rounds=5, batch=6, fronts="frozen")


def storing(ward: Fleet, samples: Draw, when_full: Any) -> tuple[EdgeClient, list[tuple[Any, Any, int]]]:
    """A client with room for three steps in flight, of which the server takes none, and ten batches to store."""
    ward.gate.opened.clear()
    ward.serve()
    state = MemoryState(
        EdgeClient(ward.built.bundle, ward.gate, device="d0").front, OutboxLimits(3, 1 << 20, when_full)
    )
    train = samples(60, 0)
    batches = [(train.x[first : first + 6], train.y[first : first + 6], first) for first in range(0, 60, 6)]
    return ward.client("d0", state=state, resend_s=0.2), batches


def finish(client: EdgeClient) -> None:
    """What a device does after its last sample."""
    client.flush()
    while client.plan.status not in ("evaluating", "finished"):
        client.listen(1.0)
    client.tell(status="done", round=client.plan.rounds)


def stored(ward: Fleet) -> list[int]:
    """Number of the first sample of each step in the log."""
    return [from_body(record.body).fields["first"] for record in ward.records("step")]


def test_an_outbox_that_blocks_waits_and_loses_nothing(fleet: Make, samples: Draw) -> None:
    ward = fleet(FROZEN)
    client, batches = storing(ward, samples, "block")

    def work() -> None:
        with client:
            for x, y, first in batches:
                client.store(x, y, first=first, total=60)
            finish(client)

    ward.start(work)
    ward.said.until(lambda said: said[1].kind == "store" and said[1].step == 3)
    assert len(client.state.outbox) <= 3
    ward.gate.opened.set()
    ward.end()
    assert stored(ward) == list(range(0, 60, 6)) and "dropped" not in client.state.counters
    assert ward.figures["rounds"] == 5 and client.sent == 60


def test_an_outbox_that_refuses_says_so_and_goes_on_when_there_is_room(fleet: Make, samples: Draw) -> None:
    ward = fleet(FROZEN)
    client, batches = storing(ward, samples, "refuse")
    with client:
        for x, y, first in batches[:3]:
            client.store(x, y, first=first, total=60)
        with pytest.raises(OutboxFullError, match="3 steps wait for the server"):
            client.store(batches[3][0], batches[3][1], first=18, total=60)
        assert client.sent == 18 and len(client.state.outbox) == 3
        ward.gate.opened.set()
        for x, y, first in batches[3:]:
            client.flush()
            client.store(x, y, first=first, total=60)
        finish(client)
    ward.end()
    assert stored(ward) == list(range(0, 60, 6)) and ward.figures["rounds"] == 5


def test_an_outbox_that_drops_counts_what_it_drops_and_the_run_finishes(fleet: Make, samples: Draw) -> None:
    ward = fleet(FROZEN, deadline_s=0.5)
    client, batches = storing(ward, samples, "drop-oldest")
    with client:
        ward.broker.stop()
        for x, y, first in batches:
            client.store(x, y, first=first, total=60)
        assert client.state.counters["dropped"] == 7 and client.sent == 60
        left = {step.step for step in client.state.outbox}
        assert len(left) == 3 and client._exchange.waiting == left, "what gave way takes no memory"
    ward.broker.start()
    ward.gate.opened.set()
    with ward.client("d0", state=client.state) as again:  # what the first one had queued for the broker went with it
        again.resume()
        finish(again)
    ward.end()
    assert stored(ward) == [42, 48, 54] and ward.figures["rounds"] == 5


def test_a_full_outbox_of_an_earlier_life_blocks_only_until_it_is_answered(fleet: Make, samples: Draw) -> None:
    ward = fleet(FROZEN)
    client, batches = storing(ward, samples, "block")
    with client:
        ward.broker.stop()
        for x, y, first in batches[:3]:
            client.store(x, y, first=first, total=60)
    ward.broker.start()
    ward.gate.opened.set()

    def work() -> None:
        with ward.client("d0", state=client.state) as again:
            for x, y, first in batches[3:]:
                again.store(x, y, first=first, total=60)
            finish(again)

    ward.start(work)
    ward.end()
    assert sorted(stored(ward)) == list(range(0, 60, 6))
