"""How operators of a traced gradient become operators that an inference runtime has.

``DECOMPOSITIONS`` rewrites ATen operators while a gradient is traced. ``TRANSLATIONS`` gives the ONNX form of
those that are cheapest, or only right, when written by hand; everything else keeps torch's own translation.
The forms were chosen by time in onnxruntime on one CPU thread: slices and products for a convolution's
weight gradient, MaxUnpool for a pool's (where `export.rewrite` leaves the pool), one BatchNormalization with the
batch's own statistics for training mode.
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
from export.rewrite import convolution, twice

__all__ = ["DECOMPOSITIONS", "TRANSLATIONS"]

_FLOAT, _FLOAT_BYTES = 1, 4
_LARGE_PATCHES = 1 << 16  # bytes of one sample's patches: beyond, laying out a batch's costs more than it saves
_FEW_CHANNELS = 8
_ALIASED = 1 << 10  # values: rows of a matrix that lie a multiple of this apart fall on the same places of a cache
_SCALED = "psgl.scaled"  # on a value: (grid, one factor per channel), whose product it is

aten = torch.ops.aten


def _threshold_backward(grad: Tensor, result: Tensor, threshold: float) -> Tensor:
    return grad * (result > threshold).to(grad.dtype)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Make the update of the running statistics, which the operator's schema hides, visible to the trace."""
    if not training:
        return NotImplemented
    if running_mean is None or running_var is None:
        return aten._native_batch_norm_legit.no_stats(x, weight, bias, True, momentum, eps)
    out, mean, scale, next_mean, next_var = aten._native_batch_norm_legit_functional(
        x, weight, bias, running_mean, running_var, True, momentum, eps
    )
    running_mean.copy_(next_mean)
    running_var.copy_(next_var)
    return out, mean, scale


def _avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Any:
    if ceil_mode or divisor_override is not None or (any(padding) and not count_include_pad):
        return NotImplemented
    stride = list(stride) or list(kernel)
    channels = x.shape[1]
    missing = _output_padding(x.shape[2:], grad.shape[2:], kernel, stride, padding, [1, 1])
    spread = torch.full([channels, 1, *kernel], 1.0 / math.prod(kernel), dtype=x.dtype)
    return aten.convolution(grad, spread, None, stride, padding, [1, 1], True, missing, channels)


