"""A network and a guide's samples become a bundle: fit the guide, export the graphs, check them, write the file."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import nn

from edge_sdk.batch import Samples, as_batch
from edge_sdk.bundle import INITIAL, PARITY, Manifest, write_bundle
from edge_sdk.codec import pack_tensors
from edge_sdk.compact import compacted, expanded
from edge_sdk.errors import ConfigError
from edge_sdk.noise import NOISE_KINDS
from edge_sdk.packing import Packing
from edge_sdk.signing import SigningKey
from edge_sdk.version import __version__
from export.costs import facts_of
from export.errors import ExportError
from export.graphs import GraphSet, build_graphs
from export.offline_guide import guide_graph
from export.options import BuildOptions, model_of, perturbation_of, profile_of
from export.parity import check_parity
from server_sdk.assembly import back_path
from server_sdk.reference.guide import fit_guide
from server_sdk.reference.perturbation import Perturbation, front_input
from server_sdk.reference.profiles import Profile, ServerPart
from server_sdk.reference.specification import build
from server_sdk.reference.split import last_layer, split
from server_sdk.streams import STREAMS

__all__ = [
    "Built",
    "build_bundle",
    "prepare_guide",
]

_BOUNDS: tuple[tuple[type[nn.Module], float], ...] = ((nn.Tanh, 1.0), (nn.Sigmoid, 1.0), (nn.ReLU6, 6.0))


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
    network: nn.Module | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> nn.Module:
    """Fit the guide on samples that no device holds.

    A guide that has seen what it perturbs writes the label into the perturbation, where the server reads it.

    Args:
        input_range: the bundle's, where the samples are signed integers.
        network: the guide to fit; None: the reference guide.

    Raises:
        BatchError, ModelError: the samples do not fit.
    """
    shape = tuple(int(size) for size in samples.x.shape[1:])
    x = as_batch(samples.x, shape, max_batch=len(samples), input_range=input_range)
    return fit_guide(x, samples.y, classes=classes, seed=seed, epochs=epochs, network=network, progress=progress)


def build_bundle(
    out: Path,
    options: BuildOptions,
    guide: nn.Module | None,
    *,
    network: nn.Module | None = None,
    sign_key: SigningKey | None = None,
) -> Built:
    """Export one bundle and the back's weights beside it.

    Args:
        out: the bundle to write, for instance ``net.psgl``.
        guide: from ``prepare_guide``; needed where the profile perturbs, and with ``offline_guide``.
        network: the whole network, trained: its front's weights and statistics go into the bundle, its back's beside
            it. None: initial weights from the seed, which a frozen front cannot do with. It is not changed.
        sign_key: signs the bundle.

    Raises:
        ExportError: an unknown profile, a model that cannot be exported, graphs that do not compute what torch does, a
            network that is not the model's, a bound that the front does not hold, or a frozen front without a network.
        ModelError: the network cannot be built or split.
        BundleError: the file cannot be written.
    """
    profile = profile_of(options.profile)
    perturbation = perturbation_of(options)
    wanted, span = _settings(options, profile)
    model = model_of(options)
    whole = build(model, options.seed, allow_models=options.allow_models)
    if network is not None:
        whole = _trained(whole, network)
    elif wanted.frozen:
        raise ExportError(
            f"profile {options.profile!r} has a frozen front, which must be trained before it is exported: "
            "give build_bundle what export.harden.train_network returns"
        )
    front, back = split(whole, model.cut)
    if options.weight_bits not in (8, 32) or (options.weight_bits == 8 and not wanted.frozen):
        raise ExportError(
            f"weights in {options.weight_bits} bits: 8 or 32 can be, and 8 alone where the front is frozen, for "
            "training goes on from exact ones"
        )
    compact = _rounded(front) if options.weight_bits == 8 else {}
    aside: bytes | None = None
    if options.offline_guide and perturbation is None:
        guide, aside = _offline(guide, options)
    _check_bound(front, wanted.bound)
    _check_halves(whole, front, back, options, perturbation)
    graphs = build_graphs(
        front,
        guide,
        input_shape=options.input_shape,
        perturbation=perturbation,
        downsample=options.downsample,
        optimizer=options.optimizer,
        noise=wanted.noise > 0,
        frozen=wanted.frozen,
    )
    graphs = replace(graphs, guide=aside)
    facts = facts_of(graphs.by_name, graphs.tensors, perturbation.epsilon if perturbation else 0.0)
    worst = max(
        check_parity(
            graphs,
            front,
            guide,
            options.input_shape,
            perturbation,
            options.downsample,
            options.optimizer,
            noise=wanted.noise > 0,
            vectors=vectors,
        )
        for vectors in (None, facts.given)
    )
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in back.state_dict().items()})
    cut_shape = _cut_shape(front, options, perturbation)
    part = ServerPart(
        model,
        options.seed,
        hashlib.sha256(weights).hexdigest(),
        _streams(options, profile, cut_shape),
        map_channel=perturbation is not None and perturbation.map_channel,
        downsample=options.downsample if options.allow_models else None,
    )
    manifest = Manifest(
        profile=options.profile,
        input_shape=options.input_shape,
        classes=options.classes,
        cut_shape=cut_shape,
        optimizer=options.optimizer.kind,
        learning_rate=options.optimizer.learning_rate,
        normalisation=perturbation.normalisation if perturbation else None,
        epsilon=perturbation.epsilon if perturbation else 0.0,
        perturb_towards=options.perturb_towards,
        noise=wanted.noise,
        noise_kind=wanted.noise_kind,
        frozen=wanted.frozen,
        bits=wanted.bits,
        span=span,
        bound=wanted.bound,
        max_batch=options.max_batch,
        input_range=options.input_range,
        interfaces=facts.interfaces,
        costs=facts.costs,
        server=part.as_manifest(),
        versions={"psgl": __version__, **{name: version(name) for name in ("torch", "onnx", "onnxruntime")}},
    )
    bundle_id = write_bundle(out, manifest, {**_files(graphs, compact), PARITY: facts.parity}, sign_key=sign_key)
    beside = back_path(out)
    try:
        beside.write_bytes(weights)
    except OSError as exc:
        raise ExportError(f"{beside} cannot be written: {exc.strerror or exc}") from exc
    return Built(out, beside, bundle_id, worst)


def _offline(guide: nn.Module | None, options: BuildOptions) -> tuple[nn.Module, bytes]:
    """A guide that only decides, rounded as the front is, and its graph."""
    if guide is None:
        raise ExportError("a guide that decides without a server: give build_bundle one, from prepare_guide")
    guide = copy.deepcopy(guide).eval()
    compact = _rounded(guide) if options.weight_bits == 8 else None
    return guide, guide_graph(guide, options.input_shape, compact)


def _settings(options: BuildOptions, profile: Profile) -> tuple[Profile, tuple[float, float] | None]:
    """The profile with what the options put in its place, and the range of few bits."""
    names = ("noise", "noise_kind", "frozen", "bits", "bound")
    wanted = replace(profile, **{name: value for name in names if (value := getattr(options, name)) is not None})
    if wanted.noise_kind not in NOISE_KINDS or wanted.noise < 0 or wanted.bound < 0:
        raise ExportError(
            f"noise {wanted.noise} ({wanted.noise_kind}), bound {wanted.bound}: give numbers of at least 0 and "
            f"one of {', '.join(NOISE_KINDS)}"
        )
    span = wanted.span if options.span is None else options.span
    span = None if span is None else (_float32(span[0]), _float32(span[1]))
    try:
        if wanted.bits:
            Packing(wanted.bits, *(span or ()))
    except ConfigError as exc:
        raise ExportError(f"activations cannot be packed so: {exc}") from exc
    return wanted, span


def _float32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _trained(whole: nn.Module, network: nn.Module) -> nn.Module:
    """The model with the network's weights and statistics."""
    try:
        whole.load_state_dict(network.state_dict())
    except (RuntimeError, AttributeError) as exc:
        reason = " ".join(str(exc).split())[:200]
        raise ExportError(f"the network is not the one that the options' model builds: {reason}") from exc
    return whole.eval()


