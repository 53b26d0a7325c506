"""Training at export time, on the three easy patterns: repeatable, bounded, and with teachers that never saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edge_sdk.batch import Samples
from edge_sdk.errors import BatchError
from export.defences import Bottleneck
from export.errors import ExportError
from export.harden import Recipe, _augmented, _judgements, _Network, recipe_for, train_network
from export.options import BuildOptions, class_names, model_of
from server_sdk.reference.perturbation import front_input
from server_sdk.reference.specification import ModelSpec
from server_sdk.reference.split import split

SHAPE = (1, 8, 8)
QUICK = Recipe(steps=60, batch=32, shift=0, noise=0.5, learning_rate=1e-2)
Draw = Callable[[int, int], Samples]


def network_of(profile: str = "hardened") -> ModelSpec:
    spec = model_of(BuildOptions(profile, SHAPE, class_names(3)))
    small = {"widths": [4, 4, 6, 6], "code": 8, "dropout": 0.0} if "hardened" in spec.factory else {}
    return replace(spec, arguments={**spec.arguments, **small})


def trained(samples: Samples, recipe: Recipe = QUICK, *, seed: int = 0, **how: Any) -> nn.Sequential:
    return train_network(samples, network_of(), recipe, input_shape=SHAPE, classes=3, seed=seed, **how)


def codes(network: nn.Sequential, samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and logits."""
    front, back = split(network, "tanh")
    with torch.no_grad():
        code = front(front_input(torch.from_numpy(samples.x.astype(np.float32) / 255), None, 2))
        return code, back(code)


def test_it_learns_with_a_bounded_code_and_leaves_torchs_random_state_alone(samples: Draw) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    network = trained(samples(90, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not network.training
    held_out = samples(60, 2)
    code, logits = codes(network, held_out)
    assert code.abs().max() <= 1
    assert float((logits.argmax(1).numpy() == held_out.y).mean()) > 0.9


def test_the_seed_decides_the_weights(samples: Draw) -> None:
    first, again, other = (
        trained(samples(30, 1), replace(QUICK, steps=5, shift=1, flip=True), seed=seed).state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_more_strength_lowers_what_the_code_says_beyond_the_class(samples: Draw) -> None:
    held_out = samples(90, 2)
    target = nn.functional.one_hot(torch.from_numpy(held_out.y), 3).float()
    bound = Bottleneck(3, 8, QUICK.noise, 1.0, spread=0.8)

    def nats(strength: float) -> float:
        code, logits = codes(trained(samples(90, 1), replace(QUICK, strength=strength, spread=0.8)), held_out)
        assert float((logits.argmax(1).numpy() == held_out.y).mean()) > 0.9
        return float(bound.penalty(code, code, target))

    assert nats(3.0) < 0.2 * nats(0.0)


@pytest.mark.parametrize("defence", ["nopeek", "adversarial", "none"])
def test_baselines_are_trained_by_the_same_loop(defence: str, samples: Draw) -> None:
    stages: list[tuple[str, int, int]] = []
    network = trained(
        samples(30, 1),
        replace(QUICK, steps=25, defence=defence),
        progress=lambda stage, done, of, loss: stages.append((stage, done, of)),
    )
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())
    stage = "training without a defence" if defence == "none" else "training"
    assert stages == [(stage, 20, 25), (stage, 25, 25)]


@pytest.mark.parametrize("grouped", [False, True])
def test_teachers_never_judge_what_they_saw(grouped: bool, samples: Draw) -> None:
    """Labels are random: who says them better than chance has seen them."""
    drawn = samples(60, 3)
    generator = np.random.default_rng(0)
    # Of one group all samples are alike and share their label, so a fold that cuts through a group leaks too.
    groups = np.repeat(np.arange(12), 5) if grouped else np.arange(60)
    x = drawn.x[groups] if grouped else drawn.x
    y = generator.integers(0, 3, 12)[groups] if grouped else generator.integers(0, 3, 60)
    floats = torch.from_numpy(x.astype(np.float32) / 255)
    target = nn.functional.one_hot(torch.from_numpy(y), 3).float()
    recipe = replace(QUICK, teacher=1.0, teacher_steps=60, folds=4)
    plain = _Network(network_of("vanilla"), None, ())

    def told(known: np.ndarray | None) -> float:
        judged = _judgements(floats, target, plain, recipe, 0, known, None)
        assert torch.allclose(judged.sum(1), torch.ones(60)), "each sample is judged, once"
        return float((judged.argmax(1).numpy() == y).mean())

    kept = told(groups if grouped else None)
    assert kept < 0.6, "chance is a third"
    if grouped:
        assert told(None) > 0.8 > kept, "the same samples leak where groups are cut through"


def test_judgements_of_learnable_labels_are_good(samples: Draw) -> None:
    drawn = samples(60, 3)
    target = nn.functional.one_hot(torch.from_numpy(drawn.y), 3).float()
    floats = torch.from_numpy(drawn.x.astype(np.float32) / 255)
    recipe = replace(QUICK, teacher=1.0, teacher_steps=40, folds=2)
    judged = _judgements(floats, target, _Network(network_of("vanilla"), None, ()), recipe, 0, None, None)
    assert float((judged.argmax(1).numpy() == drawn.y).mean()) > 0.9


def test_a_recipe_with_teachers_trains_them_first(samples: Draw) -> None:
    stages: list[str] = []
    recipe = replace(QUICK, steps=3, teacher=0.5, teacher_steps=2, folds=2)
    trained(
        samples(30, 1),
        recipe,
        teacher=network_of("vanilla"),
        progress=lambda stage, done, of, loss: stages.append(stage),
    )
    assert stages == ["teacher 1 of 2", "teacher 2 of 2", "training"]
    with pytest.raises(ExportError, match="say which network"):
        trained(samples(30, 1), recipe)
    few = replace(samples(30, 1), groups=np.zeros(30, np.int64))
    with pytest.raises(ExportError, match="1 groups of samples for 2 teachers: use fewer folds"):
        trained(few, recipe, teacher=network_of("vanilla"))


@pytest.mark.parametrize("shape", [(20, 3, 8, 10), (20, 2, 16)])
def test_augmentation_moves_whole_samples_by_whole_cells(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(shape, generator=generator)
    assert _augmented(x, Recipe(shift=0)) is x
    torch.manual_seed(0)
    moved = _augmented(x, Recipe(shift=2))
    torch.manual_seed(0)
    assert torch.equal(moved, _augmented(x, Recipe(shift=2))) and not torch.equal(moved, x)
    assert moved.shape == x.shape and moved.min() >= 0 and moved.max() <= 1
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), *(((2, 2),) * (len(shape) - 2))), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, shape[2:], axis=tuple(range(2, len(shape))))
    for n in range(len(x)):
        candidates = windows[n].reshape(shape[1], -1, *shape[2:]).swapaxes(0, 1)
        assert any(np.array_equal(moved[n], each) for each in candidates), "all channels by the same offset"


