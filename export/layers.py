"""Which layers a front or a guide may have: those whose gradient graph is known, by test, to be torch's gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import fx, nn
from torch.nn import functional

from export.errors import ExportError

__all__ = ["LAYERS", "check_guide", "check_layers"]

LAYERS: tuple[type[nn.Module], ...] = (
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.Conv1d,
    nn.Conv2d,
    nn.ELU,
    nn.Flatten,
    nn.GELU,
    nn.GroupNorm,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LayerNorm,
    nn.LeakyReLU,
    nn.Linear,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
)
"""Layers with a gradient graph; what of them is refused, ``docs/layers.md`` says."""

_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
_FUNCTIONS: Mapping[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    functional.max_pool1d: (nn.MaxPool1d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    functional.max_pool2d: (nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    functional.avg_pool1d: (nn.AvgPool1d, ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")),
    functional.avg_pool2d: (nn.AvgPool2d, ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")),
    functional.adaptive_avg_pool1d: (nn.AdaptiveAvgPool1d, ("output_size",)),
    functional.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    functional.dropout: (nn.Dropout, ("p",)),
}


def check_layers(module: nn.Module, *, frozen: bool = False) -> None:
    """Refuse a network with a layer whose gradient graph would be wrong or is not known to be right.

    Layers of classes outside ``torch.nn`` are let through: tracing refuses them if it must.

    Args:
        frozen: only inference is exported, which needs no gradient and draws no masks: whatever torch traces will do,
            and the comparison with torch is the judge.

    Raises:
        ExportError: names the layer and says why.
    """
    for name, layer in _layers(module):
        where, kind = name or "front", type(layer).__name__
        buffers = [key for key, _ in layer.named_buffers(recurse=False)]
        if buffers and not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ExportError(
                f"layer {where!r} ({kind}) cannot be exported: no graph carries its buffer {buffers[0]!r}; "
                "make it a parameter or a constant"
            )
        if not type(layer).__module__.startswith("torch.nn.") or type(layer) in _CONTAINERS:
            continue
        reason = _statistics_refusal(layer) if frozen else _refusal(layer)
        if reason is not None:
            raise ExportError(f"layer {where!r} ({kind}) cannot be exported: {reason}")


def check_guide(guide: nn.Module) -> None:
    """Refuse a guide with a layer whose gradient graph would be wrong; it is asked in evaluation mode alone.

    Raises:
        ExportError: names the layer and says why.
    """
    for name, layer in _layers(guide):
        if not type(layer).__module__.startswith("torch.nn.") or type(layer) in _CONTAINERS:
            continue
        reason = None if isinstance(layer, nn.modules.dropout._DropoutNd) else _refusal(layer)
        if reason is not None:
            reason = reason.replace("place it behind the cut, or ", "")
            raise ExportError(f"layer {name or 'guide'!r} ({type(layer).__name__}) of the guide: {reason}")


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer by its name, and those that a traced module calls as functions."""
    for name, layer in module.named_modules():
        yield name, layer
        for node in layer.graph.nodes if isinstance(layer, fx.GraphModule) else ():
            if node.op == "call_function" and node.target in _FUNCTIONS:
                kind, names = _FUNCTIONS[node.target]
                given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
                make: Callable[..., nn.Module] = kind
                yield f"{name}.{node.name}".strip("."), make(**{key: given[key] for key in names if key in given})


def _refusal(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        if layer.p == 0:
            return None
        return "a random mask cannot be drawn twice alike on the device; place it behind the cut"
    if not isinstance(layer, LAYERS):
        kinds = ", ".join(kind.__name__ for kind in LAYERS)
        return f"place it behind the cut, or use one of {kinds}"
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        if layer.padding_mode != "zeros":
            return f"padding_mode={layer.padding_mode!r}; only 'zeros' is supported"
        if isinstance(layer.padding, str):
            return f"padding={layer.padding!r}; give the padding as numbers"
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        if layer.momentum is None:
            return "momentum=None (a cumulative average); give a momentum such as 0.1"
        return _statistics_refusal(layer)
    if isinstance(layer, nn.MaxPool1d | nn.MaxPool2d):
        return _pool_refusal(layer)
    if isinstance(layer, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d):
        sizes = layer.output_size if isinstance(layer.output_size, tuple | list) else (layer.output_size,)
        return None if set(sizes) == {1} else f"output_size={layer.output_size}; only 1 is supported, or use an AvgPool"
    if isinstance(layer, nn.AvgPool1d | nn.AvgPool2d):
        if layer.ceil_mode:
            return "ceil_mode=True; pad the input instead"
        if not layer.count_include_pad:
            return "count_include_pad=False; only True is supported"
        if getattr(layer, "divisor_override", None) is not None:
            return "divisor_override; leave it None"
    return None


def _statistics_refusal(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not layer.track_running_stats:
        return "track_running_stats=False; inference needs running statistics"
    return None


def _pool_refusal(layer: nn.MaxPool1d | nn.MaxPool2d) -> str | None:
    def pair(value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, tuple | list) else (value, value)

    if layer.ceil_mode or layer.return_indices or set(pair(layer.dilation)) != {1}:
        return "ceil_mode, return_indices and dilation are not supported; leave them at their defaults"
    stride = layer.stride if layer.stride is not None else layer.kernel_size
    if any(s < k for s, k in zip(pair(stride), pair(layer.kernel_size), strict=True)):
        return "overlapping windows; give a stride of at least the kernel's size"
    return None
