from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server_sdk.errors import ServerError
from server_sdk.fusion import BASE_WEIGHTS, fuse


def test_worked_example() -> None:
    probabilities = {
        "attacked": torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64),
        "recovered": torch.tensor([[0.1, 0.8, 0.1], [0.4, 0.4, 0.2]], dtype=torch.float64),
        "fused": torch.tensor([[0.6, 0.2, 0.2], [0.1, 0.0, 0.9]], dtype=torch.float64),
    }
    # Sample 0: w s_max = recovered 0.5*0.8 = 0.40, fused 0.3*0.6 = 0.18, attacked 0.2*0.5 = 0.10; D = 0.68.
    #   gamma = 0.40/0.68 = 10/17, rho = 0.18/0.68 = 4.5/17, 1 - gamma - rho = 2.5/17
    #   class 0: (10*0.1 + 4.5*0.6 + 2.5*0.5)/17 = (1.0 + 2.7 + 1.25)/17 = 4.95/17
    #   class 1: (10*0.8 + 4.5*0.2 + 2.5*0.3)/17 = (8.0 + 0.9 + 0.75)/17 = 9.65/17
    #   class 2: (10*0.1 + 4.5*0.2 + 2.5*0.2)/17 = (1.0 + 0.9 + 0.50)/17 = 2.40/17
    # Sample 1: recovered 0.5*0.4 = 0.20, fused 0.3*0.9 = 0.27, attacked 0.2*0.6 = 0.12; D = 0.59.
    #   class 0: (20*0.4 + 27*0.1 + 12*0.2)/59 = (8.0 + 2.7 + 2.4)/59 = 13.1/59
    #   class 1: (20*0.4 + 27*0.0 + 12*0.2)/59 = (8.0 + 0.0 + 2.4)/59 = 10.4/59
    #   class 2: (20*0.2 + 27*0.9 + 12*0.6)/59 = (4.0 + 24.3 + 7.2)/59 = 35.5/59
    expected = torch.tensor([[4.95 / 17, 9.65 / 17, 2.40 / 17], [13.1 / 59, 10.4 / 59, 35.5 / 59]], dtype=torch.float64)
    torch.testing.assert_close(fuse(probabilities), expected)


def test_streams_present_are_renormalised() -> None:
    # attacked 0.2*0.9 = 0.18, recovered 0.5*0.6 = 0.30, D = 0.48: weights 3/8 and 5/8.
    probabilities = {"attacked": torch.tensor([[0.9, 0.1]]), "recovered": torch.tensor([[0.4, 0.6]])}
    expected = torch.tensor([[(3 * 0.9 + 5 * 0.4) / 8, (3 * 0.1 + 5 * 0.6) / 8]])
    torch.testing.assert_close(fuse(probabilities), expected)


def test_one_stream_is_itself() -> None:
    alone = torch.tensor([[0.25, 0.75]])
    assert fuse({"attacked": alone}, {}) is alone


def test_default_weights_are_the_papers() -> None:
    assert dict(BASE_WEIGHTS) == {"recovered": 0.5, "fused": 0.3, "attacked": 0.2}


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    samples=st.integers(1, 5),
    classes=st.integers(2, 6),
    scale=st.floats(0.1, 9.0),
)
def test_result_is_a_distribution_within_the_streams(seed: int, samples: int, classes: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    streams = {
        name: torch.softmax(5 * torch.randn(samples, classes, generator=generator), dim=1) for name in BASE_WEIGHTS
    }
    fused = fuse(streams)
    torch.testing.assert_close(fused.sum(dim=1), torch.ones(samples))
    stacked = torch.stack(list(streams.values()))
    assert (fused >= stacked.amin(dim=0) - 1e-6).all()
    assert (fused <= stacked.amax(dim=0) + 1e-6).all()
    scaled = {name: scale * weight for name, weight in BASE_WEIGHTS.items()}
    torch.testing.assert_close(fuse(streams, scaled), fused)  # only the ratios of the weights count
    reordered = {name: streams[name] for name in reversed(streams)}
    torch.testing.assert_close(fuse(reordered), fused)


@pytest.mark.parametrize(
    ("probabilities", "weights", "remedy"),
    [
        ({}, BASE_WEIGHTS, "at least one"),
        ({"attacked": torch.ones(2, 3), "fused": torch.ones(2, 4)}, BASE_WEIGHTS, "give all of them as"),
        ({"attacked": torch.ones(3), "fused": torch.ones(3)}, BASE_WEIGHTS, "give all of them as"),
        (
            {"attacked": torch.ones(2, 3), "fused": torch.ones(2, 3)},
            {"fused": 1.0},
            "'attacked' has the base weight",
        ),
        (
            {"attacked": torch.ones(2, 3), "fused": torch.ones(2, 3)},
            {"fused": 0.0, "attacked": 1.0},
            "positive one",
        ),
    ],
)
def test_refusals_name_the_remedy(
    probabilities: dict[str, torch.Tensor], weights: dict[str, float], remedy: str
) -> None:
    with pytest.raises(ServerError, match=remedy):
        fuse(probabilities, weights)
