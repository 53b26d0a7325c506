"""The check that every export makes of itself finds a backward pass that is wrong in one parameter alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from export import parity
from export.errors import ExportError
from export.graphs import GraphSet, Optimizer, build_graphs
from export.parity import check_parity

SHAPE = (2, 6, 6)
OPTIONS: dict[str, Any] = {"input_shape": SHAPE, "perturbation": None, "downsample": 1, "optimizer": Optimizer("adam")}
Tamper = Callable[[dict[str, np.ndarray]], None]


class _Faint(nn.Module):
    """A scale whose gradient is ten thousand times smaller than its neighbours'."""

    def __init__(self) -> None:
        super().__init__()
        self.faint = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1e-4 * self.faint * x


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, GraphSet]:
    torch.manual_seed(0)
    front = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), _Faint(), nn.Tanh(), nn.Conv2d(4, 3, 3))
    return front, build_graphs(front, None, **OPTIONS)


def test_a_right_graph_passes(made: tuple[nn.Module, GraphSet]) -> None:
    front, graphs = made
    assert check_parity(graphs, front, None, **OPTIONS) < 1e-3


def _scaled(name: str) -> Tamper:
    def tamper(outputs: dict[str, np.ndarray]) -> None:
        outputs[name] = outputs[name] * np.float32(1.01)

    return tamper


def _faint_moment(outputs: dict[str, np.ndarray]) -> None:
    row = outputs["next.s.m"].copy()
    begin = 4 * 2 * 9 + 4  # behind the first convolution's weight and bias
    assert np.abs(row[begin : begin + 4]).max() < 2e-3 * np.abs(row).max(), "in a row it would not be missed"
    row[begin : begin + 4] *= 2
    outputs["next.s.m"] = row


def _other_way(outputs: dict[str, np.ndarray]) -> None:
    outputs["next.p.3.weight"] = outputs["next.p.3.weight"] + np.float32(0.02)


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (_faint_moment, r"next\.s\.m of 1\.faint"),
        (_scaled("next.s.v"), r"next\.s\.v of 0\.weight"),
        (_scaled("next.p.1.faint"), r"next\.p\.1\.faint"),
        (_other_way, r"next\.p\.3\.weight"),
    ],
)
def test_one_wrong_parameter_is_found(
    tamper: Tamper, words: str, made: tuple[nn.Module, GraphSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = parity._run

    def wrong(graph: bytes, given: Any) -> dict[str, Any]:
        outputs = run(graph, given)
        if "next.s.m" in outputs:
            tamper(outputs)
        return outputs

    monkeypatch.setattr(parity, "_run", wrong)
    front, graphs = made
    with pytest.raises(ExportError, match=words):
        check_parity(graphs, front, None, **OPTIONS)


def test_a_scale_between_two_norms_has_no_gradient_to_be_wrong() -> None:
    """All that it gets is rounding, of which torch itself has as much; a wrong weight beside it is still found."""
    torch.manual_seed(1)
    front = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4))
    graphs = build_graphs(front, None, **OPTIONS)
    check_parity(graphs, front, None, **OPTIONS)
    with pytest.raises(ExportError, match="differs from torch"):
        check_parity(graphs, front, None, **{**OPTIONS, "optimizer": Optimizer("adam", betas=(0.8, 0.999))})
