"""What each profile needs before its export: a guide, a trained network, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_sdk.batch import Samples, as_batch
from edge_sdk.bundle import load_bundle
from edge_sdk.front import Front
from export.build import build_bundle
from export.errors import ExportError
from export.options import BuildOptions, class_names, model_of
from export.prepare import prepare, recipe_of, train_undefended
from server_sdk.reference.profiles import PROFILES
from server_sdk.reference.specification import ModelSpec, build

SHAPE = (1, 8, 8)
Draw = Callable[[int, int], Samples]


def options_of(profile: str, **changed: object) -> BuildOptions:
    options = BuildOptions(profile, SHAPE, class_names(3))
    spec = model_of(options)
    if "hardened" in spec.factory:
        options = replace(options, model=replace(spec, arguments={**spec.arguments, "widths": [4, 4, 6, 6]}))
    return replace(options, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("profile", PROFILES)
def test_what_is_prepared_can_be_built(profile: str, samples: Draw, tmp_path: Path) -> None:
    options = options_of(profile)
    wanted = PROFILES[profile]
    recipe = replace(recipe_of(options), steps=3) if wanted.frozen else None
    stages: list[str] = []
    made = prepare(
        samples(30, 1),
        options,
        recipe,
        guide_epochs=1,
        progress=lambda stage, done, of, loss: stages.append(stage),
    )
    assert (made.guide is not None, made.network is not None) == (wanted.perturbation is not None, wanted.frozen)
    assert stages == ["training"] * wanted.frozen + ["fitting the guide"] * (wanted.perturbation is not None)
    build_bundle(tmp_path / "net.psgl", made.options, made.guide, network=made.network)
    manifest = load_bundle(tmp_path / "net.psgl").manifest
    assert (manifest.profile, manifest.frozen, manifest.noise) == (profile, wanted.frozen, wanted.noise)


def test_the_recipe_follows_profile_and_options() -> None:
    hardened, nopeek, adversarial = (recipe_of(options_of(name)) for name in ("hardened", "nopeek", "adversarial"))
    assert (hardened.defence, hardened.noise, hardened.strength) == ("bottleneck", 1.0, 0.3)
    assert (nopeek.defence, nopeek.noise, nopeek.strength, nopeek.spread) == ("nopeek", 0.0, 1.0, None)
    assert adversarial.defence == "adversarial" and adversarial.teacher == 0
    two = recipe_of(BuildOptions("nopeek", SHAPE, class_names(2)))
    assert (two.noise, two.spread, two.teacher) == (0.0, None, 0.0), "what the bottleneck needs is the bottleneck's"
    assert recipe_of(options_of("hardened", noise=0.7)).noise == 0.7
    with pytest.raises(ExportError, match="noise above 0"):
        recipe_of(options_of("hardened", noise=0.0))
    with pytest.raises(ExportError, match="no profile 'nothing': use one of"):
        recipe_of(BuildOptions("nothing", SHAPE, class_names(3)))


def test_the_noise_that_was_trained_for_is_the_bundles(samples: Draw) -> None:
    recipe = replace(recipe_of(options_of("hardened")), steps=2, noise=0.4)
    assert prepare(samples(30, 1), options_of("hardened"), recipe).options.noise == 0.4


def test_the_options_say_how_the_grid_is_halved(samples: Draw) -> None:
    whole = BuildOptions("nopeek", SHAPE, class_names(3), downsample=1)
    recipe = replace(recipe_of(options_of("nopeek")), steps=2)
    assert recipe.downsample == 2
    made = prepare(samples(30, 1), whole, recipe)
    assert made.network is not None and made.network.state_dict()["conv1.weight"].shape[1] == 1


def test_what_cannot_be_prepared_is_refused(samples: Draw) -> None:
    spec = ModelSpec("nowhere:nothing", {}, "cut")
    with pytest.raises(ExportError, match="no profile 'nothing'"):
        prepare(samples(30, 1), BuildOptions("nothing", SHAPE, class_names(3), model=spec))
    with pytest.raises(ExportError, match="give that guide's own samples"):
        prepare(samples(30, 1), options_of("hardened", perturb="sign"))


def test_a_front_that_is_trained_here_can_be_trained_on_what_is_perturbed(samples: Draw, tmp_path: Path) -> None:
    """The whole way: guide, network behind the perturbation, graphs, and what the device's front then sees."""
    plain, watched, perturbed = (
        options_of("hardened", perturb=how, epsilon=epsilon)
        for how, epsilon in ((None, None), ("sign", 0.0), ("sign", 0.3))
    )
    recipe = replace(recipe_of(plain), steps=3)
    mine, theirs = samples(30, 1), samples(40, 2)
    networks = []
    for options in (plain, watched, perturbed):
        made = prepare(mine, options, recipe, guide_samples=theirs, guide_epochs=1)
        assert made.network is not None and (made.guide is None) == (options is plain)
        networks.append(made.network.state_dict())
        built = build_bundle(tmp_path / "net.psgl", made.options, made.guide, network=made.network)
        bundle = load_bundle(built.bundle)
        assert bundle.manifest.frozen and not bundle.manifest.server["map_channel"]
        front = Front(bundle, noise_key=bytes(32))
        state = front.initial_state()
        x = as_batch(samples(6, 3).x, SHAPE, max_batch=6)
        done = front.forward(state, x, None, training=False, noise=0.0)
        moved = np.abs(done.perturbed - x).max()
        assert moved == pytest.approx(0.3 if options is perturbed else 0.0, abs=1e-6)
        still = front.forward(state, x, None, training=False, epsilon=0.0, noise=0.0)
        assert (np.abs(still.activations - done.activations).max() > 1e-3) == (options is perturbed)
    first, same, other = networks
    assert all(torch.equal(first[name], same[name]) for name in first), "a budget of 0 changes nothing"
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_the_undefended_network_is_vanillas_and_the_seeds(samples: Draw) -> None:
    options = options_of("hardened")
    recipe = replace(recipe_of(options), steps=3)
    first, again = (train_undefended(samples(30, 1), options, recipe).state_dict() for _ in range(2))
    vanilla = build(model_of(options_of("vanilla")), 0).state_dict()
    assert first.keys() == vanilla.keys() and all(first[name].shape == vanilla[name].shape for name in first)
    assert all(torch.equal(first[name], again[name]) for name in first)
