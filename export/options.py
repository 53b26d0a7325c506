"""What to build: options of a bundle, and what they come to for a profile, a network and a perturbation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from edge_sdk.batch import Samples
from export.errors import ExportError
from export.optimizer import Optimizer
from server_sdk.reference.perturbation import Perturbation
from server_sdk.reference.profiles import PROFILES, Profile
from server_sdk.reference.specification import ModelSpec

__all__ = ["BuildOptions", "class_names", "measured_range", "model_of", "perturbation_of", "profile_of"]

_PERCENTILES = (0.1, 99.9)


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Attributes:
        profile: a name of ``PROFILES``; what is None below is the profile's.
        input_shape: (C, H, W) or (C, T) of one sample.
        classes: name of each class, in label order.
        seed: of the initial weights.
        optimizer: of the front, on the device.
        max_batch: largest number of samples in one step.
        model: the whole network; None: the profile's network for this shape.
        downsample: 2 moves blocks of two along each spatial axis into channels before the front, 1 leaves the
            grid.
        map_channel: the front sees the perturbation as one more channel; None: as the profile has it.
        weights: safetensors file of the whole model's state to begin with, in place of the seed's.
        guide: network of the guide, built without a cut; None: the reference guide.
        allow_models: factories outside this SDK that may be imported, which runs their code.
        perturb: normalisation of the perturbation, or ``none`` to leave it out; where the profile has none itself, a
            front that is trained here is not shown the map.
        epsilon: budget of the perturbation.
        streams: what the server trains.
        noise: standard deviation of the noise on the activations.
        noise_kind: ``gaussian`` or ``laplace``.
        frozen: export the inference alone: the front is trained already (``network``) and stays as it is.
        weight_bits: of a weight in the bundle of a frozen front, 8 or 32; with 8 the front is rounded before anything
            else is made of it.
        bits: of an activation on the wire, 1, 2, 4 or 8, or 0 for floats.
        span: lowest and highest value that the bits can say, rounded to float32; None where bits come without: those
            of each message.
        bound: of the activations before the noise; the front's last layer must hold it, 0 for no bound.
        offline_guide: where nothing is perturbed, the bundle has a guide that decides where the server cannot be asked.
        perturb_towards: the class that the perturbation attacks in training: the guide's decision, as at
            test, or the true label, which the server then learns to read off the perturbation.
        input_range: sensor values that become 0 and 1, for samples that are signed integers.
    """

    profile: str
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    seed: int = 0
    optimizer: Optimizer = field(default_factory=lambda: Optimizer("adam", learning_rate=1e-3))
    max_batch: int = 256
    model: ModelSpec | None = None
    downsample: int = 2
    map_channel: bool | None = None
    weights: Path | None = None
    guide: ModelSpec | None = None
    allow_models: tuple[str, ...] = ()
    perturb: Literal["sign", "max", "none"] | None = None
    epsilon: float | None = None
    streams: tuple[str, ...] | None = None
    noise: float | None = None
    noise_kind: str | None = None
    frozen: bool | None = None
    weight_bits: int = 32
    bits: int | None = None
    span: tuple[float, float] | None = None
    bound: float | None = None
    offline_guide: bool = False
    perturb_towards: Literal["guide", "label"] = "guide"
    input_range: tuple[float, float] | None = None


def model_of(options: BuildOptions) -> ModelSpec:
    """The network that is exported: the options' own, or the profile's for samples of this shape.

    Raises:
        ExportError: an unknown profile.
    """
    if options.model is not None:
        return options.model
    profile = profile_of(options.profile)
    channels, *axes = options.input_shape
    grid = [size // options.downsample for size in axes]
    perturbation = perturbation_of(options)
    stacked = channels * options.downsample ** len(axes) + (perturbation is not None and perturbation.map_channel)
    arguments = {"in_channels": stacked, "grid": grid, "classes": len(options.classes), **profile.arguments}
    return ModelSpec(profile.factory, arguments, profile.cut)


def profile_of(name: str) -> Profile:
    """The profile of that name.

    Raises:
        ExportError: there is none.
    """
    profile = PROFILES.get(name)
    if profile is None:
        raise ExportError(f"there is no profile {name!r}: use one of {', '.join(PROFILES)}")
    return profile


def perturbation_of(options: BuildOptions) -> Perturbation | None:
    """What the device does to its input, or None: the profile's perturbation, or what the options put in its place.

    Raises:
        ExportError: an unknown profile, or a budget for no perturbation.
        ModelError: an unknown normalisation, or a budget out of range.
    """
    profile = profile_of(options.profile)
    perturbation = profile.perturbation
    if options.perturb is not None:
        shown = not profile.frozen if perturbation is None else perturbation.map_channel
        perturbation = None if options.perturb == "none" else Perturbation(options.perturb, map_channel=shown)
    if perturbation is not None and options.map_channel is not None:
        perturbation = replace(perturbation, map_channel=options.map_channel)
    if options.epsilon is None:
        return perturbation
    if perturbation is None:
        raise ExportError(f"a budget of {options.epsilon:g} and no perturbation to spend it: say which (perturb)")
    return replace(perturbation, epsilon=options.epsilon)


def measured_range(samples: Samples) -> tuple[float, float] | None:
    """The 0.1 and 99.9 percentiles of samples that are signed integers; None for others, which need no range.

    Raises:
        ExportError: samples that hardly vary.
    """
    if samples.x.dtype.kind != "i":
        return None
    low, high = (float(value) for value in np.percentile(samples.x, _PERCENTILES))
    if low >= high:
        raise ExportError(
            f"the samples are {low:g} nearly everywhere: check the sensor, or give --input-range LOW HIGH"
        )
    return low, high


def class_names(classes: int) -> tuple[str, ...]:
    """Names for classes that are only numbered."""
    return tuple(str(number) for number in range(classes))
