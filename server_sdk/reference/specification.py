"""How a bundle names its network: factory, arguments and cut, so that both sides build the same one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from server_sdk.errors import ModelError, ServerError

__all__ = ["ModelSpec", "build"]

_OWN = "server_sdk.reference."
_NESTED = {"factory", "arguments"}


@dataclass(frozen=True)
class ModelSpec:
    """A network by name.

    Attributes:
        factory: ``module:function`` or ``module:class``, for instance
            ``server_sdk.reference.networks:reference_network``.
        arguments: keyword arguments of the factory, JSON values only; a mapping of ``factory`` and ``arguments`` alone
            stands for the network that these build.
        cut: name of the front's last layer, as ``split`` takes it.
    """

    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    cut: str = "relu2"


def build(spec: ModelSpec, seed: int, *, allow_models: Collection[str] = ()) -> nn.Module:
    """Build the network of a specification; the same seed gives the same initial weights.

    The caller's random state is left alone.

    Args:
        seed: of the initial weights.
        allow_models: factories outside ``server_sdk.reference`` that may be imported, by their full names. Importing
            runs their code: name only what you trust, never what a bundle says that it wants.

    Raises:
        ModelError: a factory that is not allowed, does not exist, fails, or gives no ``torch.nn.Module``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _built(spec.factory, spec.arguments, allow_models)


def _built(name: str, arguments: Mapping[str, Any], allow_models: Collection[str]) -> nn.Module:
    factory = _factory(name, allow_models)
    given = {
        key: _built(str(value["factory"]), value["arguments"], allow_models) if _is_nested(value) else value
        for key, value in arguments.items()
    }
    try:
        model = factory(**given)
    except ServerError:
        raise
    except TypeError as exc:
        raise ModelError(f"factory {name!r} refuses its arguments: {exc}") from exc
    except Exception as exc:
        raise ModelError(f"factory {name!r} fails: {type(exc).__name__}: {exc}") from exc
    if not isinstance(model, nn.Module):
        raise ModelError(f"factory {name!r} gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def _is_nested(value: object) -> bool:
    return isinstance(value, Mapping) and set(value) == _NESTED and isinstance(value["arguments"], Mapping)


def _factory(name: str, allow_models: Collection[str]) -> Callable[..., object]:
    module, _, function = name.partition(":")
    if not module or not function:
        raise ModelError(f"factory {name!r} is not of the form 'module:function'")
    if not module.startswith(_OWN) and name not in allow_models:
        raise ModelError(
            f"the model {name!r} is not of this SDK, and building it runs its code: if you trust that code, allow it "
            f"by name (--allow-model {name})"
        )
    try:
        factory: Callable[..., object] = getattr(importlib.import_module(module), function)
    except Exception as exc:  # a module of somebody else's may fail in any way
        raise ModelError(
            f"factory {name!r} cannot be imported ({type(exc).__name__}: {exc}): install it, or put its folder on "
            "PYTHONPATH"
        ) from exc
    return factory
