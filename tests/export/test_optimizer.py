from __future__ import annotations

import pytest
import torch
from torch import nn

from export.errors import ExportError
from export.optimizer import Optimizer, initial_state, step


@pytest.mark.parametrize(
    "rule",
    [
        Optimizer("sgd", 0.1),
        Optimizer("sgd", 0.1, momentum=0.9),
        Optimizer("adam", 0.1),
        Optimizer("adam", 0.1, betas=(0.5, 0.9), epsilon=1e-3),
    ],
)
def test_steps_are_torchs(rule: Optimizer) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    own = {name: p.detach().clone() for name, p in layer.named_parameters()}
    state = initial_state(rule, own)
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    options = {"momentum": rule.momentum} if rule.kind == "sgd" else {"betas": rule.betas, "eps": rule.epsilon}
    torchs = kinds[rule.kind](layer.parameters(), lr=rule.learning_rate, **options)
    for _ in range(6):
        gradients = {name: torch.randn_like(p) for name, p in own.items()}
        for name, parameter in layer.named_parameters():
            parameter.grad = gradients[name].clone()
        torchs.step()
        own, state = step(rule, own, gradients, state, torch.tensor(rule.learning_rate).double())
        for name, parameter in layer.named_parameters():
            assert torch.allclose(own[name], parameter, rtol=1e-6, atol=1e-8), name


def test_adams_first_step_is_exact_in_float32() -> None:
    """1 - 0.999 keeps four digits in float32; the correction must not."""
    rule, before = Optimizer("adam", 0.1), {"w": torch.zeros(3)}
    after, _ = step(rule, before, {"w": torch.ones(3)}, initial_state(rule, before), torch.tensor(0.1))
    assert torch.allclose(after["w"], torch.full((3,), -0.1), rtol=2e-7, atol=0)


def test_state_names() -> None:
    weights = {"conv1.weight": torch.ones(2, 2)}
    assert list(initial_state(Optimizer("sgd"), weights)) == []
    assert list(initial_state(Optimizer("sgd", momentum=0.5), weights)) == ["conv1.weight.momentum"]
    adam = initial_state(Optimizer("adam"), weights)
    assert {name: tuple(t.shape) for name, t in adam.items()} == {
        "m": (4,),
        "v": (4,),
        "t": (),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "lion"},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"momentum": 1.0},
        {"kind": "adam", "momentum": 0.9},
        {"betas": (0.9, 1.0)},
        {"epsilon": 0.0},
    ],
)
def test_settings_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ExportError):
        Optimizer(**options)
