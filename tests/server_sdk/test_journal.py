"""A server that stops at any instant goes on where it stood: same weights, same fronts, each step trained once."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.batch import Samples
from edge_sdk.client import EdgeClient
from edge_sdk.memory_transport import MemoryBroker, MemoryTransport
from edge_sdk.training import follow
from edge_sdk.wire import Message
from server_sdk.errors import CheckpointError, LogError
from server_sdk.journal import Durability, Journal
from server_sdk.log import Log
from server_sdk.plan import TrainingPlan
from server_sdk.segments import scan
from server_sdk.service import TrainingService
from server_sdk.training_run import Outgoing, TrainingRun

Draw = Callable[[int, int], Samples]
PLAN = TrainingPlan(devices=2, rounds=8, batch=6)
FRONTS = {
    "own": PLAN,
    "shared": replace(PLAN, fronts="shared", synchronise_every=3),
    "relay": replace(PLAN, fronts="relay", synchronise_every=2),
    "frozen": replace(PLAN, fronts="frozen"),
    "hardened": replace(PLAN, fronts="frozen"),
    "async": replace(PLAN, schedule="async"),
}


class Crash(BaseException):
    """The process is gone."""


class MortalJournal(Journal):
    """Crashes at its n-th record: before it is written, before it is applied, or before its replies are sent."""

    def __init__(self, folder: Path, durability: Durability, at: int, where: str) -> None:
        super().__init__(folder, durability)
        self._left = at
        self._where = where

    def write(
        self, run: TrainingRun, kind: str, fields: Mapping[str, Any], body: bytes = b"", message: Message | None = None
    ) -> list[Outgoing]:
        self._left -= 1
        if self._left == 0 and self._where == "before":
            raise Crash
        if self._left == 0 and self._where == "written":
            assert self._log is not None
            self._log.append(kind, fields, body)
            raise Crash
        replies = super().write(run, kind, fields, body, message)
        if self._left == 0:
            raise Crash
        return replies


@dataclass
class Outcome:
    """What a run left, after however many lives of its server."""

    figures: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    fronts: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)
    lives: int = 0


def run_with_crashes(
    built: Any, samples: Draw, plan: TrainingPlan, folder: Path, crashes: list[tuple[int, str]], every: int = 3
) -> Outcome:
    broker, outcome = MemoryBroker(), Outcome()

    def serve() -> None:
        for at, where in (*crashes, (0, "")):
            kept = Journal.kept(folder)
            journal = MortalJournal(folder, Durability(checkpoint_every=every, keep_log=True), at, where)
            trainer = built.trainer(plan.rounds)
            transport = MemoryTransport(broker, "server")
            service = TrainingService(
                built.bundle,
                trainer,
                transport,
                plan,
                journal=journal,
                resume=None if kept is None else kept.run,
                fleet="ward",
                idle_s=20,
                deadline_s=20,
            )
            try:
                outcome.figures = service.run()
                outcome.weights = trainer.state_dict()
                return
            except Crash:
                outcome.lives += 1
            except Exception as exc:
                outcome.errors.append(exc)
                return
            finally:
                journal.close()

    def device(number: int) -> None:
        name = f"d{number}"
        client = EdgeClient(
            built.bundle, MemoryTransport(broker, name), device=name, fleet="ward", resend_s=0.2, give_up_s=20
        )
        try:
            with client:
                follow(client, samples(30, number), None, seed=0)
            outcome.fronts[name] = dict(client.front.tensors)
        except Exception as exc:
            outcome.errors.append(exc)

    threads = [threading.Thread(target=serve), *(threading.Thread(target=device, args=(n,)) for n in range(2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return outcome


def trained_once(folder: Path) -> bool:
    keys = [tuple(k) for record, _ in scan(folder / "log") if record.kind == "round" for k in record.fields["steps"]]
    return len(keys) == len(set(keys))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("where", ["before", "written", "applied"])
@pytest.mark.parametrize("fronts", ["own", "shared", "frozen", "hardened"])
def test_crashes_at_any_record_change_nothing(
    fronts: str, where: str, built: dict[str, Any], samples: Draw, tmp_path: Path
) -> None:
    plan = FRONTS[fronts]
    bundle = built[fronts if fronts == "hardened" else "paper"]
    if plan.fronts == "frozen":
        plan = replace(plan, devices=1)  # the order of arrival of two devices' samples is the network's
    quiet = run_with_crashes(bundle, samples, plan, tmp_path / "quiet", [])
    shaken = run_with_crashes(bundle, samples, plan, tmp_path / "shaken", [(at, where) for at in (4, 2, 3, 7, 1, 5)])
    assert quiet.errors == shaken.errors == [] and shaken.lives >= (2 if plan.fronts == "frozen" else 5)
    assert shaken.figures["rounds"] == 8 and trained_once(tmp_path / "shaken")
    if plan.fronts != "frozen":
        assert same(quiet.weights, shaken.weights)
        assert all(same(quiet.fronts[name], shaken.fronts[name]) for name in ("d0", "d1"))


@pytest.mark.parametrize("fronts", FRONTS)
def test_every_prefix_of_the_log_replays_to_the_same_bits(
    fronts: str, built: dict[str, Any], samples: Draw, tmp_path: Path
) -> None:
    plan, bundle = FRONTS[fronts], built[fronts if fronts == "hardened" else "vanilla"]
    outcome = run_with_crashes(bundle, samples, plan, tmp_path, [])
    assert outcome.errors == []
    items = list(scan(tmp_path / "log"))
    kept = Journal.kept(tmp_path)
    assert kept is not None

    def fresh() -> TrainingRun:
        return TrainingRun(kept.run, bundle.bundle.id, bundle.trainer(plan.rounds), plan)

    def finish(run: TrainingRun) -> dict[str, Any]:
        for record, place in items[run.position :]:
            run.apply(record, place)
        while run.store.ready and not run.over:
            run.train_stored()
        while plan.fronts == "frozen" and not run.over:
            run.store.begin_epoch()
        return dict(run._trainer.state_dict())

    whole = fresh()
    sent: dict[int, list[Outgoing]] = {}
    for record, place in items:
        sent[record.position] = whole.apply(record, place)
    if plan.fronts != "frozen":
        assert same(outcome.weights, whole._trainer.state_dict())
    for cut in range(1, len(items), 5):
        before = fresh()
        for record, place in items[:cut]:
            before.apply(record, place)
        after = fresh()
        after.load(before.dump(), items[before.oldest_needed - 1 :])
        assert after.position == cut and after.members == before.members and list(after.waiting) == list(before.waiting)
        for record, place in items[cut:]:
            assert after.apply(record, place) == sent[record.position], "the same bytes are sent"
        assert same(finish(after), finish(whole))


def test_a_checkpoint_of_another_run_plan_model_or_durability_is_refused(
    built: dict[str, Any], samples: Draw, tmp_path: Path
) -> None:
    run_with_crashes(built["vanilla"], samples, PLAN, tmp_path, [])
    kept = Journal.kept(tmp_path)
    assert kept is not None and kept.round == 8 and not kept.finished
    bundle = built["vanilla"].bundle.id
    wrong = {
        "bundle": TrainingRun(kept.run, "another", built["vanilla"].trainer(8), PLAN),
        "run": TrainingRun("another", bundle, built["vanilla"].trainer(8), PLAN),
        "plan's batch": TrainingRun(kept.run, bundle, built["vanilla"].trainer(8), replace(PLAN, batch=7)),
        "trainer's rounds": TrainingRun(kept.run, bundle, built["vanilla"].trainer(9), PLAN),
        "trainer's gradient_from": TrainingRun(kept.run, bundle, built["paper"].trainer(8), PLAN),
    }
    for what, run in wrong.items():
        journal = Journal(tmp_path)
        with pytest.raises(CheckpointError, match=what):
            journal.restore(run)
        journal.close()
    journal = Journal(tmp_path, Durability("checkpoint"))
    with pytest.raises(CheckpointError, match="durability"):
        journal.restore(TrainingRun(kept.run, bundle, built["vanilla"].trainer(8), PLAN))


def test_a_folder_without_a_run_and_a_log_without_its_end_are_said(built: dict[str, Any], tmp_path: Path) -> None:
    run = TrainingRun("r", built["vanilla"].bundle.id, built["vanilla"].trainer(8), PLAN)
    journal = Journal(tmp_path)
    assert Journal.kept(tmp_path) is None
    with pytest.raises(CheckpointError, match="holds no run"):
        journal.restore(run)
    journal.begin(run)
    journal.write(run, "epoch", {"number": 1, "samples": 0})
    journal.checkpoint(run)
    journal.close()
    for segment in (tmp_path / "log").glob("*.log"):
        segment.unlink()
    journal = Journal(tmp_path)
    again = TrainingRun("r", built["vanilla"].bundle.id, built["vanilla"].trainer(8), PLAN)
    with pytest.raises(CheckpointError, match="log ends before"):
        journal.restore(again)
    journal.close()


def test_the_log_lets_go_of_what_no_checkpoint_needs(built: dict[str, Any], samples: Draw, tmp_path: Path) -> None:
    broker, plan = MemoryBroker(), replace(PLAN, devices=1, rounds=12)
    journal = Journal(tmp_path, Durability(checkpoint_every=2))
    service = TrainingService(
        built["vanilla"].bundle,
        built["vanilla"].trainer(12),
        MemoryTransport(broker, "server"),
        plan,
        journal=journal,
        fleet="ward",
        idle_s=20,
    )
    thread = threading.Thread(target=service.run)
    thread.start()
    client = EdgeClient(built["vanilla"].bundle, MemoryTransport(broker, "d"), device="d", fleet="ward")
    with client:
        follow(client, samples(30, 1), None, seed=0)
    thread.join(20)
    held = [record.position for record, _ in scan(tmp_path / "log")]
    assert held[0] > 1 and held[-1] == 1 + 2 * 12
    service.finish()
    journal.close()
    assert list(scan(tmp_path / "log")) == [], "a finished run keeps no activations"
    kept = Journal.kept(tmp_path)
    assert kept is not None and kept.finished


def test_a_full_disk_stops_nothing_for_good(
    built: dict[str, Any], samples: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, calls = Log.append, 0

    def full(self: Log, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if 6 <= calls < 12:
            raise LogError("the disk is full")
        return append(self, *arguments)

    quiet = run_with_crashes(built["vanilla"], samples, PLAN, tmp_path / "quiet", [])
    monkeypatch.setattr(Log, "append", full)
    tight = run_with_crashes(built["vanilla"], samples, PLAN, tmp_path / "tight", [])
    assert calls > 20 and quiet.errors == tight.errors == []
    assert same(quiet.weights, tight.weights)


def test_a_run_whose_checkpoints_are_damaged_is_not_forgotten(built: dict[str, Any], tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    run = TrainingRun("r", built["vanilla"].bundle.id, built["vanilla"].trainer(8), PLAN)
    journal.begin(run)
    journal.write(run, "epoch", {"number": 1, "samples": 0})
    journal.checkpoint(run)
    journal.close()
    older, newer = sorted((tmp_path / "checkpoints").glob("*.safetensors"))
    newer.write_bytes(newer.read_bytes()[:-1])
    kept = Journal.kept(tmp_path)
    assert kept is not None and kept.run == "r", "the older one serves"
    older.write_bytes(b"")
    with pytest.raises(CheckpointError, match="without a readable checkpoint"):
        Journal.kept(tmp_path)
    with closing(Log(tmp_path / "log")) as log:
        log.append("epoch", {"number": 2, "samples": 0})
        log.append("epoch", {"number": 3, "samples": 0})
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="without a readable checkpoint"):
        Journal.kept(tmp_path)


def test_a_run_that_another_server_trains_is_not_forgotten(built: dict[str, Any], tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(TrainingRun("r", built["vanilla"].bundle.id, built["vanilla"].trainer(8), PLAN))
    with pytest.raises(LogError, match="in use"):
        Journal.forget(tmp_path)
    assert Journal.kept(tmp_path) is not None
    journal.close()
    Journal.forget(tmp_path)
    assert Journal.kept(tmp_path) is None
