"""A frozen front: the inference of any network that torch can trace, the same as torch's, and nothing else."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from export.errors import ExportError
from export.graphs import GraphSet, Optimizer, build_graphs
from export.parity import check_parity
from server_sdk.reference.networks import hardened_network
from server_sdk.reference.split import split

FRONTS: dict[str, tuple[nn.Sequential, tuple[int, ...], int]] = {
    "image": (split(hardened_network(4, (5, 7), 3, widths=(4, 4, 6, 6)), "tanh")[0], (1, 10, 14), 2),
    "colour": (split(hardened_network(12, (4, 4), 3, code=5, widths=(4, 4, 6, 6)), "tanh")[0], (3, 8, 8), 2),
    "signal": (split(hardened_network(4, (23,), 3, widths=(4, 4, 6, 6)), "tanh")[0], (2, 46), 2),
    "pooled": (
        nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding="valid"),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 6),
            nn.BatchNorm1d(6, momentum=None),
            nn.Tanh(),
        ),
        (1, 12, 12),
        1,
    ),
    "pooled signal": (
        nn.Sequential(
            nn.Conv1d(2, 4, 5, stride=2), nn.BatchNorm1d(4), nn.ReLU(), nn.AdaptiveAvgPool1d(2), nn.Flatten()
        ),
        (2, 20),
        1,
    ),
}


def trained(front: nn.Sequential) -> nn.Sequential:
    """With statistics that are not those of a new layer."""
    front = copy.deepcopy(front)
    generator = torch.Generator().manual_seed(3)
    for layer in front:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.copy_(torch.randn(layer.num_features, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=generator))
    return front


def export(name: str, *, noise: bool = False) -> tuple[GraphSet, nn.Sequential]:
    front, shape, downsample = FRONTS[name]
    front = trained(front)
    graphs = build_graphs(
        front,
        None,
        input_shape=shape,
        perturbation=None,
        downsample=downsample,
        optimizer=Optimizer("sgd", learning_rate=0.1),
        noise=noise,
        frozen=True,
    )
    return graphs, front


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("name", FRONTS)
def test_the_inference_alone_is_exported_and_is_torchs(name: str, noise: bool) -> None:
    graphs, front = export(name, noise=noise)
    _, shape, downsample = FRONTS[name]
    assert graphs.step is None and graphs.by_name == {"infer": graphs.infer}
    assert {key[:2] for key in graphs.tensors} == {"p.", "b."}
    inputs = {value.name for value in onnx.load_from_string(graphs.infer).graph.input}
    assert inputs == {"x", *graphs.tensors, *(["noise"] if noise else [])}
    optimizer = Optimizer("sgd", learning_rate=0.1)
    assert check_parity(graphs, front, None, shape, None, downsample, optimizer, noise=noise) < 1e-4
    session = ort.InferenceSession(graphs.infer, providers=["CPUExecutionProvider"])
    for count in (1, 7):
        x = np.random.default_rng(count).random((count, *shape), dtype=np.float32)
        feeds = {**graphs.tensors, "x": x}
        if noise:
            like = session.get_inputs()[[each.name for each in session.get_inputs()].index("noise")].shape
            feeds["noise"] = np.zeros((count, *like[1:]), np.float32)
        (sent,) = session.run(["activations"], feeds)
        assert sent.shape[0] == count and np.isfinite(sent).all()


def test_another_front_is_found_out() -> None:
    graphs, front = export("signal", noise=True)
    tensors = {**graphs.tensors, "b.codebn.running_mean": graphs.tensors["b.codebn.running_mean"] + 1}
    with pytest.raises(ExportError, match="'infer' differs from torch"):
        check_parity(
            replace(graphs, tensors=tensors),
            front,
            None,
            (2, 46),
            None,
            2,
            Optimizer("sgd", learning_rate=0.1),
            noise=True,
        )
