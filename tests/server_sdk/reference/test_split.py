from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from server_sdk.errors import ModelError
from server_sdk.reference.networks import reference_network
from server_sdk.reference.split import last_layer, split

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


def test_a_layer_that_is_used_twice_stays_twice() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2))
    front, back = split(model, "3")
    x = torch.randn(5, 3)
    assert len(front) == 4 and torch.equal(back(front(x)), model(x))


class Block(nn.Module):
    """Two convolutions and a shortcut, as a residual network has it, with what one writes as a function."""

    def __init__(self, fan_in: int, fan_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Conv2d(fan_in, fan_out, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.short is None else self.short(x)
        return self.relu(out)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.layer1 = nn.Sequential(Block(4, 4), Block(4, 4))
        self.layer2 = nn.Sequential(Block(4, 8, stride=2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x), inplace=True)
        x = self.layer2(self.layer1(x))
        x = functional.dropout(x.mean((2, 3)), 0.4, training=self.training)
        return self.head(torch.flatten(x, 1))


def _residual() -> Residual:
    torch.manual_seed(1)
    model = Residual()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.3, 0.3)
    return model


@pytest.mark.parametrize("cut", ["stem", "stem.0", "layer1", "layer1.0", "layer1.1", "layer2", "layer2.0"])
def test_a_traced_model_is_cut_behind_any_layer_or_block(cut: str) -> None:
    model = _residual().eval()
    state = model.state_dict(keep_vars=True)
    front, back = split(model, cut)
    x = torch.rand(3, 2, 8, 8)
    kept = x.clone()
    activations = front(x)
    before = activations.clone()
    assert torch.equal(back(activations), model(x)) and torch.equal(x, kept) and torch.equal(before, activations)
    halves = {**front.state_dict(keep_vars=True), **back.state_dict(keep_vars=True)}
    assert halves.keys() == state.keys() and all(value is state[name] for name, value in halves.items())
    assert not set(front.state_dict()) & set(back.state_dict())
    layers = [*front.modules(), *back.modules()]
    assert not any(layer.training for layer in layers if isinstance(layer, nn.BatchNorm2d | nn.Dropout))


def test_a_traced_model_trains_as_the_whole_does() -> None:
    model, twin = _residual(), _residual()
    front, back = split(model, "layer1")
    x = torch.rand(4, 2, 8, 8)
    for seed in range(2):
        torch.manual_seed(seed)
        found = back(front(x))
        torch.manual_seed(seed)
        wanted = twin(x)
        assert torch.equal(found, wanted)
        found.square().sum().backward()
        wanted.square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    assert torch.equal(model.layer2[0].bn2.running_mean, twin.layer2[0].bn2.running_mean)
    assert not torch.equal(back(front(x)), back(front(x))), "dropout drops in training"
    for part in (front, back):
        part.eval()
    assert torch.equal(back(front(x)), back(front(x))), "and nothing in evaluation"


def test_a_layer_inside_a_child_of_a_sequential() -> None:
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Conv1d(2, 2, 3)))
    model.add_module("flatten", nn.Flatten())
    front, back = split(model, "features.1")
    x = torch.rand(2, 1, 9)
    assert torch.equal(back(front(x)), model(x))
    assert set(front.state_dict()) == {"features.0.weight", "features.0.bias"}
    assert last_layer(front) is model.features[1] and last_layer(back) is model.flatten
    assert last_layer(split(model, "features")[0]) is model.features[2]


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (
            "layer1.0.conv1",
            r"still needs the value 'relu'.*the layers are stem\.0.*layer1\.0, layer1\.1, layer1, layer2",
        ),
        ("layer2.0.bn2", r"still needs the result of 'layer1'"),
        ("layer2.0.short", r"still needs the result of 'layer1'"),
        ("layer1.0.relu", r"used 2 times"),
        ("head", r"no layer is left behind 'head'.*layer2"),
        ("layer3", r"no layer 'layer3' to cut behind: the layers are stem\.0"),
    ],
)
def test_a_cut_that_cannot_be_says_where_one_can(cut: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        split(_residual(), cut)


class _Own(nn.Module):
    """A small model with one peculiarity."""

    def __init__(self, peculiarity: str) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.peculiarity = peculiarity

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.peculiarity == "values" and y.sum() > 0:
            y = -y
        if self.peculiarity == "mode" and self.training:
            y = 2 * y
        if self.peculiarity == "weight":
            y = self.first(self.second(y))
            return self.third(y)
        y = functional.linear(self.second(y), self.first.weight) if self.peculiarity == "tied" else self.second(y)
        y = self.third(y)
        return (y, y) if self.peculiarity == "pair" else y


@pytest.mark.parametrize(
    ("peculiarity", "words"),
    [
        ("values", "_Own cannot be traced .*torch.nn.Sequential"),
        ("mode", "otherwise in training than in evaluation"),
        ("weight", "'first' is used 2 times"),
        ("tied", "'first.weight' is used before and behind the cut"),
        ("pair", "take one tensor and give one"),
    ],
)
def test_a_model_that_cannot_be_traced_or_parted(peculiarity: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        split(_Own(peculiarity), "first")


class _Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Own("values")
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


def test_the_layer_that_cannot_be_traced_is_named_and_a_sequential_need_not_be() -> None:
    with pytest.raises(ModelError, match="layer 'inner' of _Outer cannot be traced"):
        split(_Outer(), "inner.first")
    model = nn.Sequential(_Own("values"), nn.Linear(2, 2))
    front, back = split(model, "0")
    assert back(front(torch.rand(3, 4))).shape == (3, 2)


def test_a_model_without_layers_to_cut_at() -> None:
    with pytest.raises(ModelError, match="Linear has no layer that it can be cut behind"):
        split(nn.Linear(2, 2), "a")