def _check_bound(front: nn.Module, bound: float) -> None:
    """The last layer must keep the bound whatever it is given: what is claimed of privacy rests on it."""
    last = last_layer(front)
    held = max(abs(last.min_val), abs(last.max_val)) if isinstance(last, nn.Hardtanh) else math.inf
    held = min([held, *(most for kind, most in _BOUNDS if isinstance(last, kind))])
    if bound and held > bound:
        raise ExportError(
            f"the front ends in {type(last).__name__}, which does not keep activations within {bound:g}: "
            "end it in Tanh, Sigmoid or Hardtanh, or give bound 0"
        )


def _streams(options: BuildOptions, profile: Profile, cut_shape: tuple[int, ...]) -> tuple[str, ...]:
    wanted = profile.streams if options.streams is None else options.streams
    if not wanted or not set(wanted) <= set(STREAMS):
        raise ExportError(f"streams are {', '.join(wanted) or 'none'}: name some of {', '.join(STREAMS)}")
    if len(cut_shape) == 1 and wanted != ("attacked",):
        raise ExportError(
            f"the cut gives vectors of {cut_shape[0]} values, of which there is nothing to recover: "
            "use the stream attacked alone, or a cut with spatial axes"
        )
    return wanted


def _check_halves(
    whole: nn.Module, front: nn.Module, back: nn.Module, options: BuildOptions, perturbation: Perturbation | None
) -> None:
    """Both halves together must compute what the network does, and give logits of the classes."""
    x = torch.rand(2, *options.input_shape, generator=torch.Generator().manual_seed(0))
    shown = x if perturbation is not None and perturbation.map_channel else None
    whole, front, back = (copy.deepcopy(part).eval() for part in (whole, front, back))
    try:
        with torch.no_grad():
            seen = front_input(x, shown, options.downsample)
            wanted, logits = whole(seen), back(front(seen))
    except RuntimeError as exc:
        problem = str(exc).splitlines()[0]
        raise ExportError(f"the network does not take samples of {options.input_shape}: {problem}") from exc
    if logits.shape != (2, len(options.classes)):
        raise ExportError(
            f"the network gives {tuple(logits.shape[1:])} for each sample: it must give {len(options.classes)} logits, "
            "one for each class"
        )
    if not torch.allclose(logits, wanted, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ExportError("the network computes something else once it is cut: do not change tensors in place")


def _cut_shape(front: nn.Module, options: BuildOptions, perturbation: Perturbation | None) -> tuple[int, ...]:
    x = torch.zeros(1, *options.input_shape)
    with torch.no_grad():
        shown = x if perturbation is not None and perturbation.map_channel else None
        sees = front_input(x, shown, options.downsample)
        training = front.training
        activations = front.eval()(sees)
        front.train(training)
    return tuple(int(size) for size in activations.shape[1:])


def _files(graphs: GraphSet, compact: Mapping[str, npt.NDArray[Any]]) -> dict[str, bytes]:
    named = {f"{name}.onnx": graph for name, graph in graphs.by_name.items()}
    return {**named, INITIAL: pack_tensors({**graphs.tensors, **compact})}


def _rounded(network: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Give a network the weights that 8 bits can say, and say them."""
    said = compacted({f"p.{name}": value.detach().numpy() for name, value in network.named_parameters()})
    exact = expanded(said)
    with torch.no_grad():
        for name, value in network.named_parameters():
            value.copy_(torch.from_numpy(exact[f"p.{name}"]))
    return said
