"""How a bundle names its network: factory, arguments and cut, so that both sides build the same one."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from server_sdk.errors import ModelError

__all__ = ["ModelSpec", "build"]

_OWN = "server_sdk.reference."


@dataclass(frozen=True)
class ModelSpec:
    """A network by name.

    Attributes:
        factory: ``module:function``, for instance ``server_sdk.reference.networks:reference_network``.
        arguments: keyword arguments of the factory, JSON values only.
        cut: name of the front's last layer.
    """

    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    cut: str = "relu2"


def build(spec: ModelSpec, seed: int, *, allow_foreign: bool = False) -> nn.Sequential:
    """Build the network of a specification; the same seed gives the same initial weights.

    The caller's random state is left alone.

    Args:
        seed: of the initial weights.
        allow_foreign: import factories outside ``server_sdk.reference`` too. Importing runs their code: only
            for specifications that you wrote yourself, never for one that arrived in a bundle.

    Raises:
        ModelError: a foreign factory that is not allowed, a factory that does not exist, refuses its
        arguments or gives no
            ``torch.nn.Sequential``.
    """
    module_name, _, function = spec.factory.partition(":")
    if not module_name or not function:
        raise ModelError(f"factory {spec.factory!r} is not of the form 'module:function'")
    if not allow_foreign and not module_name.startswith(_OWN):
        raise ModelError(f"factory {spec.factory!r} is outside server_sdk.reference: allow_foreign=True permits it")
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as exc:
        raise ModelError(f"factory {spec.factory!r} cannot be imported: {exc}") from exc
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = factory(**spec.arguments)
        except TypeError as exc:
            raise ModelError(f"factory {spec.factory!r} refuses its arguments: {exc}") from exc
    if not isinstance(model, nn.Sequential):
        raise ModelError(f"factory {spec.factory!r} gave a {type(model).__name__}, not a torch.nn.Sequential")
    return model
