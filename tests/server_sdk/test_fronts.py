"""Means, shares and turns; and every schedule and policy in a whole run over the in-memory broker."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.batch import Samples
from edge_sdk.client import EdgeClient
from edge_sdk.errors import ConfigError
from edge_sdk.memory_transport import MemoryBroker, MemoryTransport
from edge_sdk.training import follow
from server_sdk.fronts import mean_front, next_holder, share_of
from server_sdk.journal import Durability, Journal
from server_sdk.plan import TrainingPlan, fronts_for
from server_sdk.segments import scan
from server_sdk.service import TrainingService

Draw = Callable[[int, int], Samples]


@pytest.mark.parametrize(
    ("counts", "weights", "expected"),
    [
        ((100, 300), "equal", [1.0, 1.0]),
        ((100, 300), "samples", [0.5, 1.5]),
        ((100, None, 300), "samples", [0.5, 1.0, 1.5]),
        ((None, None), "samples", [1.0, 1.0]),
    ],
)
def test_unequal_data_counts_as_configured(counts: Any, weights: str, expected: list[float]) -> None:
    assert share_of(counts, weights) == pytest.approx(expected)


def test_the_mean_of_fronts_is_weighted_and_keeps_scalars() -> None:
    fronts = [{"p.w": np.full(2, value, np.float32), "s.step": np.array(value, np.float32)} for value in (1.0, 5.0)]
    mean = mean_front(fronts, [0.5, 1.5])
    assert mean["p.w"].tolist() == [4.0, 4.0] and mean["p.w"].dtype == np.float32
    assert mean["s.step"] == 4.0 and mean["s.step"].shape == ()


def test_turns_go_round_by_name() -> None:
    assert [next_holder(("a", "c"), last) for last in ("", "a", "b", "c")] == ["a", "c", "c", "a"]


@dataclass
class Run:
    """What a finished run left."""

    figures: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    fronts: dict[str, dict[str, Any]] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)


def train(built: Any, samples: Draw, plan: TrainingPlan, folder: Path, *, absent_after: int = 0) -> Run:
    """A whole run; with ``absent_after`` the first device vanishes after so many steps and never comes back."""
    broker, run = MemoryBroker(), Run()
    journal = Journal(folder, Durability(keep_log=True))
    service = TrainingService(
        built.bundle,
        built.trainer(plan.rounds),
        MemoryTransport(broker, "server"),
        plan,
        journal=journal,
        fleet="ward",
        idle_s=20,
        deadline_s=0.5 if absent_after else 20,
        on_event=run.events.append,
    )

    def serve() -> None:
        try:
            run.figures = service.run()
        except Exception as exc:
            run.errors.append(exc)

    def device(number: int) -> None:
        transport = MemoryTransport(broker, f"d{number}")
        client = EdgeClient(built.bundle, transport, device=f"d{number}", fleet="ward", resend_s=0.5)
        train_set = samples(30 + 6 * number, number)
        try:
            client.start()
            if absent_after and number == 0:
                for step in range(absent_after):
                    client.train_step(train_set.x[step : step + 6], train_set.y[step : step + 6])
                transport.kill()
                return
            follow(client, train_set, samples(9, 50 + number), seed=0)
            client.stop()
            run.fronts[f"d{number}"] = dict(client.front.tensors)
        except Exception as exc:
            run.errors.append(exc)

    threads = [threading.Thread(target=serve)]
    threads += [threading.Thread(target=device, args=(number,)) for number in range(plan.devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    journal.close()
    assert not any(thread.is_alive() for thread in threads)
    return run


def records(folder: Path, kind: str) -> list[Any]:
    return [item for item, _ in scan(folder / "log") if item.kind == kind]


@pytest.mark.parametrize("weights", ["equal", "samples"])
@pytest.mark.parametrize(
    ("schedule", "fronts"),
    [("rounds", "own"), ("async", "own"), ("rounds", "shared"), ("async", "shared"), ("rounds", "relay")],
)
def test_every_policy_learns_and_trains_each_step_once(
    schedule: str, fronts: str, weights: str, built: dict[str, Any], samples: Draw, tmp_path: Path
) -> None:
    rounds = 12 if schedule == "rounds" and fronts != "relay" else 24
    plan = TrainingPlan(2, rounds, 6, 0, schedule, fronts, synchronise_every=3, weights=weights)
    run = train(built["vanilla"], samples, plan, tmp_path)
    assert run.errors == []
    losses = [event["loss"] for event in run.events if event["event"] == "round"]
    assert len(losses) == rounds and np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    trained = [tuple(key) for record in records(tmp_path, "round") for key in record.fields["steps"]]
    assert len(trained) == len(set(trained)) == run.figures["steps"] == 24
    same = all(np.array_equal(value, run.fronts["d1"][name]) for name, value in run.fronts["d0"].items())
    assert same == (fronts != "own")
    if fronts == "relay":
        turns = [key[0] for key in trained]
        assert turns == (["d0"] * 3 + ["d1"] * 3) * 4


@pytest.mark.parametrize(("profile", "share"), [("vanilla", 0.7), ("hardened", 1.0)])
def test_a_frozen_front_sends_each_sample_once_and_the_server_trains_from_its_log(
    profile: str, share: float, built: dict[str, Any], samples: Draw, tmp_path: Path
) -> None:
    plan = TrainingPlan(devices=2, rounds=30, batch=6, fronts="frozen", codec="float32")
    run = train(built[profile], samples, plan, tmp_path)
    assert run.errors == []
    losses = [event["loss"] for event in run.events if event["event"] == "round"]
    assert len(losses) == 30 and np.mean(losses[-10:]) < share * np.mean(losses[:10])
    stored = records(tmp_path, "step")
    assert len(stored) == 5 + 6, "30 and 36 samples in batches of 6"
    initial = built[profile].bundle.initial
    assert all(np.array_equal(value, run.fronts["d0"][name]) for name, value in initial.items())


@pytest.mark.parametrize("fronts", ["own", "shared", "relay"])
def test_a_frozen_front_is_not_trained(fronts: str, built: dict[str, Any]) -> None:
    assert fronts_for(built["vanilla"].bundle.manifest) == "own"
    assert fronts_for(built["vanilla"].bundle.manifest, fronts) == fronts
    manifest = built["hardened"].bundle.manifest
    assert fronts_for(manifest) == fronts_for(manifest, "frozen") == "frozen"
    with pytest.raises(ConfigError, match="use --fronts frozen"):
        fronts_for(manifest, fronts)
    with pytest.raises(ConfigError, match="use --fronts frozen"):
        TrainingService(
            built["hardened"].bundle,
            built["hardened"].trainer(),
            MemoryTransport(MemoryBroker(), "s"),
            TrainingPlan(1, 1, fronts=fronts),
        )


@pytest.mark.parametrize(("schedule", "fronts"), [("rounds", "own"), ("rounds", "shared"), ("rounds", "relay")])
def test_a_device_that_never_comes_back_does_not_stop_the_others(
    schedule: str, fronts: str, built: dict[str, Any], samples: Draw, tmp_path: Path
) -> None:
    plan = TrainingPlan(2, 10, 6, 0, schedule, fronts, synchronise_every=4)
    run = train(built["vanilla"], samples, plan, tmp_path, absent_after=2)
    assert run.errors == [] and run.figures["rounds"] == 10
    assert "d1" in run.fronts
