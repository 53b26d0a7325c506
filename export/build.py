"""A network and a guide's samples become a bundle: fit the guide, export the graphs, check them, write the file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from torch import nn

from edge_sdk.batch import Samples, as_batch
from edge_sdk.bundle import INITIAL, Manifest, write_bundle
from edge_sdk.codec import pack_tensors
from edge_sdk.version import __version__
from export.errors import ExportError
from export.graphs import GraphSet, Optimizer, build_graphs
from export.parity import check_parity
from server_sdk.assembly import back_path
from server_sdk.reference.guide import Guide, fit_guide
from server_sdk.reference.perturbation import front_input
from server_sdk.reference.profiles import PROFILES, Profile, ServerPart
from server_sdk.reference.specification import ModelSpec, build
from server_sdk.reference.split import split

__all__ = ["BuildOptions", "Built", "build_bundle", "class_names", "measured_range", "prepare_guide"]

_PERCENTILES = (0.1, 99.9)
REFERENCE = "server_sdk.reference.networks:reference_network"


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Attributes:
        profile: ``vanilla``, ``gaussian`` or ``paper``.
        input_shape: (C, H, W) or (C, T) of one sample.
        classes: name of each class, in label order.
        seed: of the initial weights.
        optimizer: of the front, on the device.
        max_batch: largest number of samples in one step.
        model: the whole network; None: the reference network for this shape.
        downsample: 2 moves blocks of two along each spatial axis into channels before the front, 1 leaves the
            grid.
        epsilon: in place of the profile's.
        noise: standard deviation of the noise on the activations, in place of the profile's.
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
    epsilon: float | None = None
    noise: float | None = None
    perturb_towards: Literal["guide", "label"] = "guide"
    input_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Built:
    """What was written.

    Attributes:
        bundle: the device's file.
        back: the server's initial weights beside it.
        bundle_id: stands for every byte of the bundle.
        worst_error: largest difference between a graph's output and torch's, relative to the output's size.
    """

    bundle: Path
    back: Path
    bundle_id: str
    worst_error: float


def prepare_guide(
    samples: Samples,
    classes: int,
    *,
    seed: int,
    epochs: int = 30,
    input_range: tuple[float, float] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Guide:
    """Fit the guide on samples that no device holds.

    A guide that has seen what it perturbs writes the label into the perturbation, where the server reads it.

    Args:
        input_range: the bundle's, where the samples are signed integers.

    Raises:
        BatchError, ModelError: the samples do not fit.
    """
    shape = tuple(int(size) for size in samples.x.shape[1:])
    x = as_batch(samples.x, shape, max_batch=len(samples), input_range=input_range)
    return fit_guide(x, samples.y, classes=classes, seed=seed, epochs=epochs, progress=progress)


def build_bundle(out: Path, options: BuildOptions, guide: Guide | None) -> Built:
    """Export one bundle and the back's weights beside it.

    Args:
        out: the bundle to write, for instance ``net.psgl``.
        guide: from ``prepare_guide``; needed where the profile perturbs.

    Raises:
        ExportError: an unknown profile, a model that cannot be exported, or graphs that do not compute what
        torch does.
        ModelError: the network cannot be built or split.
        BundleError: the file cannot be written.
    """
    profile = PROFILES.get(options.profile)
    if profile is None:
        raise ExportError(f"there is no profile {options.profile!r}: use {' or '.join(PROFILES)}")
    perturbation = profile.perturbation
    if perturbation is not None and options.epsilon is not None:
        perturbation = type(perturbation)(perturbation.normalisation, options.epsilon)
    noise = profile.noise if options.noise is None else options.noise
    model = options.model or _reference(options, profile)
    front, back = split(build(model, options.seed), model.cut)
    graphs = build_graphs(
        front,
        guide,
        input_shape=options.input_shape,
        perturbation=perturbation,
        downsample=options.downsample,
        optimizer=options.optimizer,
        noise=noise > 0,
    )
    worst = check_parity(
        graphs,
        front,
        guide,
        options.input_shape,
        perturbation,
        options.downsample,
        options.optimizer,
        noise=noise > 0,
    )
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in back.state_dict().items()})
    part = ServerPart(model, options.seed, hashlib.sha256(weights).hexdigest(), profile.streams)
    manifest = Manifest(
        profile=options.profile,
        input_shape=options.input_shape,
        classes=options.classes,
        cut_shape=_cut_shape(front, options, perturbed=perturbation is not None),
        optimizer=options.optimizer.kind,
        learning_rate=options.optimizer.learning_rate,
        normalisation=perturbation.normalisation if perturbation else None,
        epsilon=perturbation.epsilon if perturbation else 0.0,
        perturb_towards=options.perturb_towards,
        noise=noise,
        max_batch=options.max_batch,
        input_range=options.input_range,
        server=part.as_manifest(),
        versions={"psgl": __version__, **{name: version(name) for name in ("torch", "onnx", "onnxruntime")}},
    )
    bundle_id = write_bundle(out, manifest, _files(graphs))
    beside = back_path(out)
    try:
        beside.write_bytes(weights)
    except OSError as exc:
        raise ExportError(f"{beside} cannot be written: {exc.strerror or exc}") from exc
    return Built(out, beside, bundle_id, worst)


def _reference(options: BuildOptions, profile: Profile) -> ModelSpec:
    channels, *axes = options.input_shape
    grid = [size // options.downsample for size in axes]
    stacked = channels * options.downsample ** len(axes) + (1 if profile.perturbation else 0)
    return ModelSpec(REFERENCE, {"in_channels": stacked, "grid": grid, "classes": len(options.classes)}, "relu2")


def _cut_shape(front: nn.Module, options: BuildOptions, *, perturbed: bool) -> tuple[int, ...]:
    x = torch.zeros(1, *options.input_shape)
    with torch.no_grad():
        sees = front_input(x, x if perturbed else None, options.downsample)
        training = front.training
        activations = front.eval()(sees)
        front.train(training)
    return tuple(int(size) for size in activations.shape[1:])


def _files(graphs: GraphSet) -> dict[str, bytes]:
    return {
        "train.onnx": graphs.train,
        "infer.onnx": graphs.infer,
        "prepare.onnx": graphs.prepare,
        "backward.onnx": graphs.backward,
        INITIAL: pack_tensors(graphs.tensors),
    }


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
