"""What a profile needs before it can be exported: a guide for its perturbation, or a network that is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from edge_sdk.batch import Samples
from export.build import prepare_guide
from export.errors import ExportError
from export.harden import Progress, Recipe, recipe_for, train_network
from export.options import BuildOptions, model_of, perturbation_of, profile_of
from export.own import initial_network
from server_sdk.reference.coded import uncoded
from server_sdk.reference.specification import build

__all__ = ["Prepared", "prepare", "recipe_of", "train_undefended"]

_STRENGTHS = {"nopeek": 1.0, "adversarial": 1.0}


@dataclass(frozen=True)
class Prepared:
    """What ``build_bundle`` takes.

    Attributes:
        options: as they were given, with the noise that the network was trained for.
        guide: or None where nothing is perturbed and no guide decides.
        network: trained, or with the weights that the options name; None for initial weights.
    """

    options: BuildOptions
    guide: nn.Module | None
    network: nn.Module | None


def prepare(
    samples: Samples,
    options: BuildOptions,
    recipe: Recipe | None = None,
    *,
    guide_samples: Samples | None = None,
    guide_epochs: int = 30,
    progress: Progress | None = None,
) -> Prepared:
    """Fit the guide, train the network of the options' profile, or both.

    A guide must never see what it perturbs; one that only decides sees all samples.

    Args:
        samples: what a frozen front is trained on, and what the guide is fitted on where it has no samples of its own.
        recipe: of the training, but for ``downsample``, which is the options'; None: ``recipe_of`` these options.
        guide_samples: no device's, and none of those that a frozen front is trained on.
        guide_epochs: passes of the guide over its samples.

    Raises:
        ExportError, ModelError, BatchError: options, network or samples that cannot be used.
    """
    profile = profile_of(options.profile)
    model = model_of(options)
    frozen = profile.frozen if options.frozen is None else options.frozen
    perturbation = perturbation_of(options)
    guide = None
    if perturbation is not None or options.offline_guide:
        if perturbation is not None and frozen and guide_samples is None:
            raise ExportError("a front that is trained here on what a guide perturbs: give that guide's own samples")

        def report(done: int, of: int, loss: float) -> None:
            if progress is not None:
                progress("fitting the guide", done, of, loss)

        guide = prepare_guide(
            samples if guide_samples is None else guide_samples,
            len(options.classes),
            seed=options.seed,
            epochs=guide_epochs,
            input_range=options.input_range,
            network=None
            if options.guide is None
            else build(options.guide, options.seed, allow_models=options.allow_models),
            progress=report,
        )
    if frozen:
        recipe = replace(recipe_of(options) if recipe is None else recipe, downsample=options.downsample)
        network = train_network(
            samples,
            model,
            recipe,
            input_shape=options.input_shape,
            classes=len(options.classes),
            seed=options.seed,
            input_range=options.input_range,
            teacher=model_of(_undefended(options)),
            initial=initial_network(options),
            allow_models=options.allow_models,
            attack=None if guide is None or perturbation is None else (perturbation, guide),
            progress=progress,
        )
        return Prepared(replace(options, noise=recipe.noise), guide, network)
    return Prepared(options, guide, initial_network(options))


def _undefended(options: BuildOptions) -> BuildOptions:
    own = options.model
    if own is not None and not options.allow_models and uncoded(own) is own:
        own = None  # a network of this SDK's is compared with the undefended profile's
    plain = replace(options, profile="vanilla", perturb=None, epsilon=None)
    if own is None:
        return replace(plain, model=None, weights=None)
    return replace(plain, model=uncoded(own))


def recipe_of(options: BuildOptions) -> Recipe:
    """How the network of these options is trained where nothing else is said.

    Raises:
        ExportError: an unknown profile.
    """
    profile = profile_of(options.profile)
    recipe = replace(
        recipe_for(options.input_shape, len(options.classes)), defence=profile.defence, downsample=options.downsample
    )
    if profile.defence != "bottleneck":
        strength = _STRENGTHS.get(profile.defence, 0.0)
        recipe = replace(recipe, noise=profile.noise, strength=strength, spread=None, teacher=0.0, learning_rate=2e-3)
    return recipe if options.noise is None else replace(recipe, noise=options.noise)


def train_undefended(
    samples: Samples, options: BuildOptions, recipe: Recipe, *, progress: Progress | None = None
) -> nn.Module:
    """The network of profile ``vanilla``, or of your own, trained as long without a defence: to compare with.

    Returns:
        The network in evaluation mode; it takes what ``front_input`` gives.

    Raises:
        ExportError, ModelError, BatchError: as ``prepare``.
    """
    plain = replace(
        recipe,
        defence="none",
        noise=0.0,
        spread=None,
        teacher=0.0,
        learning_rate=2e-3,
        downsample=options.downsample,
    )
    undefended = _undefended(options)
    return train_network(
        samples,
        model_of(undefended),
        plain,
        input_shape=options.input_shape,
        classes=len(options.classes),
        seed=options.seed,
        input_range=options.input_range,
        initial=initial_network(undefended),
        allow_models=options.allow_models,
        progress=progress,
    )
