"""How backward operators become operators that an inference runtime has.

``DECOMPOSITIONS`` rewrites ATen operators while a gradient is traced; ``TRANSLATIONS`` gives the ONNX form of the two
that no combination of ATen operators expresses as cheaply. Forward operators keep torch's own translation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18 as op
from torch import Tensor
from torch._decomp import decomposition_table

from export.errors import ExportError

__all__ = ["DECOMPOSITIONS", "TRANSLATIONS"]

aten = torch.ops.aten


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape([1, -1] + [1] * (like.dim() - 2))


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _threshold_backward(grad: Tensor, result: Tensor, threshold: float) -> Tensor:
    return grad * (result > threshold).to(grad.dtype)


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not training:
        if running_mean is None or running_var is None:
            return NotImplemented
        out = aten._native_batch_norm_legit_no_training(x, weight, bias, running_mean, running_var, momentum, eps)
        return out[0], x.new_zeros(0), x.new_zeros(0)
    axes = _all_but_channels(x)
    mean = x.mean(axes)
    centred = x - _per_channel(mean, x)
    variance = (centred * centred).mean(axes)
    scale = torch.rsqrt(variance + eps)
    if running_mean is not None and running_var is not None:
        count = x.numel() / x.shape[1]
        running_mean.copy_((1.0 - momentum) * running_mean + momentum * mean)
        running_var.copy_((1.0 - momentum) * running_var + momentum * (variance * (count / (count - 1.0))))
    ones = torch.ones_like(mean) if weight is None else weight
    zeros = torch.zeros_like(mean) if bias is None else bias
    out = aten._native_batch_norm_legit_no_training(x, ones, zeros, mean, variance, momentum, eps)
    return out[0], mean, scale


def _avg_pool2d_backward(
    grad: Tensor, x: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool,
    count_include_pad: bool, divisor_override: int | None,
) -> Tensor:
    stride = list(stride) or list(kernel)
    if ceil_mode or divisor_override is not None or (any(padding) and not count_include_pad):
        return NotImplemented
    channels = x.shape[1]
    out = grad.shape[2:]
    missing = [x.shape[2 + i] - ((out[i] - 1) * stride[i] - 2 * padding[i] + kernel[i]) for i in range(2)]
    spread = x.new_full([channels, 1, *kernel], 1.0 / math.prod(kernel))
    return aten.convolution(grad, spread, None, stride, padding, [1, 1], True, missing, channels)


def _own() -> dict[Any, Callable[..., Any]]:
    table = {key: rule for key, rule in decomposition_table.items() if "backward" in str(key)}
    del table[aten.max_pool2d_with_indices_backward.default]
    table[aten.threshold_backward.default] = _threshold_backward
    table[aten.native_batch_norm.default] = _batch_norm
    table[aten.avg_pool2d_backward.default] = _avg_pool2d_backward
    return table


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = _own()


def _ints(values: Sequence[int]) -> Any:
    return op.Constant(value_ints=list(values))


def _patches(x: Any, kernel, out, stride, padding, dilation) -> Any:  # type: ignore[no-untyped-def]
    """im2col by strided slices: ``(N, C, *S)`` to ``(N, C, prod(kernel), *out)``."""
    axes = list(range(2, 2 + len(kernel)))
    if any(padding):
        x = op.Pad(x, _ints([*padding, *padding]), None, _ints(axes))
    columns = []
    for offset in itertools.product(*(range(extent) for extent in kernel)):
        start = [o * d for o, d in zip(offset, dilation, strict=True)]
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, out, stride, strict=True)]
        part = op.Slice(x, _ints(start), _ints(stop), _ints(axes), _ints(stride))
        columns.append(op.Unsqueeze(part, _ints([2])))
    return op.Concat(*columns, axis=2)


def _convolution_backward(  # type: ignore[no-untyped-def]
    grad, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask
):
    if transposed:
        raise ExportError("transposed convolutions have no gradient here: place them behind the cut")
    kernel, out, grid = (list(t.shape[2:]) for t in (weight, grad, x))
    axes = len(kernel)
    dx = dw = db = grad
    if output_mask[0]:
        missing = [
            grid[i] - ((out[i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1) for i in range(axes)
        ]
        dx = op.ConvTranspose(
            grad, weight, dilations=dilation, group=groups, output_padding=missing, pads=[*padding, *padding], strides=stride
        )
    if output_mask[1]:
        cells = math.prod(out)
        fan_out, fan_in = weight.shape[0], weight.shape[1]
        columns = _patches(x, kernel, out, stride, padding, dilation)
        lead = [0] if groups == 1 else [0, groups]
        order = [0, 2, 1] if groups == 1 else [0, 1, 3, 2]
        left = op.Reshape(grad, _ints([*lead, fan_out // groups, cells]))
        right = op.Reshape(columns, _ints([*lead, fan_in * math.prod(kernel), cells]))
        product = op.MatMul(left, op.Transpose(right, perm=order))
        dw = op.Reshape(op.ReduceSum(product, _ints([0]), keepdims=0), _ints(weight.shape))
    if output_mask[2]:
        db = op.ReduceSum(grad, _ints([0, *range(2, 2 + axes)]), keepdims=0)
    return dx, dw, db


def _max_pool_backward(grad, x, kernel_size, stride, padding, dilation, ceil_mode, indices):  # type: ignore[no-untyped-def]
    stride = stride or kernel_size
    _, chosen = op.MaxPool(
        x, kernel_shape=kernel_size, strides=stride, pads=[*padding, *padding], dilations=dilation,
        ceil_mode=int(ceil_mode),
    )
    return op.MaxUnpool(grad, chosen, op.Shape(x), kernel_shape=kernel_size, strides=stride, pads=[*padding, *padding])


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: _convolution_backward,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
}
