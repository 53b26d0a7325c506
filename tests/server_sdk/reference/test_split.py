from __future__ import annotations

import pytest
import torch
from torch import nn

from server_sdk.errors import ModelError
from server_sdk.reference.networks import reference_network
from server_sdk.reference.split import split

MODEL = reference_network(2, (8, 8), 3).eval()
NAMES = [name for name, _ in MODEL.named_children()]


@pytest.mark.parametrize("cut", NAMES[:-1])
def test_halves_compose_to_the_whole(cut: str) -> None:
    front, back = split(MODEL, cut)
    x = torch.rand(2, 2, 8, 8)
    assert torch.equal(back(front(x)), MODEL(x))
    assert [name for half in (front, back) for name, _ in half.named_children()] == NAMES
    assert [name for name, _ in front.named_children()][-1] == cut


def test_halves_hold_the_models_own_layers() -> None:
    front, back = split(MODEL, "relu2")
    assert front.conv1 is MODEL.conv1 and back.head is MODEL.head
    assert {f"{key}" for half in (front, back) for key in half.state_dict()} == set(MODEL.state_dict())


@pytest.mark.parametrize("cut", ["relu9", "", "head"])
def test_an_impossible_cut_names_the_layers(cut: str) -> None:
    with pytest.raises(ModelError, match=r"conv1, bn1, .*flatten"):
        split(MODEL, cut)


def test_only_sequential_models() -> None:
    with pytest.raises(ModelError, match="Linear"):
        split(nn.Linear(2, 2), "a")  # type: ignore[arg-type]


def test_a_layer_that_is_used_twice_stays_twice() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2))
    front, back = split(model, "3")
    x = torch.randn(5, 3)
    assert len(front) == 4 and torch.equal(back(front(x)), model(x))