def test_flips_mirror_some_images_and_no_signal() -> None:
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    flipped = _augmented(x, Recipe(shift=0, flip=True))
    same = [torch.equal(a, b) for a, b in zip(flipped, x, strict=True)]
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(flipped, x, strict=True)]
    assert 5 < sum(same) < 35 and sum(same) + sum(mirrored) == 40
    signal = torch.rand(4, 1, 8)
    assert torch.equal(_augmented(signal, Recipe(shift=0, flip=True)), signal)


def test_the_recipe_follows_the_kind_of_samples() -> None:
    many, two, signal = recipe_for((1, 28, 28), 10), recipe_for((1, 28, 28), 2), recipe_for((1, 256), 2)
    assert (many.noise, many.spread, many.teacher, many.shift) == (1.0, None, 0.0, 2)
    assert two.noise < many.noise and two.spread is not None and two.teacher > 0
    assert signal.shift == 8 and signal.teacher_steps > two.teacher_steps
    assert recipe_for(SHAPE, 3).shift == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch": 1},
        {"teacher_steps": 0},
        {"folds": 1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"weight_decay": -1.0},
        {"noise": -0.1},
        {"noise": float("inf")},
        {"noise": 0.0},
        {"strength": -1.0},
        {"strength": float("nan")},
        {"shift": -1},
        {"teacher": 1.1},
        {"teacher": float("nan")},
        {"spread": 0.0},
        {"spread": 1.5},
        {"defence": "magic"},
        {"compute": "tpu"},
        {"downsample": 3},
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused_when_it_is_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(ExportError):
        Recipe(**wrong)


def test_a_loss_that_is_not_finite_and_samples_that_do_not_fit(samples: Draw) -> None:
    with pytest.raises(ExportError, match="lower learning_rate or strength"):
        trained(samples(30, 1), replace(QUICK, steps=25, learning_rate=1e30))
    wrong = samples(30, 1)
    with pytest.raises(BatchError, match="labels are 0 to 2"):
        trained(replace(wrong, y=wrong.y + 1))
    with pytest.raises(BatchError, match="NaN"):
        trained(replace(wrong, x=np.full((30, 1, 8, 8), np.nan, np.float32)))
