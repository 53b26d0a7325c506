"""A frozen front whose activations are packed: the real commands over a real broker, killed and resumed."""

from __future__ import annotations

import signal
from typing import Any

import cbor2
import numpy as np
import pytest
import safetensors.torch
import torch

from edge_sdk import topics
from edge_sdk.codec import unpack_tensors
from server_sdk.journal import Journal
from server_sdk.plan import TrainingPlan
from server_sdk.segments import Damage, scan
from server_sdk.training_run import TrainingRun

DEVICES = ("d1", "d2")
ROUNDS = 400


def replayed(ward: Any, built: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that the log gives, applied from its first record on."""
    kept = Journal.kept(ward.folder / "server")
    assert kept is not None
    plan = TrainingPlan(devices=2, rounds=ROUNDS, batch=6, fronts="frozen")
    trainer = built["hardened"].trainer(ROUNDS)
    run = TrainingRun(kept.run, built["hardened"].bundle.id, trainer, plan)
    for item in scan(ward.folder / "server" / "log"):
        assert not isinstance(item, Damage)
        run.apply(*item)
    while run.store.ready and not run.over:
        run.train_stored()
    assert run.over
    return dict(trainer.state_dict())


@pytest.mark.parametrize("killed", [False, True])
def test_two_devices_hand_over_packed_samples_and_the_server_ends_in_the_bits_of_its_log(
    killed: bool, ward: Any, built: dict[str, Any]
) -> None:
    server = ward.server(ROUNDS, "--devices", 2, "--checkpoint-every", 7, profile="hardened")
    server.wait("waiting")
    devices = [
        ward.device(name, "--save-front", ward.folder / f"{name}.cbor", "--codec", "float32", profile="hardened")
        for name in DEVICES
    ]
    if killed:
        server.wait("round", round=20)
        server.kill()
        assert server.process.returncode == -signal.SIGKILL
        server = ward.server(ROUNDS, "--devices", 2, "--checkpoint-every", 7, "--resume", profile="hardened")
    assert [device.end() for device in devices] == [0, 0], [device.errors for device in devices]
    assert server.end() == 0, server.errors
    figures = server.of("end")[0]
    assert figures["rounds"] == ROUNDS and figures["evaluation"]["samples"] == 2 * 12
    weights = safetensors.torch.load_file(ward.folder / "server" / "server.safetensors")
    again = replayed(ward, built)
    assert weights.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in weights.items())
    for name in DEVICES:
        report = ward.report(name)
        assert (report["samples_sent"], report["bits_per_sample"]) == (48 + 12, pytest.approx(16.0))
        assert report["bits_sent"] == pytest.approx(60 * 16.0)
        front = unpack_tensors((ward.folder / f"{name}.cbor").read_bytes())
        initial = built["hardened"].bundle.initial
        assert front.keys() == initial.keys() and all(np.array_equal(front[key], initial[key]) for key in front)


def test_sixteen_bytes_carry_a_sample(ward: Any) -> None:
    listener = ward.listener(topics.every_step)
    server = ward.server(20, profile="hardened")
    server.wait("waiting")
    device = ward.device("d1", profile="hardened")
    stored = listener.until(lambda message: message.kind == "store")
    asked = listener.until(lambda message: message.kind == "infer")
    assert device.end() == 0 and server.end() == 0, (device.errors, server.errors)
    for message in (stored, asked):
        activations = message.tensors["activations"]
        assert activations.shape[1:] == (32,) and len(np.unique(activations)) <= 16
    bodies = [item[0].body for item in scan(ward.folder / "server" / "log") if item[0].kind == "step"]
    assert len(bodies) == 8
    for body in bodies:
        entry = cbor2.loads(body)["tensors"]["activations"]
        assert (entry["bits"], entry["shape"], entry["low"], entry["high"]) == (4, [32], -3.0, 3.0)
        dims, data = entry["data"].value
        assert list(dims) == [6, 16] and len(data.value) == 6 * 16


@pytest.mark.parametrize("fronts", ["own", "shared", "relay"])
def test_a_server_does_not_begin_to_train_a_frozen_front(fronts: str, ward: Any) -> None:
    server = ward.server(5, "--fronts", fronts, profile="hardened")
    assert "the bundle's front is frozen" in (line := server.one_line()) and "--fronts frozen" in line
    assert not (ward.folder / "server").exists()
