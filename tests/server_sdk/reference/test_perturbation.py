"""The perturbation against its definition, one sample and one class at a time, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from server_sdk.errors import ModelError
from server_sdk.reference.guide import Guide
from server_sdk.reference.perturbation import (
    Perturbation,
    front_input,
    normalise,
    perturb,
    saliency_map,
    space_to_depth,
)

SHAPES = [(1, 8, 8), (3, 8, 12), (2, 20)]


def _guide(shape: tuple[int, ...]) -> Guide:
    torch.manual_seed(len(shape))
    return Guide(shape, 4).double().eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_space_to_depth_loses_nothing(shape: tuple[int, ...]) -> None:
    x = torch.arange(2 * torch.Size(shape).numel()).reshape(2, *shape).float()
    blocks = space_to_depth(x)
    assert blocks.shape == (2, shape[0] * 2 ** (len(shape) - 1), *(extent // 2 for extent in shape[1:]))
    assert sorted(blocks.flatten().tolist()) == sorted(x.flatten().tolist())
    planes = []
    for channel in range(shape[0]):
        for row in range(2):
            image = [x[:, channel, row::2, column::2] for column in range(2)] if len(shape) == 3 else []
            planes += image or [x[:, channel, row::2]]
    assert torch.equal(blocks, torch.stack(planes, 1))


def test_space_to_depth_orders_image_channels_as_pixel_unshuffle() -> None:
    x = torch.rand(2, 3, 6, 4)
    assert torch.equal(space_to_depth(x), nn.PixelUnshuffle(2)(x))


@pytest.mark.parametrize("shape", [(2, 3, 7, 8), (2, 3, 9)])
def test_space_to_depth_refuses_odd_grids(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="multiple of 2"):
        space_to_depth(torch.zeros(shape))


def _definition(guide: nn.Module, sample: Tensor, label: int) -> Tensor:
    leaf = sample.unsqueeze(0).requires_grad_()
    logits = guide(leaf)[0]
    slopes = [torch.autograd.grad(logit, leaf, retain_graph=True)[0][0] for logit in logits]
    label = int(logits.argmax()) if label < 0 else label
    alpha = slopes[label]
    beta = sum(slope for k, slope in enumerate(slopes) if k != label)
    return torch.where((alpha < 0) & (beta > 0), -alpha * beta, torch.zeros_like(alpha))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_map_is_reversed_jsma(shape: tuple[int, ...]) -> None:
    guide, x, label = _guide(shape), torch.rand(5, *shape).double(), torch.tensor([-1, 0, 1, 2, 3])
    logits, saliency = saliency_map(guide, x, label)
    assert torch.allclose(logits, guide(x))
    wanted = torch.stack([_definition(guide, x[i], int(label[i])) for i in range(5)])
    assert torch.allclose(saliency, wanted, rtol=1e-9, atol=1e-15)
    assert (saliency > 0).any() and (saliency == 0).any()


def test_a_sample_does_not_depend_on_its_batch() -> None:
    guide, x, label = _guide((1, 8, 8)), torch.rand(4, 1, 8, 8).double(), torch.full((4,), -1)
    together = saliency_map(guide, x, label)[1]
    alone = torch.cat([saliency_map(guide, x[i : i + 1], label[i : i + 1])[1] for i in range(4)])
    assert torch.allclose(together, alone)


@given(st.sampled_from(["sign", "max"]), st.floats(0, 1), st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_normalised_maps_keep_the_budget(how: str, epsilon: float, seed: int) -> None:
    saliency = torch.relu(torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(seed))) * 1e-9
    saliency[1] = 0
    scaled = normalise(saliency, how, epsilon)
    assert scaled.min() >= 0 and scaled.max() <= epsilon * (1 + 1e-6)
    assert not scaled[1].any() and torch.isfinite(scaled).all()
    assert torch.allclose(scaled.amax((1, 2))[[0, 2, 3]], torch.tensor(epsilon).float())
    if how == "sign" and epsilon > 1e-30:
        assert torch.equal(scaled > 0, saliency > 0)


def test_max_is_proportional() -> None:
    scaled = normalise(torch.tensor([[[1.0, 2.0, 4.0]]]), "max", 0.2)
    assert torch.allclose(scaled, torch.tensor([[[0.05, 0.1, 0.2]]]))


@pytest.mark.parametrize("how", ["sign", "max"])
def test_perturb_clips_and_epsilon_zero_changes_nothing(how: str) -> None:
    guide, x, label = _guide((1, 8, 8)), torch.rand(3, 1, 8, 8).double(), torch.full((3,), -1)
    result = perturb(guide, x, label, normalisation=how, epsilon=0.9)
    assert torch.equal(result.perturbed, (x + result.map).clamp(0, 1)) and result.map.any()
    assert (x + result.map).max() > 1 and result.perturbed.max() == 1
    still = perturb(guide, x, label, normalisation=how, epsilon=0.0)
    assert torch.equal(still.perturbed, x) and not still.map.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_front_input(shape: tuple[int, ...]) -> None:
    x, scaled = torch.rand(2, *shape), torch.rand(2, *shape)
    axes = len(shape) - 1
    half = tuple(extent // 2 for extent in shape[1:])
    assert torch.equal(front_input(x, None, 1), x)
    assert front_input(x, None, 2).shape == (2, shape[0] * 2**axes, *half)
    assert front_input(x, scaled, 1).shape == (2, shape[0] + 1, *shape[1:])
    seen = front_input(x, scaled, 2)
    assert seen.shape == (2, shape[0] * 2**axes + 1, *half)
    corner = scaled[:, :, :2] if axes == 1 else scaled[:, :, :2, :2]
    first = seen[(slice(None), -1, *[0] * axes)]
    assert torch.allclose(first, corner.flatten(1).mean(1))


@pytest.mark.parametrize("options", [{"normalisation": "soft"}, {"epsilon": 1.5}, {"epsilon": -0.1}])
def test_settings_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ModelError):
        Perturbation(**options)
