from __future__ import annotations

import pytest
import torch

from server_sdk.errors import ModelError
from server_sdk.reference.networks import hardened_network, reference_network, step_network
from server_sdk.reference.split import split


@pytest.mark.parametrize("grid", [(14, 14), (4, 6), (64,)])
def test_reference_network_takes_images_and_signals(grid: tuple[int, ...]) -> None:
    model = reference_network(5, grid, 7).eval()
    x = torch.rand(2, 5, *grid)
    assert model(x).shape == (2, 7)
    front, _ = split(model, "relu2")
    assert front(x).shape == (2, 32, *grid)
    assert [name for name, _ in front.named_children()] == ["conv1", "bn1", "relu1", "conv2", "bn2", "relu2"]


@pytest.mark.parametrize("grid", [(14, 14), (64,)])
def test_a_rank_filters_the_channels_at_the_cut(grid: tuple[int, ...]) -> None:
    model = reference_network(5, grid, 7, rank=4).eval()
    front, back = split(model, "filter")
    activations = front(torch.rand(2, 5, *grid))
    assert activations.shape == (2, 4, *grid)
    assert back(activations).shape == (2, 7)
    with pytest.raises(ModelError, match="rank"):
        reference_network(5, grid, 7, rank=-1)


def test_lists_are_taken_as_grids() -> None:
    assert reference_network(3, [8, 8], 2)(torch.rand(2, 3, 8, 8)).shape == (2, 2)


@pytest.mark.parametrize("grid", [(), (8, 8, 8), (8, 3)])
def test_grids_without_a_network_are_refused(grid: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="grid"):
        reference_network(3, grid, 2)


@pytest.mark.parametrize("grid", [(14, 14), (4, 6), (5, 7), (9, 4), (64,), (47,)])
def test_hardened_network_ends_its_front_in_a_bounded_vector(grid: tuple[int, ...]) -> None:
    model = hardened_network(5, grid, 7, code=12).eval()
    x = torch.rand(2, 5, *grid)
    assert model(x).shape == (2, 7)
    front, back = split(model, "tanh")
    code = front(50 * x)
    assert code.shape == (2, 12) and code.abs().max() <= 1
    assert back(code).shape == (2, 7)
    names = [name for name, _ in model.named_children()]
    convolutions = [f"{kind}{number}" for number in range(1, 5) for kind in ("conv", "bn", "relu")]
    assert names[:12] == convolutions
    assert names[12:] == ["pool", "dropout", "flatten", "code", "codebn", "tanh", "head"]
    assert set(model.conv1.kernel_size) == {3 if len(grid) == 2 else 9}
    assert [set(getattr(model, f"conv{n}").stride) for n in range(1, 5)] == [{1}, {2}, {1}, {2}]


@pytest.mark.parametrize(
    "options",
    [{"widths": (4, 4, 4)}, {"code": 0}, {"dropout": 1.0}, {"kernel": 4}, {"cells": 0}, {"widths": (4, 0, 4, 4)}],
)
def test_hardened_networks_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="four widths"):
        hardened_network(3, (8, 8), 2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", [(), (8, 8, 8), (8, 3)])
def test_grids_without_a_hardened_network(grid: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="grid"):
        hardened_network(3, grid, 2)


def test_step_network_has_the_cut_of_the_benchmark() -> None:
    front, back = split(step_network(10), "pool2")
    activations = front(torch.rand(2, 1, 28, 28))
    assert activations.shape == (2, 32, 7, 7)
    assert back(activations).shape == (2, 10)
