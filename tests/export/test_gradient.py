"""Every exported gradient: against autograd in float64, finite differences, in two runtimes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, vjp

from export import decompositions
from export.errors import ExportError
from export.gradient import TRACE_BATCH, export_graphs
from export.model import GraphInput, GraphPlan


@dataclass(frozen=True)
class Case:
    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]


CASES = {
    "conv2d": Case(lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 7, 6)),
    "conv2d_wide": Case(lambda: nn.Conv2d(16, 8, 3, padding=1, bias=False), (16, 5, 5)),
    "conv2d_stride": Case(lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 8, 7)),
    "conv2d_stride_wide": Case(lambda: nn.Conv2d(8, 4, (3, 4), stride=(2, 3), padding=(0, 2)), (8, 8, 9)),
    "conv2d_dilated": Case(lambda: nn.Conv2d(7, 3, 3, padding=2, dilation=2), (7, 8, 8)),
    "conv2d_groups": Case(lambda: nn.Conv2d(12, 8, 3, groups=2), (12, 6, 7)),
    "conv2d_depthwise": Case(lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 6, 6)),
    "conv2d_pointwise": Case(lambda: nn.Conv2d(4, 6, 1), (4, 5, 6)),
    "conv1d": Case(lambda: nn.Conv1d(2, 4, 5, stride=2, padding=2), (2, 16)),
    "conv1d_dilated_groups": Case(lambda: nn.Conv1d(8, 4, 3, dilation=3, groups=2), (8, 17)),
    "batch_norm2d": Case(lambda: nn.BatchNorm2d(4), (4, 5, 6)),
    "batch_norm2d_plain": Case(lambda: nn.BatchNorm2d(4, affine=False), (4, 3, 6)),
    "batch_norm1d": Case(lambda: nn.BatchNorm1d(3), (3, 9)),
    "group_norm": Case(lambda: nn.GroupNorm(2, 6), (6, 4, 5)),
    "layer_norm": Case(lambda: nn.LayerNorm((4, 6)), (3, 4, 6)),
    "linear": Case(lambda: nn.Sequential(nn.Flatten(), nn.Linear(24, 5)), (4, 6)),
    "max_pool2d": Case(lambda: nn.MaxPool2d(2), (3, 7, 6)),
    "max_pool2d_padded": Case(lambda: nn.MaxPool2d(3, stride=3, padding=1), (2, 8, 9)),
    "max_pool1d": Case(lambda: nn.MaxPool1d(3), (2, 13)),
    "max_pool1d_pairs": Case(lambda: nn.MaxPool1d(2), (3, 8)),
    "max_pool1d_pairs_odd": Case(lambda: nn.MaxPool1d(2), (3, 9)),
    "avg_pool2d": Case(lambda: nn.AvgPool2d(2), (3, 7, 6)),
    "avg_pool2d_overlapping": Case(lambda: nn.AvgPool2d(3, stride=2, padding=1), (3, 7, 8)),
    "avg_pool1d": Case(lambda: nn.AvgPool1d(4), (2, 14)),
    "elu": Case(nn.ELU, (3, 5)),
    "gelu": Case(nn.GELU, (3, 5)),
    "hardswish": Case(nn.Hardswish, (3, 5)),
    "hardtanh": Case(nn.Hardtanh, (3, 5)),
    "leaky_relu": Case(lambda: nn.LeakyReLU(0.1), (3, 5)),
    "relu": Case(nn.ReLU, (3, 5)),
    "relu6": Case(nn.ReLU6, (3, 5)),
    "sigmoid": Case(nn.Sigmoid, (3, 5)),
    "silu": Case(nn.SiLU, (3, 5)),
    "tanh": Case(nn.Tanh, (3, 5)),
    "stack": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3)
        ),
        (2, 10, 8),
    ),
}


def _layers(cases: Mapping[str, Case]) -> dict[str, nn.Module]:
    built = {}
    for position, (name, case) in enumerate(cases.items()):
        torch.manual_seed(position)
        layer = case.layer().train()
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.num_batches_tracked = None
                module.running_mean, module.running_var = None, None
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm) and (
                module.weight is not None
            ):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
        built[name] = layer
    return built


def _export(cases: Mapping[str, Case], layers: Mapping[str, nn.Module]) -> dict[str, bytes]:
    """One graph for each case: y, dx and d.<parameter> from x, g and the parameters."""
    inputs: list[GraphInput] = []
    plans = {}
    for name, case in cases.items():
        x = torch.randn(TRACE_BATCH, *case.shape)
        with torch.no_grad():
            y = layers[name](x)
        own = [GraphInput(f"{name}.x", x, batched=True), GraphInput(f"{name}.g", y, batched=True)]
        own += [GraphInput(f"{name}.p.{key}", p.detach()) for key, p in layers[name].named_parameters()]
        inputs += own
        results = ["y", "dx", *(f"d.{key}" for key, _ in layers[name].named_parameters())]
        plans[name] = GraphPlan(
            {entry.name.removeprefix(f"{name}."): entry.name for entry in own},
            {result: f"{name}.{result}" for result in results},
        )

    def function(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        results = {}
        for name, layer in layers.items():
            weights = {key: tensors[f"{name}.p.{key}"] for key, _ in layer.named_parameters()}
            y, pull = vjp(lambda x, w, layer=layer: functional_call(layer, w, (x,)), tensors[f"{name}.x"], weights)
            dx, gradients = pull(tensors[f"{name}.g"])
            results |= {f"{name}.y": y, f"{name}.dx": dx}
            results |= {f"{name}.d.{key}": gradient for key, gradient in gradients.items()}
        return results

    return export_graphs(function, inputs, plans)


@pytest.fixture(scope="session")
def zoo() -> tuple[dict[str, nn.Module], dict[str, bytes]]:
    layers = _layers(CASES)
    return layers, _export(CASES, layers)


def _feeds(layer: nn.Module, shape: tuple[int, ...], batch: int, seed: int) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *shape, generator=generator)
    with torch.no_grad():
        y = layer(x)
    g = torch.randn(y.shape, generator=generator)
    weights = {f"p.{key}": p.detach().numpy() for key, p in layer.named_parameters()}
    return {"x": x.numpy(), "g": g.numpy(), **weights}


def _autograd(layer: nn.Module, feeds: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    exact = {key: torch.from_numpy(np.asarray(value, np.float64)) for key, value in feeds.items()}
    x = exact["x"].requires_grad_()
    weights = {key: exact[f"p.{key}"].requires_grad_() for key, _ in layer.named_parameters()}
    y = functional_call(layer, weights, (x,))
    (y * exact["g"]).sum().backward()
    return {"y": y, "dx": x.grad, **{f"d.{key}": weight.grad for key, weight in weights.items()}}


@pytest.mark.parametrize("name", CASES)
def test_matches_autograd(zoo, run, close, name: str) -> None:
    layers, graphs = zoo
    for batch in (1, 3, 8):
        feeds = _feeds(layers[name], CASES[name].shape, batch, seed=batch)
        wanted = _autograd(layers[name], feeds)
        got = run(graphs[name], feeds)
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            close(got[key], value, f"{name}.{key} at batch {batch}")


@pytest.mark.parametrize("name", CASES)
def test_matches_finite_differences(zoo, run_fast, name: str) -> None:
    layers, graphs = zoo
    feeds = _feeds(layers[name], CASES[name].shape, 3, seed=11)
    got = run_fast(graphs[name], feeds)
    generator = np.random.default_rng(5)
    h = 1e-6
    for key in [key for key in feeds if key != "g"]:
        along = generator.standard_normal(feeds[key].shape)

        def loss(shift: float, key: str = key, along: np.ndarray = along) -> float:
            exact = {k: torch.from_numpy(np.asarray(v, np.float64)) for k, v in feeds.items()}
            exact[key] = exact[key] + shift * torch.from_numpy(along)
            weights = {k.removeprefix("p."): v for k, v in exact.items() if k.startswith("p.")}
            y = functional_call(layers[name], weights, (exact["x"],))
            return float((y * exact["g"]).sum())

        slope = (loss(h) - loss(-h)) / (2 * h)
        gradient = got["dx" if key == "x" else f"d.{key.removeprefix('p.')}"]
        size = float(np.abs(gradient.astype(np.float64) * along).sum()) + 0.1
        assert abs(slope - float((gradient * along).sum())) < 1e-4 * size, f"{name}: {key}"


BY_TAPS = {
    "thin": Case(lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 7, 6)),
    "wide": Case(lambda: nn.Conv2d(9, 4, 3, padding=1, bias=False), (9, 5, 8)),
    "uneven": Case(lambda: nn.Conv2d(8, 4, (2, 4), padding=(0, 2)), (8, 6, 5)),
    "uneven_thin": Case(lambda: nn.Conv2d(2, 4, (4, 2), padding=(3, 1)), (2, 5, 6)),
    "pointwise": Case(lambda: nn.Conv2d(8, 3, 1), (8, 4, 5)),
    "signal": Case(lambda: nn.Conv1d(8, 4, 5, padding=2), (8, 11)),
    "signal_thin": Case(lambda: nn.Conv1d(2, 4, 4), (2, 9)),
    "aligned": Case(lambda: nn.Conv2d(9, 4, 3, padding=1), (9, 32, 32)),
    "aligned_thin": Case(lambda: nn.Conv2d(3, 4, (3, 2)), (3, 34, 33)),
    "aligned_signal": Case(lambda: nn.Conv1d(8, 4, 3, padding=1), (8, 1024)),
}


def test_weight_gradients_of_large_grids_match_autograd(run_fast, run, close, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompositions, "_LARGE_PATCHES", 0)
    layers = _layers(BY_TAPS)
    graphs = _export(BY_TAPS, layers)
    for name, case in BY_TAPS.items():
        for batch in (1, 4):
            feeds = _feeds(layers[name], case.shape, batch, seed=batch)
            got = (run if batch == 1 else run_fast)(graphs[name], feeds)
            for key, value in _autograd(layers[name], feeds).items():
                close(got[key], value, f"{name}: {key}")


def test_only_large_grids_are_done_by_taps() -> None:
    cases = {
        "large": Case(lambda: nn.Conv2d(16, 2, 3, padding=1), (16, 32, 32)),
        "small": Case(lambda: nn.Conv2d(16, 2, 3, padding=1), (16, 10, 10)),
    }
    kinds = {
        name: [node.op_type for node in onnx.load_from_string(graph).graph.node]
        for name, graph in _export(cases, _layers(cases)).items()
    }
    assert kinds["large"].count("MatMul") == 9 and "Gemm" not in kinds["large"]
    assert kinds["small"].count("Gemm") == 1 and "MatMul" not in kinds["small"]


@st.composite
def _convolutions(draw: st.DrawFn) -> Case:
    axes = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 1, 2]))
    fan_in, fan_out = (groups * draw(st.integers(1, 8)) for _ in range(2))
    kernel = [draw(st.integers(1, 4)) for _ in range(axes)]
    stride = [draw(st.integers(1, 3)) for _ in range(axes)]
    dilation = [draw(st.integers(1, 2)) for _ in range(axes)]
    padding = [draw(st.integers(0, 2)) for _ in range(axes)]
    grid = [draw(st.integers((k - 1) * d + 2, (k - 1) * d + 7)) for k, d in zip(kernel, dilation, strict=True)]
    bias = draw(st.booleans())
    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    return Case(lambda: kind(fan_in, fan_out, kernel, **options), (fan_in, *grid))


@given(st.lists(_convolutions(), min_size=6, max_size=6), st.integers(1, 9))
@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # a shrink would export hundreds of graphs
    suppress_health_check=list(HealthCheck),
)
def test_drawn_convolutions_match_autograd(run_fast, close, drawn: list[Case], batch: int) -> None:
    cases = {f"c{position}": case for position, case in enumerate(drawn)}
    layers = _layers(cases)
    graphs = _export(cases, layers)
    for name, case in cases.items():
        feeds = _feeds(layers[name], case.shape, batch, seed=batch)
        got = run_fast(graphs[name], feeds)
        for key, value in _autograd(layers[name], feeds).items():
            close(got[key], value, f"{layers[name]} {case.shape}: {key}")


def test_max_pool_gives_a_tie_to_the_first(zoo, run) -> None:
    graphs = zoo[1]
    x = np.zeros((2, 3, 7, 6), np.float32)
    g = np.arange(1, 1 + 2 * 3 * 3 * 3, dtype=np.float32).reshape(2, 3, 3, 3)
    got = run(graphs["max_pool2d"], {"x": x, "g": g})
    wanted = np.zeros_like(x)
    wanted[:, :, 0:6:2, 0:6:2] = g
    np.testing.assert_array_equal(got["dx"], wanted)
    g = np.arange(1, 1 + 2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    got = run(graphs["max_pool1d_pairs"], {"x": np.zeros((2, 3, 8), np.float32), "g": g})
    assert (got["dx"][..., 0::2] == g).all() and not got["dx"][..., 1::2].any()


def test_only_standard_operators_and_no_metadata(zoo) -> None:
    for name, model in zoo[1].items():
        proto = onnx.load_from_string(model)
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)], name
        assert {node.domain for node in proto.graph.node} <= {""}, name
        assert not proto.functions and not proto.metadata_props and not proto.graph.value_info
        for part in (*proto.graph.node, *proto.graph.initializer):
            assert not part.metadata_props and not part.doc_string
        shapes = [value.type.tensor_type.shape.dim for value in (*proto.graph.input, *proto.graph.output)]
        assert {dim.dim_param for dims in shapes for dim in dims} == {"", "N"}, name


def test_a_graph_holds_only_what_its_outputs_need() -> None:
    layers = {"conv": nn.Conv1d(2, 3, 3), "relu": nn.ReLU()}
    cases = {"conv": Case(lambda: layers["conv"], (2, 9)), "relu": Case(nn.ReLU, (4,))}
    graphs = _export(cases, layers)
    operators = {node.op_type for node in onnx.load_from_string(graphs["relu"]).graph.node}
    assert "Conv" not in operators and "Relu" in operators
    assert len(graphs["relu"]) < 600 + math.prod(layers["conv"].weight.shape)


def _export_one(layer: nn.Module, shape: tuple[int, ...]) -> None:
    _export({"one": Case(lambda: layer, shape)}, {"one": layer})


class _Spectral(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


def test_an_operator_without_a_form_is_named() -> None:
    with pytest.raises(ExportError, match="svd"):
        _export_one(_Spectral(), (4, 5))


def test_a_transposed_convolution_is_refused() -> None:
    with pytest.raises(ExportError, match="transposed convolution"):
        _export_one(nn.ConvTranspose2d(2, 3, 2), (2, 4, 4))


def test_a_missing_input_is_named() -> None:
    inputs = [GraphInput("a", torch.ones(3, 2), batched=True), GraphInput("b", torch.ones(2))]
    with pytest.raises(ExportError, match="leaves out: b"):
        export_graphs(lambda t: {"y": t["a"] * t["b"]}, inputs, {"graph": GraphPlan({"a": "a"}, {"y": "y"})})


def test_a_fixed_batch_is_refused() -> None:
    inputs = [GraphInput("a", torch.ones(3, 2), batched=True)]
    with pytest.raises(ExportError):
        export_graphs(lambda t: {"y": t["a"].reshape(3, 2) * 2.0}, inputs, {"graph": GraphPlan({"a": "a"}, {"y": "y"})})
