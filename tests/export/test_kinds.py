"""Every kind of layer in a front and in a guide, as the exporter really writes them, side by side in one graph each."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.errors import ExportError
from export.graphs import GraphSet, Optimizer, build_graphs
from export.layers import LAYERS, check_guide
from server_sdk.reference.perturbation import Perturbation
from tests.export.kinds import CHANNELS, GRID, KINDS, LENGTH, PAGE, page

CLASSES, BATCH = 3, 4
INPUTS = 3  # of one, a norm behind the convolution would leave nothing of its gradient
TOGETHER = 8  # kinds in one graph
GRIDS = {"image": (GRID, GRID), "signal": (LENGTH,)}
OF = {
    f"{axes} {start // TOGETHER}": found[start : start + TOGETHER]
    for axes in GRIDS
    for found in [tuple(kind for kind in KINDS if getattr(kind, axes))]
    for start in range(0, len(found), TOGETHER)
}
SHAPES = {group: GRIDS[group.split()[0]] for group in OF}
CASES = [(group, number) for group, kinds in OF.items() for number in range(len(kinds))]
NAMES = [f"{group} {OF[group][number].name}" for group, number in CASES]


def _layer(group: str, number: int) -> nn.Module:
    torch.manual_seed(100 + number)
    layer = getattr(OF[group][number], group.split()[0])()
    for part in layer.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.5, 0.5)
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.3, 0.3)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return layer


class _Front(nn.Module):
    """Each kind behind a convolution of its own, whose gradient is the kind's gradient of its input."""

    def __init__(self, group: str) -> None:
        super().__init__()
        convolution = nn.Conv2d if len(SHAPES[group]) == 2 else nn.Conv1d
        layers = [
            nn.Sequential(convolution(INPUTS, CHANNELS, 1, bias=False), _layer(group, n)) for n in range(len(OF[group]))
        ]
        self.kinds = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([kind(x).flatten(1) for kind in self.kinds], dim=1)


class _Guide(nn.Module):
    """Each kind reads channels of its own, so that each has its own part of the map."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self.kinds = nn.ModuleList()
        for number in range(len(OF[group])):
            layer = _layer(group, number)
            with torch.no_grad():
                values = copy.deepcopy(layer).eval()(torch.zeros(2, CHANNELS, *SHAPES[group])).flatten(1).shape[1]
            self.kinds.append(nn.Sequential(layer, nn.Flatten(), nn.Linear(values, CLASSES)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([kind(part) for kind, part in zip(self.kinds, self.parts(x), strict=True)]).sum(0)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, CHANNELS, dim=1)


@dataclass(frozen=True)
class Done:
    """A graph's answer beside the network, both on the same samples."""

    x: Tensor
    network: nn.Module
    graphs: GraphSet
    gradient: np.ndarray
    got: dict[str, np.ndarray]


def _build(front: nn.Module, guide: nn.Module | None, shape: tuple[int, ...]) -> GraphSet:
    perturbation = None if guide is None else Perturbation("max", 1.0, map_channel=False)
    return build_graphs(
        front,
        guide,
        input_shape=shape,
        perturbation=perturbation,
        downsample=1,
        optimizer=Optimizer("sgd", learning_rate=1.0),
    )


def _front(group: str, run: Callable[..., Any], step: Callable[..., Any]) -> Done:
    network = _Front(group)
    graphs = _build(network, None, (INPUTS, *SHAPES[group]))
    x = torch.rand(BATCH, INPUTS, *SHAPES[group], generator=torch.Generator().manual_seed(1))
    feeds = {**graphs.tensors, "x": x.numpy()}
    settled = run(graphs.infer, feeds)["activations"]
    trained = run(graphs.step.train, feeds)
    gradient = np.random.default_rng(2).standard_normal(trained["activations"].shape).astype(np.float32)
    feeds |= trained | {"gradient": gradient, "rate": np.array(1.0, np.float32)}
    return Done(x, network, graphs, gradient, {**trained, **step(run, graphs, feeds), "settled": settled})


def _guide(group: str, run: Callable[..., Any]) -> Done:
    network = _Guide(group).eval()
    shape = (CHANNELS * len(OF[group]), *SHAPES[group])
    graphs = _build((nn.Conv2d if len(SHAPES[group]) == 2 else nn.Conv1d)(shape[0], 1, 1), network, shape)
    x = torch.rand(BATCH, *shape, generator=torch.Generator().manual_seed(1))
    label = np.arange(BATCH) % CLASSES
    feeds = {**graphs.tensors, "x": x.numpy(), "label": label, "epsilon": np.array(1.0, np.float32)}
    return Done(x, network, graphs, label, run(graphs.infer, feeds))


@pytest.fixture(scope="session")
def front(run_fast: Callable[..., Any], step: Callable[..., Any]) -> Callable[[str], Done]:
    return functools.cache(lambda group: _front(group, run_fast, step))


@pytest.fixture(scope="session")
def guide(run_fast: Callable[..., Any]) -> Callable[[str], Done]:
    return functools.cache(lambda group: _guide(group, run_fast))


