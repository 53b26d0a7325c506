"""Findings made by hand, for the tests of report, table and page."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from server_sdk.audit.exposure import Exposure
from server_sdk.audit.finding import Finding
from server_sdk.audit.metrics import likeness
from server_sdk.audit.outcome import Outcome


def make_finding(
    profile: str,
    shape: tuple[int, ...],
    noise: float,
    *,
    guide: bool = False,
    seed: int = 0,
    bits: float | None = None,
    classes: int = 3,
    frozen: bool = False,
    accuracy: float = 0.9,
    name: str = "net",
) -> Finding:
    """An attack that adds so much noise to twenty inputs, and a floor of nothing but the mean."""
    generator = np.random.default_rng(seed)
    x = generator.random((20, *shape)).astype(np.float32)
    mean = np.broadcast_to(x.mean(axis=0), x.shape).astype(np.float32)

    def outcome(name: str, made: np.ndarray) -> Outcome:
        n = len(made)
        return Outcome(name, likeness(made, x[:n]), likeness(mean[:n], x[:n]), 0.5, made)

    noisy = np.clip((1 - noise) * x + noise * generator.random(x.shape), 0, 1).astype(np.float32)
    measured: dict[str, Any] = {"accuracy": accuracy, "balanced_accuracy": 0.7, "auc": accuracy + 0.05, "samples": 20}
    measured |= {"streams": {"attacked": 0.9}, "clean": None}
    protocols = {"P1": measured}
    if guide:
        measured |= {"streams": {"attacked": 0.88, "recovered": 0.87, "fused": 0.9}}
        measured |= {"guide_accuracy": 0.8, "guide_agreement": 0.7, "follow_when_wrong": 0.1}
        measured["clean"] = {**measured, "accuracy": 0.85}
        protocols["P2"] = {**measured, "accuracy": 0.3, "clean": {**measured["clean"], "follow_when_wrong": 0.06}}
    manifest = SimpleNamespace(
        profile=profile,
        input_shape=shape,
        classes=tuple(map(str, range(classes))),
        normalisation="sign" if guide else None,
        frozen=frozen,
        cut_shape=(32,),
        bits=0,
    )
    trained = SimpleNamespace(
        victim=SimpleNamespace(bundle=SimpleNamespace(id=f"{profile}-{name}", manifest=manifest)),
        figures={"bytes_per_sample": 100.0},
        exposure=Exposure(bits, training_samples=40, training_sends=100, versions=10, decisions=20),
    )
    often = [outcome("averaging_decoder_mlp", noisy[:9])] if frozen else []
    outcomes = [outcome("weak", mean), *(often or [outcome("strong", noisy[:9])])]
    return Finding(name, seed, cast(Any, trained), outcome("floor", mean), outcomes, protocols)


@pytest.fixture(scope="session")
def finding() -> Callable[..., Finding]:
    return make_finding
