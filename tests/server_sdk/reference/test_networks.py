from __future__ import annotations

import pytest
import torch

from server_sdk.errors import ModelError
from server_sdk.reference.networks import reference_network, step_network
from server_sdk.reference.split import split


@pytest.mark.parametrize("grid", [(14, 14), (4, 6), (64,)])
def test_reference_network_takes_images_and_signals(grid: tuple[int, ...]) -> None:
    model = reference_network(5, grid, 7).eval()
    x = torch.rand(2, 5, *grid)
    assert model(x).shape == (2, 7)
    front, _ = split(model, "relu2")
    assert front(x).shape == (2, 32, *grid)
    assert [name for name, _ in front.named_children()] == ["conv1", "bn1", "relu1", "conv2", "bn2", "relu2"]


def test_lists_are_taken_as_grids() -> None:
    assert reference_network(3, [8, 8], 2)(torch.rand(2, 3, 8, 8)).shape == (2, 2)


@pytest.mark.parametrize("grid", [(), (8, 8, 8), (8, 3)])
def test_grids_without_a_network_are_refused(grid: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="grid"):
        reference_network(3, grid, 2)


def test_step_network_has_the_cut_of_the_benchmark() -> None:
    front, back = split(step_network(10), "pool2")
    activations = front(torch.rand(2, 1, 28, 28))
    assert activations.shape == (2, 32, 7, 7)
    assert back(activations).shape == (2, 10)
