"""What benchmarks.edge measures is what it says; nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.edge import _Pair, closure

ROOT = Path(__file__).parent.parent.parent


def test_both_sides_compute_the_same(tmp_path: Path) -> None:
    pair = _Pair(tmp_path, (1, 16, 16))
    x = np.random.default_rng(0).random((3, 1, 16, 16), dtype=np.float32)
    mine = pair._device.forward(pair._device.initial_state(), x, None, training=False)
    theirs = pair._torch_inference(torch.from_numpy(x)).numpy()
    assert np.abs(mine.activations - theirs).max() < 1e-4 * np.abs(theirs).max()
    ways = pair.ways(2)
    assert {name.removeprefix("torch_") for name in ways} == {"perturb_front", "front", "backward", "step"}
    for way in ways.values():
        way()


def test_the_closure_is_the_edge_alone() -> None:
    sizes = closure("psgl")
    assert {"psgl", "numpy", "onnxruntime", "paho-mqtt", "cbor2"} <= set(sizes) and "torch" not in sizes


def test_the_decision_quotes_the_figures() -> None:
    figures = json.loads((ROOT / "docs/figures/edge.json").read_text())["figures"]
    text = (ROOT / "docs/decisions/0014-what-a-devices-step-costs.md").read_text()
    for name, digits in (
        ("perturb_front_vs_torch", 2),
        ("backward_vs_torch", 2),
        ("step_vs_torch", 2),
        ("perturb_front_vs_front", 1),
    ):
        cells = [
            ", ".join(f"{figures[f'edge.{name}.{size}.{batch}']:.{digits}f}" for batch in (1, 8, 32))
            for size in ("28", "128", "ecg")
        ]
        assert " | ".join(cells) in text, f"{name}: {' | '.join(cells)}"
