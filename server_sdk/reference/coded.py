"""Any network with a short bounded code at its cut: what the ``hardened`` profile makes of a model of your own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from server_sdk.errors import ModelError
from server_sdk.reference.specification import ModelSpec
from server_sdk.reference.split import split

__all__ = ["CODE_CUT", "coded", "coded_network", "uncoded", "uncoded_name"]

CODE_CUT = "tanh"
"""Where a coded network is cut."""

_FACTORY = "server_sdk.reference.coded:coded_network"


def coded_network(
    network: nn.Module,
    cut: str,
    input_shape: Sequence[int],
    code: int = 32,
    back: nn.Module | None = None,
) -> nn.Sequential:
    """A network whose front goes on to a code: cut it at ``tanh``.

    Front: the network up to its cut, flatten, a linear layer ``code`` without bias, codebn, tanh: activations in
    (-1, 1). Back: the linear layer ``expand`` to the cut's values, ``unflatten`` to its shape, and the network behind
    its cut; or a back of your own for the code. The network's weights keep their names behind ``front.`` and ``back.``.

    Args:
        network: takes one tensor and gives logits (N, K).
        cut: in it, as ``split`` takes it.
        input_shape: (C, H, W) or (C, T), what the network takes.
        code: values of the code, at least 1.
        back: (N, code) to logits (N, K), in place of the network's own.

    Raises:
        ModelError: a network that cannot be split or does not take the input, or a code below 1.
    """
    if code < 1:
        raise ModelError(f"a code of {code} values: give at least 1")
    front, rest = split(network, cut)
    shape = _cut_shape(front, input_shape)
    values = int(torch.Size(shape).numel())
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        front=front,
        flatten=nn.Flatten(),
        code=nn.Linear(values, code, bias=False),
        codebn=nn.BatchNorm1d(code),
        tanh=nn.Tanh(),
    )
    if back is None:
        layers |= OrderedDict(expand=nn.Linear(code, values), unflatten=nn.Unflatten(1, shape), back=rest)
    else:
        layers["back"] = back
    return nn.Sequential(layers)


def coded(
    model: ModelSpec, input_shape: Sequence[int], *, code: int = 32, back: Mapping[str, Any] | None = None
) -> ModelSpec:
    """The specification of a network with a code behind its cut.

    Args:
        model: the network.
        input_shape: what it takes.
        code: values of the code.
        back: ``factory`` and ``arguments`` of a back for the code, or None for the network's own.
    """
    arguments: dict[str, Any] = {
        "network": {"factory": model.factory, "arguments": dict(model.arguments)},
        "cut": model.cut,
        "input_shape": list(input_shape),
        "code": code,
    }
    return ModelSpec(_FACTORY, arguments if back is None else {**arguments, "back": dict(back)}, CODE_CUT)


def uncoded(model: ModelSpec) -> ModelSpec:
    """The network that a coded one was made of; any other model as it is."""
    if model.factory != _FACTORY:
        return model
    network = model.arguments["network"]
    return ModelSpec(network["factory"], network["arguments"], model.arguments["cut"])


def uncoded_name(model: ModelSpec, name: str) -> str | None:
    """What the network itself calls a weight of this model; None for one that it does not have."""
    if model.factory != _FACTORY:
        return name
    half, _, rest = name.partition(".")
    return rest if half == "front" or (half == "back" and "back" not in model.arguments) else None


def _cut_shape(front: nn.Module, input_shape: Sequence[int]) -> tuple[int, ...]:
    training = [layer for layer in front.modules() if layer.training]
    try:
        with torch.no_grad():
            result = front.eval()(torch.zeros(1, *input_shape))
    except RuntimeError as exc:
        problem = str(exc).splitlines()[0]
        raise ModelError(f"the network does not take the input {tuple(input_shape)}: {problem}") from exc
    for layer in training:
        layer.training = True
    return tuple(int(extent) for extent in result.shape[1:])
