"""Which layers a front may have: those whose gradient graph is known, by test, to be torch's gradient."""

from __future__ import annotations

from typing import Any

from torch import nn

from export.errors import ExportError

__all__ = ["check_layers"]

_LAYERS: tuple[type[nn.Module], ...] = (
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


def check_layers(module: nn.Module, *, frozen: bool = False) -> None:
    """Refuse a network with a layer whose gradient graph would be wrong or is not known to be right.

    Layers of classes outside ``torch.nn`` are let through: tracing refuses them if it must.

    Args:
        frozen: only inference is exported, which needs no gradient and draws no masks: whatever torch traces will do,
            and the comparison with torch is the judge.

    Raises:
        ExportError: names the layer and says why.
    """
    for name, layer in module.named_modules():
        where, kind = name or "front", type(layer).__name__
        buffers = [key for key, _ in layer.named_buffers(recurse=False)]
        if buffers and not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ExportError(
                f"layer {where!r} ({kind}) cannot be exported: no graph carries its buffer {buffers[0]!r}; "
                "make it a parameter or a constant"
            )
        if not type(layer).__module__.startswith("torch.nn.") or isinstance(layer, nn.Sequential):
            continue
        reason = _statistics_refusal(layer) if frozen else _refusal(layer)
        if reason is not None:
            raise ExportError(f"layer {where!r} ({kind}) cannot be exported: {reason}")


def _refusal(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        if layer.p == 0:
            return None
        return "a random mask cannot be drawn twice alike on the device; place it behind the cut"
    if not isinstance(layer, _LAYERS):
        kinds = ", ".join(kind.__name__ for kind in _LAYERS)
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