def _output_padding(
    grid: Sequence[int],
    out: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """What a transposed convolution must add at the end of each axis to give back the input's extent."""
    return [
        grid[i] - ((out[i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1)
        for i in range(len(kernel))
    ]


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _spatial(x: Any) -> list[int]:
    return list(range(2, len(x.shape)))


def _per_channel(values: Any, x: Any) -> Any:
    return op.Reshape(values, _ints(1, -1, *[1] * (len(x.shape) - 2)))


def _sum_per_channel(values: Any, like: Any) -> Any:
    return op.ReduceSum(values, _ints(0, *_spatial(like)), keepdims=0)


def _convolution_backward(
    grad: Any,
    x: Any,
    weight: Any,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: Any,
    output_padding: Any,
    groups: Any,
    output_mask: Any,
) -> Any:
    if transposed:
        raise ExportError("a transposed convolution has no gradient graph: place it behind the cut")
    dx = dw = db = grad  # places that nobody reads
    grad, gain = grad.meta.get(_SCALED, (grad, None))
    by_output = _ints(-1, *[1] * (len(weight.shape) - 1))
    if output_mask[0]:
        missing = _output_padding(x.shape[2:], grad.shape[2:], weight.shape[2:], stride, padding, dilation)
        dx = op.ConvTranspose(
            grad,
            weight if gain is None else op.Mul(weight, op.Reshape(gain, by_output)),
            dilations=dilation,
            group=groups,
            output_padding=missing,
            pads=[*padding, *padding],
            strides=stride,
        )
    if output_mask[1]:
        dw = _weight_gradient(grad, x, weight, stride, padding, dilation, groups)
        dw = dw if gain is None else op.Mul(dw, op.Reshape(gain, by_output))
    if output_mask[2]:
        db = _sum_per_channel(grad, x)
        db = db if gain is None else op.Mul(db, gain)
    return dx, dw, db


def _weight_gradient(grad: Any, x: Any, weight: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
    """dW^T = im2col(x) @ dY^T, one product over all samples and positions for each group.

    The patches need no gradient: on a device they are laid out while it is on its way. With the channels first they are
    slices side by side, and nothing of theirs is transposed. Patches of a large grid are never laid out together.
    """
    out, kernel = list(grad.shape[2:]), list(weight.shape[2:])
    plain = groups == 1 and {*stride, *dilation} == {1}
    thin_signal = len(kernel) == 1 and int(weight.shape[1]) < _FEW_CHANNELS
    if (
        plain
        and not thin_signal
        and _FLOAT_BYTES * int(weight.shape[1]) * math.prod(map(int, (*out, *kernel))) > _LARGE_PATCHES
    ):
        return _weight_gradient_by_taps(grad, x, weight, padding)
    fan_out, axes = int(weight.shape[0]) // groups, _spatial(x)
    x = op.Transpose(x, perm=[1, 0, *axes])
    if any(padding):
        x = op.Pad(x, _ints(*padding, *padding), None, _ints(*axes))
    taps = []
    for tap in itertools.product(*(range(extent) for extent in kernel)):
        start = [index * apart for index, apart in zip(tap, dilation, strict=True)]
        ends = [first + (n - 1) * step + 1 for first, n, step in zip(start, out, stride, strict=True)]
        taps.append(op.Unsqueeze(op.Slice(x, _ints(*start), _ints(*ends), _ints(*axes), _ints(*stride)), _ints(1)))
    patches = taps[0] if len(taps) == 1 else op.Concat(*taps, axis=1)
    rows = int(weight.shape[1]) * len(taps)
    grad = op.Transpose(grad, perm=[1, 0, *axes])
    if groups == 1:
        product = op.Gemm(op.Reshape(patches, _ints(rows, -1)), op.Reshape(grad, _ints(fan_out, -1)), transB=1)
        # not yet a matrix of the weight's shape: onnxruntime would turn both factors, and the larger belongs first
        product = op.Transpose(op.Reshape(product, _ints(1, rows, -1)), perm=[0, 2, 1])
    else:
        right = op.Transpose(op.Reshape(grad, _ints(groups, fan_out, -1)), perm=[0, 2, 1])
        product = op.Transpose(op.MatMul(op.Reshape(patches, _ints(groups, rows, -1)), right), perm=[0, 2, 1])
    return op.Reshape(product, _ints(*map(int, weight.shape)))


def _weight_gradient_by_taps(grad: Any, x: Any, weight: Any, padding: Any) -> Any:
    """dW[tap] = sum over samples of dY @ x moved by that tap: for stride 1, one product for each tap or row of taps.

    With x's channels last, a move along any axis copies long pieces, and one along the first axis a single one. Few
    input channels would starve the product: there, taps of the last axis go together.
    """
    fan_out, fan_in, *kernel = map(int, weight.shape)
    axes, out = _spatial(x), [int(extent) for extent in grad.shape[2:]]
    row = math.prod(out[1:])
    spare = 0 if out[0] * row % _ALIASED else 1
    if any(padding) or spare:
        x = op.Pad(x, _ints(*padding, padding[0] + spare, *padding[1:]), None, _ints(*axes))
    if spare:
        grad = op.Pad(grad, _ints(0, spare), None, _ints(2))
    x = op.Transpose(x, perm=[0, *axes, 1])
    moved = []
    for tap in itertools.product(*map(range, kernel[1:])):
        ends = [first + extent for first, extent in zip(tap, out[1:], strict=True)]
        piece = op.Slice(x, _ints(*tap), _ints(*ends), _ints(*axes[:-1])) if tap else x
        moved.append(op.Reshape(piece, _ints(0, -1, fan_in)))
    together = kernel[-1] if fan_in < _FEW_CHANNELS else 1
    if together > 1:
        moved = [op.Concat(*moved[i : i + together], axis=2) for i in range(0, len(moved), together)]
    grad = op.Reshape(grad, _ints(0, fan_out, -1))
    products = []
    for first in range(kernel[0]):
        for rows in moved:
            piece = op.Slice(rows, _ints(first * row), _ints((first + out[0] + spare) * row), _ints(1))
            products.append(op.MatMul(grad, piece))
    total = op.ReduceSum(products[0] if len(products) == 1 else op.Concat(*products, axis=1), _ints(0), keepdims=0)
    apart = op.Reshape(total, _ints(len(products), fan_out, together, fan_in))
    return op.Reshape(op.Transpose(apart, perm=[1, 3, 0, 2]), _ints(fan_out, fan_in, *kernel))


def _batch_statistics(x: Any) -> tuple[Any, Any, Any]:
    """Mean and biased variance over all axes but the channels', and x without its mean."""
    axes = [0, *_spatial(x)]
    mean = op.ReduceMean(x, _ints(*axes), keepdims=0)
    centred = op.Sub(x, _per_channel(mean, x))
    variance = op.ReduceMean(op.Mul(centred, centred), _ints(*axes), keepdims=0)
    return mean, variance, centred


def _batch_norm_training(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: Any,
    momentum: Any,
    eps: Any,
) -> Any:
    """Ioffe and Szegedy, arXiv 1502.03167, algorithm 1; running variance unbiased, as torch keeps it."""
    out, mean, scale, variance = _normalised(x, weight, bias, eps)
    count = _samples_per_channel(x)
    unbiased = op.Mul(variance, op.Div(count, op.Sub(count, _float(1.0))))

    def blended(before: Any, now: Any) -> Any:
        return op.Add(op.Mul(before, _float(1.0 - momentum)), op.Mul(now, _float(momentum)))

    return out, mean, scale, blended(running_mean, mean), blended(running_var, unbiased)


def _batch_norm_training_alone(x: Any, weight: Any, bias: Any, training: Any, momentum: Any, eps: Any) -> Any:
    return _normalised(x, weight, bias, eps)[:3]


def _normalised(x: Any, weight: Any, bias: Any, eps: Any) -> tuple[Any, Any, Any, Any]:
    channels = int(x.shape[1])
    mean, variance, _ = _batch_statistics(x)
    weight = _constant_per_channel(1.0, channels) if weight is None else weight
    bias = _constant_per_channel(0.0, channels) if bias is None else bias
    out = op.BatchNormalization(x, weight, bias, mean, variance, epsilon=eps)
    return out, mean, op.Reciprocal(op.Sqrt(op.Add(variance, _float(eps)))), variance


def _batch_norm_backward(
    grad: Any,
    x: Any,
    weight: Any,
    running_mean: Any,
    running_var: Any,
    save_mean: Any,
    save_scale: Any,
    training: Any,
    eps: Any,
    output_mask: Any,
) -> Any:
    """dx = w s (dy - mean(dy) - xc s^2 mean(dy xc)) with xc = x - mean(x) and s = 1 / sqrt(var + eps).

    What xc and the means give is one BatchNormalization. A convolution before it takes the factor w s into its weights
    instead.
    """
    channels = int(x.shape[1])
    mean = save_mean if training else running_mean
    scale = save_scale if training else op.Reciprocal(op.Sqrt(op.Add(running_var, _float(eps))))
    centred = op.Sub(x, _per_channel(mean, x))
    total = _sum_per_channel(grad, x)
    along = _sum_per_channel(op.Mul(grad, centred), x)
    gain = scale if weight is None else op.Mul(scale, weight)
    if training:
        share = op.Reciprocal(op.Neg(_samples_per_channel(x)))
        slope = op.Mul(op.Mul(share, op.Mul(scale, scale)), along)
        zeros, ones = _constant_per_channel(0.0, channels), _constant_per_channel(1.0, channels)
        grad = op.Add(grad, op.BatchNormalization(centred, slope, op.Mul(share, total), zeros, ones, epsilon=0.0))
    dx = op.Mul(grad, _per_channel(gain, x))
    grad.shape = x.shape
    dx.meta[_SCALED] = (grad, gain)
    return dx, op.Mul(along, scale), total


def _samples_per_channel(x: Any) -> Any:
    return op.Div(op.Cast(op.Size(x), to=_FLOAT), _float(float(x.shape[1])))


def _float(value: float) -> Any:
    return op.Constant(value_float=float(value))


def _constant_per_channel(value: float, channels: int) -> Any:
    return op.Constant(value_floats=[value] * channels)


def _max_pool_backward(
    grad: Any,
    x: Any,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: Any,
    indices: Any,
) -> Any:
    """Put each gradient back to its window's first maximum; right for windows that do not overlap.

    Runtimes disagree about MaxUnpool where windows do not cover the input exactly, so it is cut or padded to
    fit first.
    """
    stride = stride or kernel_size
    axes = _spatial(x)
    grid = [int(extent) for extent in x.shape[2:]]
    covered = [(int(n) - 1) * s + k for n, s, k in zip(grad.shape[2:], stride, kernel_size, strict=True)]
    if any(padding):
        x = op.Pad(x, _ints(*padding, *padding), op.Constant(value_float=-math.inf), _ints(*axes))
    inside = x
    if covered != [extent + 2 * pad for extent, pad in zip(grid, padding, strict=True)]:
        inside = op.Slice(x, _ints(*[0] * len(axes)), _ints(*covered), _ints(*axes))
    if list(kernel_size) == list(stride) == [1, 2]:
        spread = _spread_over_pairs(grad, inside)
    else:
        _, chosen = op.MaxPool(inside, kernel_shape=kernel_size, strides=stride)
        spread = op.MaxUnpool(grad, chosen, kernel_shape=kernel_size, strides=stride)
    if any(padding):
        ends = [pad + extent for extent, pad in zip(grid, padding, strict=True)]
        spread = op.Slice(spread, _ints(*padding), _ints(*ends), _ints(*axes))
    missing = [max(n + p - c, 0) for n, p, c in zip(grid, padding, covered, strict=True)]
    if any(missing):
        spread = op.Pad(spread, _ints(*[0] * len(axes), *missing), None, _ints(*axes))
    return spread


def _spread_over_pairs(grad: Any, x: Any) -> Any:
    """What MaxUnpool gives for pairs along a signal, three times as fast: a mask that both pulls of a guide share."""
    _, channels, _, pairs = grad.shape
    apart = op.Reshape(x, _ints(0, int(channels), int(pairs), 2))
    first = op.Cast(
        op.GreaterOrEqual(op.Gather(apart, _ints(0), axis=3), op.Gather(apart, _ints(1), axis=3)), to=_FLOAT
    )
    columns = op.Reshape(grad, _ints(0, int(channels), int(pairs), 1))
    left = op.Mul(first, columns)
    return op.Reshape(op.Concat(left, op.Sub(columns, left), axis=3), _ints(0, int(channels), 1, 2 * int(pairs)))


def _pixel_unshuffle(x: Any, factor: Any) -> Any:
    """SpaceToDepth orders its channels (offset, channel), torch (channel, offset)."""
    _, channels, height, width = x.shape
    blocks = op.SpaceToDepth(x, blocksize=factor)
    if channels == 1:
        return blocks
    grid = [int(height) // factor, int(width) // factor]
    apart = op.Reshape(blocks, _ints(0, factor * factor, int(channels), *grid))
    moved = op.Transpose(apart, perm=[0, 2, 1, 3, 4])
    return op.Reshape(moved, _ints(0, int(channels) * factor * factor, *grid))


def _pixel_shuffle(x: Any, factor: Any) -> Any:
    return op.DepthToSpace(x, blocksize=factor, mode="CRD")


def _twice(x: Any, height: Any, width: Any) -> Any:
    scales: Any = op.Constant(value_floats=[1.0, 1.0, 2.0, 2.0])
    large = op.Resize(
        x, None, scales, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )
    missing = [int(extent) - 2 * int(half) for extent, half in zip((height, width), x.shape[2:], strict=True)]
    return op.Pad(large, _ints(0, 0, *missing), None, _ints(2, 3)) if any(missing) else large


def _convolution(x: Any, weight: Any, bias: Any, zeros: Any) -> Any:
    left, right, top, bottom = zeros
    return op.Conv(x, weight, bias, pads=[top, left, bottom, right])


def _decompositions() -> dict[Any, Callable[..., Any]]:
    table = {key: rule for key, rule in decomposition_table.items() if "backward" in str(key)}
    for key in TRANSLATIONS:
        table.pop(key, None)
    table[aten.threshold_backward.default] = _threshold_backward
    table[aten.native_batch_norm.default] = _batch_norm
    table[aten.avg_pool2d_backward.default] = _avg_pool2d_backward
    return table


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    aten._native_batch_norm_legit.no_stats: _batch_norm_training_alone,
    aten._native_batch_norm_legit_functional.default: _batch_norm_training,
    aten.convolution_backward.default: _convolution_backward,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.pixel_unshuffle.default: _pixel_unshuffle,
    convolution._opoverload: _convolution,
    twice._opoverload: _twice,
}

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = _decompositions()
