"""The rewritten front is the front: same values, same gradients, and ties go where torch sends them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from export.rewrite import cheap_gradient, cheap_guide, folded, from_blocks, guide_on_blocks
from server_sdk.reference.guide import Guide
from server_sdk.reference.networks import reference_network, step_network
from server_sdk.reference.perturbation import space_to_depth
from server_sdk.reference.split import split


def _named(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict((f"layer{i}", layer) for i, layer in enumerate(layers)))


_RELU, _POOL = nn.ReLU(), nn.MaxPool2d(2)
FRONTS = {
    "thin_first": (_named(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), (1, 8, 10)),
    "thin_odd": (_named(nn.Conv2d(2, 3, (3, 2), padding=(0, 1), bias=False), nn.MaxPool2d(2)), (2, 9, 8)),
    "wide_first": (_named(nn.Conv2d(6, 4, 3), nn.ReLU(), nn.MaxPool2d(2, 2)), (6, 9, 10)),
    "strided_first": (_named(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2)), (1, 13, 15)),
    "after_norm": (_named(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), (1, 9, 9)),
    "signal": (_named(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 2, 3), nn.MaxPool1d(2)), (2, 19)),
    "pool_alone": (_named(nn.MaxPool2d((2, 2)), nn.Conv2d(2, 2, 1)), (2, 7, 6)),
    "repeated": (
        _named(nn.Conv2d(1, 3, 3), _RELU, _POOL, nn.Conv2d(3, 3, 1), _RELU, _POOL, nn.Conv2d(3, 2, 1), _RELU),
        (1, 14, 14),
    ),
    "steps": (split(step_network(3), "pool2")[0], (1, 12, 14)),
}


def _values(front: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    weights = {name: p.detach().clone().requires_grad_() for name, p in front.named_parameters()}
    leaf = x.clone().requires_grad_()
    y = functional_call(front, weights, (leaf,))
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).double()
    grads = torch.autograd.grad(y, [leaf, *weights.values()], g)
    return y.detach(), dict(zip(["x", *weights], grads, strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FRONTS)
def test_values_and_gradients(name: str, tied: bool) -> None:
    torch.manual_seed(1)
    front, shape = FRONTS[name]
    front = copy.deepcopy(front).double()
    x = torch.randn(4, *shape).double()
    if tied:  # small whole numbers: most windows hold their maximum more than once
        x = torch.randint(0, 2, (4, *shape)).double()
        with torch.no_grad():
            for key, parameter in front.named_parameters():
                parameter.copy_(torch.ones_like(parameter) if "bias" in key else torch.randint(-1, 2, parameter.shape))
    y, gradients = _values(cheap_gradient(front), x)
    wanted_y, wanted = _values(front, x)
    assert torch.allclose(y, wanted_y, atol=1e-12)
    assert gradients.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.allclose(gradients[key], value, atol=1e-10), key


@pytest.mark.parametrize("name", [name for name in FRONTS if name not in ("pool_alone", "signal")])
def test_pools_are_gone_and_names_stay(name: str) -> None:
    front, _ = FRONTS[name]
    rewritten = cheap_gradient(front)
    assert not any(isinstance(layer, nn.MaxPool2d) for layer in rewritten.modules())
    assert {key: p.shape for key, p in rewritten.named_parameters()} == {
        key: p.shape for key, p in front.named_parameters()
    }
    assert [key for key, _ in rewritten.named_buffers()] == [key for key, _ in front.named_buffers()]
    assert any(isinstance(layer, nn.MaxPool2d) for layer in front.modules())


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(3), nn.MaxPool2d(2, padding=1), nn.MaxPool2d(2, stride=3), nn.AvgPool2d(2)]
)
def test_other_pools_are_left_alone(pool: nn.Module) -> None:
    rewritten = cheap_gradient(_named(nn.Conv2d(1, 2, 3), nn.ReLU(), pool))
    assert [type(layer) for layer in rewritten] == [nn.Conv2d, nn.ReLU, type(pool)]


def test_fronts_without_pools_and_other_modules_are_only_copied() -> None:
    front, _ = split(reference_network(3, (8, 8), 2), "relu2")
    assert [type(layer) for layer in cheap_gradient(front)] == [type(layer) for layer in front]

    class Own(nn.Sequential):
        pass

    own = Own(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2))
    assert type(cheap_gradient(own)) is Own


GUIDES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "image": (lambda: Guide((2, 16, 24), 3), (2, 16, 24)),
    "odd_after_a_pool": (lambda: Guide((1, 28, 20), 3), (1, 28, 20)),
    "signal": (lambda: Guide((2, 36), 3), (2, 36)),
    "own": (
        lambda: _named(
            *(nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 5, (4, 3), padding=(3, 1)), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5 * 4 * 2, 3)),
        ),
        (1, 11, 11),
    ),
    "own_without_padding": (
        lambda: _named(
            *(nn.Conv2d(1, 16, 1), nn.Conv2d(16, 5, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(5, 16, 2, padding=1), nn.Conv2d(16, 5, 1, padding=1), nn.Flatten(), nn.Linear(5 * 6 * 7, 3)),
        ),
        (1, 9, 10),
    ),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_keeps_its_logits_and_its_input_gradient(name: str, tied: bool) -> None:
    torch.manual_seed(2)
    make, shape = GUIDES[name]
    guide = make().double()
    x = torch.rand(4, *shape).double()
    if tied:
        x = torch.randint(0, 2, (4, *shape)).double()
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.copy_(torch.randint(-1, 2, parameter.shape))

    def values(module: nn.Module, given: Tensor) -> tuple[Tensor, Tensor]:
        leaf = given.clone().requires_grad_()
        y = module(leaf)
        return y.detach(), torch.autograd.grad(y, leaf, torch.arange(y.numel()).reshape(y.shape).double())[0]

    wanted_y, wanted = values(guide, x)
    if isinstance(guide, Guide):
        y, gradient = values(cheap_guide(guide_on_blocks(guide)), space_to_depth(x))
        gradient = from_blocks(gradient)
    else:
        y, gradient = values(cheap_guide(guide), x)
    assert torch.allclose(y, wanted_y, atol=1e-10) and torch.allclose(gradient, wanted, atol=1e-9)
    assert wanted.abs().max() > 0


@pytest.mark.parametrize("shape", [(2, 8, 12, 5), (2, 6, 7)])
def test_blocks_go_back_to_the_very_values(shape: tuple[int, ...]) -> None:
    blocks = torch.randn(shape)
    assert torch.equal(space_to_depth(from_blocks(blocks)), blocks)


NORMALISED = {
    "reference": (split(reference_network(3, (8, 8), 2), "relu2")[0], (3, 8, 8)),
    "signal": (split(reference_network(3, (16,), 2), "relu2")[0], (3, 16)),
    "bias_groups_plain": (
        _named(
            *(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d(6, affine=False), nn.ReLU()),
            *(nn.Conv2d(6, 2, 1), nn.ReLU(), nn.BatchNorm2d(2)),
        ),
        (4, 9, 9),
    ),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_folded_is_the_front_in_evaluation_mode(name: str) -> None:
    front, shape = NORMALISED[name]
    front = copy.deepcopy(front).double()
    generator = torch.Generator().manual_seed(1)
    for tensor in (*front.parameters(), *front.buffers()):
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    before = {key: tensor.clone() for key, tensor in front.state_dict().items()}
    x = torch.randn(3, *shape, generator=generator).double()
    one = folded(front)
    assert torch.allclose(one(x), copy.deepcopy(front).eval()(x), atol=1e-12)
    assert front.training and one.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in front.state_dict().items())
