"""Models of your own: options that build them, and weights that they bring along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from edge_sdk.errors import ConfigError
from export.errors import ExportError
from export.options import BuildOptions, model_of, profile_of
from server_sdk.reference.coded import coded, uncoded_name
from server_sdk.reference.specification import ModelSpec, build
from server_sdk.reference.zoo import ZOO

__all__ = ["initial_network", "own_options"]


def own_options(
    model: str,
    cut: str | None,
    input_shape: tuple[int, ...],
    classes: Sequence[str],
    *,
    profile: str = "hardened",
    arguments: Mapping[str, Any] | None = None,
    weights: Path | None = None,
    guide: str | None = None,
    code: int = 32,
    back: str | None = None,
    **further: Any,
) -> BuildOptions:
    """Options for any feed-forward network, cut behind one of its layers; three lines make a bundle::

        options = own_options("my_module:MyNet", "layer2", (1, 28, 28), class_names(10), profile="paper")
        made = prepare(samples, options)
        build_bundle(Path("net.psgl"), made.options, made.guide, network=made.network)

    The network takes the samples as they are, (N, *input_shape) in 0..1, and gives logits (N, K). In a profile whose
    front is bounded (``hardened``) a code follows the front: ``server_sdk.reference.coded``.

    Args:
        model: ``module:name`` of a class or a function, importable; importing it runs its code. The server imports it
            too (``psgl-server --allow-model``). Or a name of ``server_sdk.reference.zoo.ZOO``.
        cut: name of the front's last layer or block, as ``named_modules`` has it; None: that of a model of the zoo.
        input_shape: (C, H, W) or (C, T).
        classes: name of each class.
        profile: a name of ``PROFILES``.
        arguments: of the model, JSON values by name.
        weights: safetensors file of the whole model's state, loaded before the split.
        guide: ``module:name`` of a guide network, called without arguments; None: the reference guide.
        code: values of the code.
        back: ``module:name`` of a back for the code, called with ``code=`` and ``classes=``; None: the model's own
            layers behind the cut, which a linear layer leads to.
        further: fields of ``BuildOptions``.

    Raises:
        ExportError: an unknown profile or model, no cut, or a back where there is no code.
    """
    spec = _spec(model, cut, input_shape, len(classes), arguments or {})
    coding = profile_of(profile).bound > 0
    if back is not None and not coding:
        raise ExportError(f"profile {profile!r} sends the cut's own activations: leave out the back, or use hardened")
    if coding:
        own = None if back is None else {"factory": back, "arguments": {"code": code, "classes": len(classes)}}
        spec = coded(spec, input_shape, code=code, back=own)
    return BuildOptions(
        profile,
        input_shape,
        tuple(classes),
        model=spec,
        downsample=1,
        map_channel=False,
        weights=weights,
        guide=None if guide is None else ModelSpec(guide),
        allow_models=tuple(name for name in (model, back, guide) if name is not None and name not in ZOO),
        **further,
    )


def _spec(
    model: str, cut: str | None, input_shape: tuple[int, ...], classes: int, arguments: Mapping[str, Any]
) -> ModelSpec:
    known = ZOO.get(model)
    if known is not None:
        spec = known.spec(input_shape, classes)
        return ModelSpec(spec.factory, {**spec.arguments, **arguments}, cut or spec.cut)
    if ":" not in model:
        raise ExportError(f"there is no model {model!r}: give module:name of yours, or one of {', '.join(ZOO)}")
    if cut is None:
        raise ExportError(f"where is {model} cut? name the front's last layer (--cut)")
    return ModelSpec(model, dict(arguments), cut)


def initial_network(options: BuildOptions) -> nn.Module | None:
    """The options' network with the weights that they name; None where they name none.

    Raises:
        ConfigError: no such file.
        ExportError: weights that are not the network's.
        ModelError: the network cannot be built.
    """
    if options.weights is None:
        return None
    try:
        given = safetensors.torch.load_file(options.weights)
    except OSError as exc:
        raise ConfigError(f"{options.weights} cannot be read: {exc.strerror or exc}") from exc
    except SafetensorError as exc:
        raise ExportError(
            f"{options.weights} is no safetensors file ({exc}): write it by safetensors.torch.save_model, which holds "
            "tensors and no code"
        ) from exc
    model = model_of(options)
    network = build(model, options.seed, allow_models=options.allow_models)
    names = {name: own for name in network.state_dict() if (own := uncoded_name(model, name)) is not None}
    known = {name: given[own] for name, own in names.items() if own in given}
    missing = {own for name, own in names.items() if name not in known and not own.endswith("num_batches_tracked")}
    own_back = uncoded_name(model, "back.") is None
    strange = set() if own_back else set(given) - set(names.values())
    if missing or strange:
        name = sorted(missing or strange)[0]
        raise ExportError(
            f"{options.weights} {'lacks' if missing else 'has'} {name!r}, which the model "
            f"{'has' if missing else 'lacks'}: give the weights of this model, with the same arguments"
        )
    try:
        network.load_state_dict(known, strict=False)
    except RuntimeError as exc:
        reason = " ".join(str(exc).split())[:200]
        raise ExportError(f"{options.weights} does not fit the model: {reason}") from exc
    return network
