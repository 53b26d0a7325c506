"""Twenty steps of the real thing, ONNX device, wire and service, beside one joint autograd graph in torch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from edge_sdk.batch import Samples, as_batch, batches
from edge_sdk.client import EdgeClient
from edge_sdk.memory_transport import MemoryBroker, MemoryTransport
from edge_sdk.training import follow
from server_sdk.plan import TrainingPlan
from server_sdk.reference.guide import Guide
from server_sdk.reference.perturbation import front_input, perturb
from server_sdk.reference.profiles import ServerPart
from server_sdk.reference.specification import build
from server_sdk.reference.split import split
from server_sdk.service import TrainingService

Draw = Callable[[int, int], Samples]
ROUNDS, BATCH = 20, 12


def over_the_wire(built: Any, data: Samples) -> tuple[list[float], dict[str, Any]]:
    broker = MemoryBroker()
    losses: list[float] = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            losses.append(event["loss"])

    plan = TrainingPlan(devices=1, rounds=ROUNDS, batch=BATCH, codec="float32")
    service = TrainingService(
        built.bundle, built.trainer(ROUNDS), MemoryTransport(broker, "s"), plan, fleet="ward", on_event=note
    )
    thread = threading.Thread(target=service.run)
    thread.start()
    with EdgeClient(built.bundle, MemoryTransport(broker, "d"), device="d", fleet="ward", codec="float32") as client:
        follow(client, data, None, seed=0)
    thread.join(30)
    assert not thread.is_alive()
    return losses, {name: torch.from_numpy(value.copy()) for name, value in client.front.tensors.items()}


def all_torch(built: Any, data: Samples, guide: Guide) -> tuple[list[float], torch.nn.Module]:
    manifest = built.bundle.manifest
    part = ServerPart.from_manifest(manifest.server)
    front, _ = split(build(part.model, part.seed), part.model.cut)
    trainer = built.trainer(ROUNDS)
    streams = trainer.streams
    back_steps = torch.optim.Adam(streams.parameters(), trainer.learning_rate)
    front_steps = torch.optim.Adam(front.parameters(), manifest.learning_rate)
    losses = []
    for number, batch in enumerate(itertools.islice(batches(data, BATCH, seed=0, device="d"), ROUNDS)):
        x, y = (
            torch.from_numpy(as_batch(batch.x, manifest.input_shape, max_batch=BATCH)),
            torch.from_numpy(batch.y),
        )
        attack = None
        if manifest.normalisation:
            made = perturb(
                guide,
                x,
                torch.full_like(y, -1),
                normalisation=manifest.normalisation,
                epsilon=manifest.epsilon,
            )
            x, attack = made.perturbed.detach(), made.map.detach()
        rate = 0.5 * (1 + np.cos(np.pi * number / ROUNDS))
        for optimizer, base in ((back_steps, trainer.learning_rate), (front_steps, manifest.learning_rate)):
            optimizer.param_groups[0]["lr"] = base * rate
            optimizer.zero_grad()
        through = ("fused",) if "fused" in part.streams else None
        logits = streams.train()(front.train()(front_input(x, attack, 2)), through=through)
        each = {name: torch.nn.functional.cross_entropy(value, y) for name, value in logits.items()}
        sum(each.values(), torch.zeros(())).backward()
        back_steps.step()
        front_steps.step()
        losses.append(each["fused" if through else "attacked"].item())
    return losses, front


@pytest.mark.parametrize("profile", ["vanilla", "paper"])
def test_the_split_training_is_the_joint_training(
    profile: str, built: dict[str, Any], samples: Draw, guide: Guide
) -> None:
    data = samples(60, 3)
    wired, state = over_the_wire(built[profile], data)
    joint, front = all_torch(built[profile], data, guide)
    assert len(wired) == ROUNDS and wired[-1] < 0.5 * wired[0]
    np.testing.assert_allclose(wired, joint, atol=1e-4, rtol=1e-4)
    for name, value in front.named_parameters():
        torch.testing.assert_close(state[f"p.{name}"], value.detach(), atol=2e-3, rtol=1e-2)
    for name, value in front.named_buffers():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(state[f"b.{name}"], value, atol=1e-3, rtol=1e-3)