def _columns(done: Done, number: int) -> slice:
    with torch.no_grad():
        sizes = [copy.deepcopy(kind).eval()(done.x).flatten(1).shape[1] for kind in done.network.kinds]
    start = sum(sizes[:number])
    return slice(start, start + sizes[number])


@pytest.mark.parametrize(("group", "number"), CASES, ids=NAMES)
def test_in_a_front(group: str, number: int, front: Callable[[str], Done], close: Callable[..., None]) -> None:
    """Activations, statistics and gradients of the step, against autograd in float64 and finite differences."""
    done = front(group)
    x, columns = done.x.double(), _columns(done, number)
    with torch.no_grad():
        settled = copy.deepcopy(done.network.kinds[number]).double().eval()(x).flatten(1)
    close(done.got["settled"][:, columns], settled, "activations in evaluation")
    kind = copy.deepcopy(done.network.kinds[number]).double().train()
    out = kind(x).flatten(1)
    close(done.got["activations"][:, columns], out, "activations in training")
    gradient = torch.from_numpy(done.gradient[:, columns]).double()
    (out * gradient).sum().backward()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in kind.named_parameters():
        full = f"kinds.{number}.{name}"
        found = done.graphs.tensors[f"p.{full}"].astype(np.float64) - done.got[f"next.p.{full}"]
        close(found, parameter.grad, name, relative=1e-4)
        along = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for side in (1e-6, -1e-6):
            moved = copy.deepcopy(done.network.kinds[number]).double().train()
            moved.get_parameter(name).data += side * along
            losses.append(float((moved(x).flatten(1) * gradient).sum().detach()))
        slopes = found * along.numpy()
        assert abs((losses[0] - losses[1]) / 2e-6 - slopes.sum()) < 1e-4 * np.abs(slopes).sum() + 1e-4, name
    for name, buffer in kind.named_buffers():
        if not name.endswith("num_batches_tracked"):
            close(done.got[f"next.b.kinds.{number}.{name}"], buffer, name)


@pytest.mark.parametrize(("group", "number"), CASES, ids=NAMES)
def test_in_a_guide(group: str, number: int, guide: Callable[[str], Done], close: Callable[..., None]) -> None:
    """The kind's own part of the saliency map, from one gradient per class in float64 and from finite differences."""
    done = guide(group)
    x = done.network.parts(done.x.double())[number].clone().requires_grad_()
    kind = copy.deepcopy(done.network.kinds[number]).double()
    logits = kind(x)
    slopes = torch.stack([torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True)[0] for k in range(CLASSES)], 1)
    rows = torch.arange(BATCH)
    alpha = slopes[rows, torch.from_numpy(done.gradient)]
    beta = slopes.sum(1) - alpha
    wanted = torch.relu(-alpha) * torch.relu(beta)
    found = torch.from_numpy(done.got["map"]).split(CHANNELS, dim=1)[number].double()
    assert (wanted > 0).any()
    # The largest of all kinds is 1 in each sample's map; a kind by itself is known up to that factor.
    sums = found.flatten(1).sum(1)
    scale = torch.where(sums > 0, wanted.flatten(1).sum(1) / sums, 1.0)
    scaled = found * scale.view(-1, *[1] * (x.dim() - 1))
    close((scaled / wanted.max()).numpy(), wanted / wanted.max(), "map", relative=1e-4)
    sample, best = divmod(int(wanted.argmax()), wanted[0].numel())
    ends = []
    for side in (1e-6, -1e-6):
        moved = x.detach()[sample : sample + 1].clone()
        moved.view(-1)[best] += side
        with torch.no_grad():
            ends.append(kind(moved)[0])
    slope = (ends[0] - ends[1]) / 2e-6
    label = int(done.gradient[sample])
    by_hand = float(-slope[label] * (slope.sum() - slope[label]))
    assert by_hand == pytest.approx(float(scaled[sample].flatten()[best]), rel=1e-3)


@pytest.mark.parametrize("group", SHAPES)
def test_the_guides_logits(group: str, guide: Callable[[str], Done], close: Callable[..., None]) -> None:
    done = guide(group)
    with torch.no_grad():
        close(done.got["guide"], copy.deepcopy(done.network).double()(done.x.double()), "guide")


def test_every_layer_that_is_let_through_is_tested() -> None:
    tested = {type(part) for kind in KINDS for make in (kind.image, kind.signal) if make for part in make().modules()}
    assert set(LAYERS) <= tested


def test_the_page_is_what_the_tests_say() -> None:
    assert PAGE.read_text() == page(), "docs/layers.md is another: python -m tests.export.kinds writes it again"


def test_a_guide_with_a_layer_without_a_gradient_is_refused() -> None:
    check_guide(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(0.5)))
    with pytest.raises(ExportError, match=re.escape("layer '1' (MaxPool2d) of the guide: overlapping windows")):
        check_guide(nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(3, stride=2)))
    with pytest.raises(ExportError, match=r"\(LSTM\) of the guide: use one of AdaptiveAvgPool1d"):
        check_guide(nn.LSTM(2, 2))
