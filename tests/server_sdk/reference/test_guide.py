from __future__ import annotations

import numpy as np
import pytest
import torch

from server_sdk.errors import ModelError
from server_sdk.reference.guide import Guide, fit_guide


def _bars(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two classes that a glance tells apart: rows and columns, with noise."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 2, count)
    x = generator.random((count, 1, 8, 8)) * 0.4
    x[y == 0, :, ::2] += 0.5
    x[y == 1, :, :, ::2] += 0.5
    return x.astype(np.float32), y.astype(np.int64)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 10), (2, 30)])
def test_logits_per_sample(shape: tuple[int, ...]) -> None:
    guide = Guide(shape, 7)
    assert guide(torch.rand(2, *shape)).shape == (2, 7)


def test_it_is_small() -> None:
    """At most 0.6 M multiplications at 28x28, counted from the shapes that the layers see."""
    guide, products = Guide((1, 28, 28), 10), []

    def count(layer: torch.nn.Module, _: object, out: torch.Tensor) -> None:
        products.append(layer.weight[0].numel() * out[0].numel())

    for layer in (guide.conv1, guide.conv2, guide.head):
        layer.register_forward_hook(count)
    guide(torch.rand(1, 1, 28, 28))
    assert len(products) == 3 and 1e5 < sum(products) <= 6e5


@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [
        ((1, 9, 8), 2, "even"),
        ((1, 6, 8), 2, "at least 8"),
        ((1, 8, 8, 8), 2, "neither"),
        ((1, 8, 8), 1, "2 classes"),
    ],
)
def test_what_it_cannot_take_is_named(shape: tuple[int, ...], classes: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Guide(shape, classes)


def test_fitting_learns_is_repeatable_and_leaves_the_random_state_alone() -> None:
    x, y = _bars(320, 0)
    seen: list[tuple[int, int, float]] = []
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    guide = fit_guide(x, y, classes=2, seed=1, epochs=8, progress=lambda *at: seen.append(at))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not guide.training
    assert [(done, total) for done, total, _ in seen] == [(i + 1, 8) for i in range(8)]
    assert seen[-1][2] < seen[0][2] / 2
    held_x, held_y = _bars(80, 9)
    assert (guide(torch.from_numpy(held_x)).argmax(1).numpy() == held_y).mean() > 0.9
    again = fit_guide(x, y, classes=2, seed=1, epochs=8)
    other = fit_guide(x, y, classes=2, seed=2, epochs=8)
    assert torch.equal(guide.head.weight, again.head.weight)
    assert not torch.equal(guide.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("labels", "epochs", "message"),
    [
        ([0, 1], 1, "2 labels"),
        ([0, 1, 2, 0], 1, r"0\.\.2"),
        ([0, 1, -1, 0], 1, "-1"),
        ([0, 1, 0, 1], 0, "epochs"),
    ],
)
def test_bad_samples_are_refused(labels: list[int], epochs: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        fit_guide(np.zeros((4, 1, 8, 8), np.float32), np.array(labels), classes=2, seed=0, epochs=epochs)
