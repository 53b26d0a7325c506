"""Each defence's penalty against what can be worked out by hand or slowly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export.defences import DEFENCES, Adversary, Bottleneck, Defence, DistanceCorrelation, Plain, defence_for
from export.errors import ExportError


def made(name: str) -> Defence:
    return defence_for(
        name,
        input_shape=(1, 4, 4),
        cut_shape=(6,),
        classes=3,
        noise=1.0,
        strength=1.0,
        spread=None,
        device=torch.device("cpu"),
    )


def slow_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """The squared sample distance correlation, entry by entry in float64 (Szekely, Rizzo and Bakirov 2007)."""
    n = len(a)

    def centred(rows: np.ndarray) -> np.ndarray:
        distance = np.array([[np.sqrt(((rows[i] - rows[j]) ** 2).sum()) for j in range(n)] for i in range(n)])
        result = np.empty((n, n))
        for i in range(n):
            for j in range(n):
                result[i, j] = distance[i, j] - distance[i].mean() - distance[:, j].mean() + distance.mean()
        return result

    mine, theirs = centred(a.astype(np.float64)), centred(b.astype(np.float64))
    return float((mine * theirs).mean() / np.sqrt((mine**2).mean() * (theirs**2).mean()))


@pytest.mark.parametrize("seed", range(4))
def test_distance_correlation_is_the_definitions(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.rand(20, 1, 4, 4)
    activations = (x.flatten(1)[:, :6] ** 2 + 0.3 * seed * torch.randn(20, 6)).reshape(20, 3, 2)
    got = float(DistanceCorrelation(2.0).penalty(x, activations, torch.zeros(20, 3)))
    expected = slow_correlation(activations.flatten(1).numpy(), x.flatten(1).numpy())
    assert got == pytest.approx(2.0 * expected, abs=2e-3) and 0 <= got <= 2.0


def test_distance_correlation_ends_are_one_and_nearly_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 1, 1, 2, generator=generator)
    turned = 3 * x.flip(3) + 1
    assert float(DistanceCorrelation().penalty(x, turned, x)) == pytest.approx(1.0, abs=1e-3)
    assert float(DistanceCorrelation().penalty(x, torch.rand(200, 2, generator=generator), x)) < 0.1
    assert float(DistanceCorrelation().penalty(x, torch.ones(200, 2), x)) == pytest.approx(0.0, abs=1e-3)


def test_the_bottlenecks_penalty_by_hand() -> None:
    defence = Bottleneck(2, 2, noise=0.5, strength=0.3, spread=0.8)
    centres = defence.centres.detach()
    target = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    activations = torch.tensor([[0.1, -0.2], [0.5, 0.5]])
    pulled = torch.stack([centres[0], 0.25 * centres[0] + 0.75 * centres[1]])
    expected = 0.3 * float((activations - pulled).square().sum(1).mean()) / (2 * 0.25)
    assert float(defence.penalty(torch.zeros(2, 1, 4, 4), activations, target)) == pytest.approx(expected)
    assert defence.parameters() == [] and not defence.centres.requires_grad
    assert float(defence.penalty(torch.zeros(2, 1, 4, 4), pulled, target)) == 0.0


def test_codewords_of_two_classes_are_opposite_and_of_ten_at_right_angles() -> None:
    two = Bottleneck(2, 32, 0.5, spread=0.8).centres
    assert torch.equal(two[0], -two[1]) and torch.allclose(two.abs(), torch.tensor(0.8))
    ten = Bottleneck(10, 32, 0.5, spread=1.0).centres
    assert torch.equal(ten @ ten.T, 32 * torch.eye(10))


def test_classes_that_do_not_fit_into_the_code_and_a_code_without_noise_are_refused() -> None:
    with pytest.raises(ExportError, match="5 classes do not fit into a code of 2"):
        Bottleneck(5, 2, 1.0, spread=0.5)
    assert len(Bottleneck(5, 2, 1.0).parameters()) == 1, "centres that are learned fit anywhere"
    with pytest.raises(ExportError, match="noise above 0"):
        Bottleneck(3, 8, 0.0)


def test_the_adversary_learns_and_its_reward_is_bounded() -> None:
    torch.manual_seed(0)
    adversary = Adversary((1, 4, 4), (16,), strength=2.0, rate=1e-2)
    x = torch.rand(64, 1, 4, 4)
    activations = x.flatten(1)
    before = -adversary.penalty(x, activations, x).item()
    for _ in range(150):
        adversary.learn(x, activations)
    after = -adversary.penalty(x, activations, x).item()
    assert 0 <= after < 0.3 * before and before <= 2.0
    far = -adversary.penalty(x, 1e3 * torch.randn(64, 16), x).item()
    assert far == 2.0, "no more is to be won than the mean sample's error"


def test_what_the_adversary_learns_never_reaches_the_front() -> None:
    adversary = Adversary((1, 4, 4), (6,))
    activations = torch.randn(8, 6, requires_grad=True)
    adversary.learn(torch.rand(8, 1, 4, 4), activations)
    assert activations.grad is None and adversary.parameters() == []


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("name", DEFENCES)
def test_every_defence_has_finite_gradients(name: str, constant: bool) -> None:
    torch.manual_seed(0)
    defence = made(name)
    x = torch.full((8, 1, 4, 4), 0.5) if constant else torch.rand(8, 1, 4, 4)
    activations = (torch.zeros(8, 6) if constant else torch.randn(8, 6)).requires_grad_()
    for _ in range(60 if name == "adversarial" else 1):  # a decoder worse than the mean sample has nothing to give
        defence.learn(x, activations)
    penalty = defence.penalty(x, activations, torch.eye(3)[torch.arange(8) % 3])
    assert penalty.shape == () and torch.isfinite(penalty)
    if isinstance(defence, Plain) and name == "none":
        assert float(penalty) == 0 and not penalty.requires_grad
        return
    penalty.backward()
    assert activations.grad is not None and torch.isfinite(activations.grad).all()
    if not constant:
        assert activations.grad.abs().max() > 0


def test_a_defence_that_is_none_and_one_that_the_cut_does_not_allow() -> None:
    with pytest.raises(ExportError, match="no defence 'magic': use bottleneck, nopeek"):
        made("magic")
    with pytest.raises(ExportError, match="cut behind a Linear"):
        defence_for(
            "bottleneck",
            input_shape=(1, 4, 4),
            cut_shape=(4, 2, 2),
            classes=3,
            noise=1.0,
            strength=1.0,
            spread=None,
            device=torch.device("cpu"),
        )
