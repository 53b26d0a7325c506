"""The whole run in one process over the in-memory broker: devices in threads, the service in another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk import topics
from edge_sdk.batch import Samples
from edge_sdk.client import EdgeClient
from edge_sdk.errors import RefusedError, TransportError
from edge_sdk.memory_transport import MemoryBroker, MemoryTransport
from edge_sdk.training import follow
from edge_sdk.wire import Assembler, Limits, Message, decode_frame, encode
from server_sdk.errors import ServerError, TrainingError
from server_sdk.journal import Durability, Journal
from server_sdk.plan import TrainingPlan
from server_sdk.rates import RateLimits
from server_sdk.service import TrainingService

Draw = Callable[[int, int], Samples]


@dataclass
class Run:
    """What a finished run left."""

    figures: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    fronts: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)
    rejected: dict[str, int] = field(default_factory=dict)


def train(
    built: Any,
    samples: Draw,
    plan: TrainingPlan,
    *,
    seed: int = 0,
    foe: Callable[[MemoryBroker], None] | None = None,
) -> Run:
    broker, run = MemoryBroker(), Run()
    trainer = built.trainer(plan.rounds)
    service = TrainingService(
        built.bundle,
        trainer,
        MemoryTransport(broker, "server"),
        plan,
        fleet="ward",
        idle_s=20,
        on_event=run.events.append,
    )

    def serve() -> None:
        try:
            run.figures = service.run()
        except Exception as exc:
            run.errors.append(exc)

    def device(number: int) -> None:
        client = EdgeClient(
            built.bundle,
            MemoryTransport(broker, f"d{number}"),
            device=f"d{number}",
            fleet="ward",
            resend_s=0.5,
        )
        try:
            with client:
                follow(client, samples(30, number), samples(9, 50 + number), seed=seed, measure_clean=True)
            run.fronts[f"d{number}"] = dict(client.front.tensors)
        except Exception as exc:
            run.errors.append(exc)

    threads = [threading.Thread(target=serve)]
    threads += [threading.Thread(target=device, args=(number,)) for number in range(plan.devices)]
    for thread in threads:
        thread.start()
    if foe is not None:
        foe(broker)
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    run.weights = trainer.state_dict()
    run.rejected = dict(service.rejected)
    return run


PLAN = TrainingPlan(devices=2, rounds=12, batch=6, evaluate_every=5)


@pytest.mark.parametrize("profile", ["vanilla", "paper"])
def test_a_run_learns_and_accounts_for_every_step(profile: str, built: dict[str, Any], samples: Draw) -> None:
    run = train(built[profile], samples, PLAN)
    assert run.errors == []
    rounds = [event for event in run.events if event["event"] == "round"]
    assert [event["round"] for event in rounds] == list(range(1, 13))
    assert all(event["devices"] == ["d0", "d1"] for event in rounds)
    assert rounds[-1]["loss"] < 0.6 * rounds[0]["loss"]
    evaluations = [event["round"] for event in run.events if event["event"] == "evaluation"]
    assert evaluations == [5, 10, 12]
    final = run.figures["evaluation"]
    assert run.figures["rounds"] == 12 and run.figures["steps"] == 24 and final["samples"] == 18
    assert run.figures["devices"] == ["d0", "d1"] and run.figures["bytes_per_sample"] > 0
    streams = {"vanilla": {"attacked"}, "paper": {"attacked", "recovered", "fused"}}
    assert set(final["streams"]) == streams[profile]
    assert ("guide_accuracy" in final) == (profile == "paper")


def test_the_same_seed_gives_the_same_bits_on_server_and_devices(built: dict[str, Any], samples: Draw) -> None:
    first, second = train(built["paper"], samples, PLAN), train(built["paper"], samples, PLAN)
    assert all(np.array_equal(value, second.weights[name]) for name, value in first.weights.items())
    for device, tensors in first.fronts.items():
        assert all(np.array_equal(value, second.fronts[device][name]) for name, value in tensors.items())
    other = train(built["paper"], samples, PLAN, seed=1)
    assert not np.array_equal(first.fronts["d0"]["p.conv1.weight"], other.fronts["d0"]["p.conv1.weight"])
    assert not np.array_equal(first.fronts["d0"]["p.conv1.weight"], first.fronts["d1"]["p.conv1.weight"])


def test_hostile_bytes_change_nothing(built: dict[str, Any], samples: Draw) -> None:
    def foe(broker: MemoryBroker) -> None:
        transport = MemoryTransport(broker, "foe")
        transport.open(None)
        for payload in (b"", b"\xff" * 64, b"\x9f" * 500, b"\xbb" + b"\xff" * 8):
            for topic in (
                topics.up_step("ward", "d0"),
                topics.up_state("ward", "d1"),
                topics.up_step("ward", "x"),
            ):
                transport.publish(topic, payload)
        wrong = {"activations": np.zeros((2, 3), np.float32), "labels": np.zeros(2, np.int64)}
        (frame,) = encode(Message("train", "no such run", "s", 1, {"front": 0}, wrong))
        transport.publish(topics.up_step("ward", "x"), frame)
        lying = {"manifest": "m", "status": "training", "evaluation": {"samples": -1}}
        (frame,) = encode(Message("state", "", "s", 0, lying, {}))
        transport.publish(topics.up_state("ward", "x"), frame)
        transport.close()

    quiet, attacked = train(built["vanilla"], samples, PLAN), train(built["vanilla"], samples, PLAN, foe=foe)
    assert attacked.errors == []
    assert sum(attacked.rejected.values()) >= 12 and attacked.rejected["run"] == 1 and attacked.rejected["schema"] >= 1
    assert all(np.array_equal(value, attacked.weights[name]) for name, value in quiet.weights.items())


class Device:
    """A hand-driven device: sends what it is told and collects replies."""

    def __init__(self, broker: MemoryBroker, built: Any, name: str = "d0") -> None:
        self.built, self.name = built, name
        self.transport = MemoryTransport(broker, name)
        self.transport.open(None)
        self.transport.subscribe(topics.down_step("ward", name))
        self.transport.subscribe(topics.down_model("ward"))
        self.run = self.receive().run
        self.tell("online")

    def tell(self, status: str, manifest: str | None = None) -> None:
        fields = {"manifest": manifest or self.built.bundle.id, "status": status}
        (frame,) = encode(Message("state", "", "s", 0, fields, {}))
        self.transport.publish(topics.up_state("ward", self.name), frame, retain=True)

    def send(self, step: int, kind: str = "train", value: float = 0.5) -> None:
        tensors: dict[str, Any] = {
            "activations": np.full((3, *self.built.bundle.manifest.cut_shape), value, np.float32)
        }
        if kind == "train":
            tensors["labels"] = np.arange(3, dtype=np.int64)
        for frame in encode(Message(kind, self.run, "s", step, {"front": 0}, tensors)):
            self.transport.publish(topics.up_step("ward", self.name), frame)

    def receive(self, timeout_s: float = 10.0) -> Message:
        assembler = Assembler(Limits())
        while True:
            received = self.transport.receive(timeout_s)
            assert received is not None, "no reply"
            received.acknowledge()
            message = assembler.add(decode_frame(received.payload, Limits()))
            if message is not None and not (message.kind == "model" and hasattr(self, "run")):
                return message


@pytest.fixture
def served(built: dict[str, Any]) -> Any:
    """A service of one device and two rounds, and that device."""
    broker = MemoryBroker()
    trainer = built["vanilla"].trainer(2)
    plan = TrainingPlan(devices=1, rounds=2, batch=3)
    service = TrainingService(
        built["vanilla"].bundle, trainer, MemoryTransport(broker, "server"), plan, fleet="ward", idle_s=20
    )
    thread = threading.Thread(target=service.run)
    thread.start()
    device = Device(broker, built["vanilla"])
    yield device, trainer
    for step in (101, 102):
        device.send(step)
        device.receive()
    device.tell("done")
    thread.join(20)
    assert not thread.is_alive()
    device.transport.close()


def test_a_repeated_step_gets_the_same_reply_and_is_trained_once(served: Any) -> None:
    device, trainer = served
    device.send(1)
    first = device.receive()
    device.send(1)
    second = device.receive()
    assert first.kind == "gradient" and first == second
    assert trainer.round == 1
    device.send(2, "infer")
    assert device.receive().kind == "decision"
    assert trainer.round == 1


def test_a_refused_step_leaves_the_run_going(served: Any) -> None:
    device, trainer = served
    device.send(1, value=1e9)
    refused = device.receive()
    assert refused.kind == "refused" and refused.fields["reason"] == "range"
    device.tell("online", manifest="another bundle")
    device.send(2)
    assert device.receive().fields["reason"] == "bundle"
    device.tell("online")
    assert trainer.round == 0
    device.send(3)
    assert device.receive().kind == "gradient"


def test_a_step_that_cannot_be_trained_is_refused_and_stays_refused(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, trainer = served

    def diverge(*arguments: Any) -> Any:
        raise TrainingError("the losses are [nan]")

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "step", diverge)
        device.send(1)
        refused = device.receive()
    assert (refused.kind, refused.fields["reason"]) == ("refused", "training") and "nan" in refused.fields["detail"]
    device.send(1)
    assert device.receive() == refused and trainer.round == 0
    device.send(2)
    assert device.receive().kind == "gradient"


def test_steps_after_the_last_round_are_told_so(served: Any) -> None:
    device, trainer = served
    for step in (1, 2):
        device.send(step)
        assert device.receive().kind == "gradient"
    device.send(3)
    assert device.receive().fields["reason"] == "finished"
    assert trainer.round == 2


def test_each_device_gets_its_own_part_of_the_gradient(built: dict[str, Any]) -> None:
    broker, plan = MemoryBroker(), TrainingPlan(devices=2, rounds=1, codec="float32")
    bundle = built["vanilla"].bundle
    service = TrainingService(
        bundle, built["vanilla"].trainer(1), MemoryTransport(broker, "s"), plan, fleet="ward", idle_s=20
    )
    thread = threading.Thread(target=service.run)
    thread.start()
    generator = np.random.default_rng(0)
    sent: dict[str, tuple[Any, Any]] = {}
    devices = {name: Device(broker, built["vanilla"], name) for name in ("z", "a")}
    for size, (name, device) in zip((3, 5), devices.items(), strict=True):
        activations = generator.random((size, *bundle.manifest.cut_shape), dtype=np.float32)
        sent[name] = (activations, generator.integers(0, 3, size))
        tensors = {"activations": activations, "labels": sent[name][1]}
        for frame in encode(Message("train", device.run, "s", 1, {"front": 0}, tensors)):
            device.transport.publish(topics.up_step("ward", name), frame)
    got = {name: device.receive().tensors["gradient"] for name, device in devices.items()}
    both = [np.concatenate([sent[name][part] for name in ("a", "z")]) for part in (0, 1)]
    expected = built["vanilla"].trainer(1).step(*both).gradient
    assert np.array_equal(got["a"], expected[:5]) and np.array_equal(got["z"], expected[5:])
    for device in devices.values():
        device.tell("done")
    thread.join(20)
    assert not thread.is_alive()


def test_a_device_that_floods_is_left_unread_and_the_run_goes_on(built: dict[str, Any]) -> None:
    broker, events = MemoryBroker(), []
    server = MemoryTransport(broker, "server")
    service = TrainingService(
        built["vanilla"].bundle,
        built["vanilla"].trainer(1),
        server,
        TrainingPlan(devices=1, rounds=1, batch=3),
        fleet="ward",
        idle_s=20,
        rates=RateLimits(messages_per_s=20.0),
        on_event=events.append,
    )
    thread = threading.Thread(target=service.run)
    thread.start()
    device = Device(broker, built["vanilla"])
    foe = MemoryTransport(broker, "foe")
    foe.open(None)
    every, single = topics.every_step("ward"), topics.up_step("ward", "d0")

    def flood_until(everybody_is_read: bool) -> None:
        deadline = time.monotonic() + 20
        while (every in server._patterns) != everybody_is_read:
            foe.publish(topics.up_step("ward", "foe"), b"flood")
            assert time.monotonic() < deadline and thread.is_alive()

    flood_until(everybody_is_read=False)
    for _ in range(100):
        foe.publish(topics.up_step("ward", "foe"), b"unread")
    device.send(1)
    assert device.receive().kind == "gradient"
    assert {single, topics.every_state("ward")} == set(server._patterns)
    assert not any(message.payload == b"unread" for message in broker._sessions["server"].unacknowledged.values())
    service._quarantine._clock = lambda: time.monotonic() + 61.0
    flood_until(everybody_is_read=True)
    flood_until(everybody_is_read=False)
    device.tell("done")
    thread.join(20)
    assert not thread.is_alive()
    told = [event for event in events if event["event"] == "quarantine"]
    assert [(event["over"], event["seconds"]) for event in told] == [(False, 60.0), (True, 60.0), (False, 120.0)]
    assert all((event["device"], event["channel"]) == ("foe", "step") and event["at_s"] > 0 for event in told)
    assert service.rejected["rate"] > 100
    assert broker._sessions["server"].patterns == {topics.every_state("ward")}


def test_a_resumed_run_knows_its_devices_before_they_say_anything(built: dict[str, Any], tmp_path: Path) -> None:
    broker = MemoryBroker()

    def serve(resume: str | None) -> tuple[TrainingService, threading.Thread]:
        service = TrainingService(
            built["vanilla"].bundle,
            built["vanilla"].trainer(2),
            MemoryTransport(broker, "server"),
            TrainingPlan(devices=1, rounds=2, batch=3),
            journal=Journal(tmp_path, Durability()),
            resume=resume,
            fleet="ward",
            idle_s=20,
        )
        thread = threading.Thread(target=service.run)
        thread.start()
        return service, thread

    first, thread = serve(None)
    device = Device(broker, built["vanilla"])
    device.send(1)
    assert device.receive().kind == "gradient"
    first.stop()
    thread.join(20)
    first._journal.close()
    broker._retained.clear()
    single = topics.up_step("ward", "d0")
    broker._sessions["server"].patterns.add(single)  # of a quarantine, when the server was killed
    second, thread = serve(first.run_id)
    watcher = MemoryTransport(broker, "watcher")
    watcher.open(None)
    watcher.subscribe(topics.down_model("ward"))
    assert watcher.receive(10.0) is not None  # it serves
    assert single not in broker._sessions["server"].patterns
    second.stop()
    thread.join(20)
    second._journal.close()
    assert not thread.is_alive()


def test_a_run_that_nobody_joins_ends_with_the_remedy(built: dict[str, Any]) -> None:
    plan = TrainingPlan(devices=2, rounds=2)
    service = TrainingService(
        built["vanilla"].bundle, built["vanilla"].trainer(2), MemoryTransport(MemoryBroker(), "s"), plan, idle_s=0.2
    )
    with pytest.raises(ServerError, match="start psgl-edge run on 2 devices"):
        service.run()


def test_a_device_learns_that_its_run_ended(built: dict[str, Any], samples: Draw) -> None:
    broker, batch = MemoryBroker(), samples(6, 1)
    plan = TrainingPlan(devices=2, rounds=2)
    service = TrainingService(
        built["vanilla"].bundle,
        built["vanilla"].trainer(2),
        MemoryTransport(broker, "s"),
        plan,
        fleet="ward",
        deadline_s=0.1,
        idle_s=0.5,
    )
    errors: list[Exception] = []

    def serve() -> None:
        try:
            service.run()
        except ServerError as exc:
            errors.append(exc)

    thread = threading.Thread(target=serve)
    thread.start()
    client = EdgeClient(built["vanilla"].bundle, MemoryTransport(broker, "d0"), device="d0", fleet="ward", resend_s=30)
    with client, pytest.raises((RefusedError, TransportError), match="ended run"):
        client.train_step(batch.x, batch.y)
    thread.join(20)
    assert errors, "the second device never came"
