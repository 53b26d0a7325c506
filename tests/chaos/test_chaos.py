"""The short form of the chaos run: two kill -9 each of devices, broker and server, and a network that misbehaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos_check import Verdict, check
from edge_sdk.batch import Samples
from edge_sdk.bundle import load_bundle
from edge_sdk.client import EdgeClient
from edge_sdk.codec import pack_tensors
from edge_sdk.dataset import load_dataset, save_dataset
from edge_sdk.memory_transport import MemoryBroker, MemoryTransport
from edge_sdk.training import follow
from server_sdk.assembly import back_path, trainer_from
from server_sdk.broker import find_mosquitto
from server_sdk.journal import Durability, Journal
from server_sdk.log import Log
from server_sdk.plan import TrainingPlan
from server_sdk.service import TrainingService

ROOT = Path(__file__).parents[2]
Draw = Callable[[int, int], Samples]
Finished = Callable[[], Verdict]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
@pytest.mark.parametrize("policy", ["rounds", "async", "shared", "frozen"])
def test_nothing_is_lost_and_nothing_is_trained_twice(policy: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--json", "--quick", "--policies", policy]
    done = subprocess.run(
        [*command, "--keep", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert min(figures[f"chaos.kills_{target}"] for target in ("device", "broker", "server")) >= 2
    assert figures["chaos.lost_steps"] == figures["chaos.repeated_steps"] == 0
    assert figures["chaos.weights_equal"] == 1
    assert figures["chaos.time_vs_allowed"] <= 1


@pytest.fixture
def finished(built: dict[str, Any], samples: Draw, tmp_path: Path) -> Finished:
    """A whole run over the in-memory broker, with everything on disk that the check reads."""
    plan = TrainingPlan(devices=2, rounds=6, batch=6, fronts="shared", synchronise_every=2)
    bundle, broker = built["vanilla"].path, MemoryBroker()
    shards = []
    for number in (1, 2):
        shards.append(tmp_path / f"shard-{number}.npz")
        save_dataset(shards[-1], samples(30, number), samples(6, 9))
    trainer = trainer_from(load_bundle(bundle), back_path(bundle), rounds=plan.rounds, learning_rate=1e-3)
    journal = Journal(tmp_path, Durability(keep_log=True))
    transport = MemoryTransport(broker, "server")
    service = TrainingService(built["vanilla"].bundle, trainer, transport, plan, journal=journal, idle_s=20)

    def device(name: str, shard: Path) -> None:
        client = EdgeClient(
            built["vanilla"].bundle, MemoryTransport(broker, name), device=name, codec="float16", resend_s=0.5
        )
        with client:
            follow(client, load_dataset(shard).train, None, seed=3)
        (tmp_path / f"{name}.json").write_text(json.dumps({"steps": client.steps}))
        (tmp_path / f"{name}.front.cbor").write_bytes(pack_tensors(client.front.tensors))

    threads = [threading.Thread(target=service.run)]
    threads += [threading.Thread(target=device, args=(f"device-{n}", shard)) for n, shard in enumerate(shards, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    journal.close()
    trainer.save(tmp_path / "server.safetensors")
    return lambda: check(tmp_path, bundle, tuple(shards), plan, learning_rate=1e-3, seed=3)


def test_the_check_finds_nothing_in_a_sound_run(finished: Finished) -> None:
    assert finished() == Verdict(0, 0, True, ())


def test_the_check_finds_a_step_that_was_lost(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "device-1.json").write_text(json.dumps({"steps": 7}))
    assert finished().lost == 1


def test_the_check_finds_other_bits(finished: Finished, tmp_path: Path) -> None:
    for name in ("device-1.front.cbor", "server.safetensors"):
        data = bytearray((tmp_path / name).read_bytes())
        data[-1] ^= 1
        (tmp_path / name).write_bytes(data)
    verdict = finished()
    assert not verdict.equal and len(verdict.differences) == 2


def test_the_check_finds_a_step_that_was_trained_twice(finished: Finished, tmp_path: Path) -> None:
    with closing(Log(tmp_path / "log")) as log:
        rounds = [record for record, _ in log.read() if record.kind == "round"]
        log.append("round", rounds[-1].fields)
    verdict = finished()
    assert verdict.repeated == 2 and not verdict.equal
