"""The same front or guide in a form whose gradient is cheaper on a device.

A pool's gradient goes to the first maximum of each window. onnxruntime finds it with a branch per input value
and then scatters; here the window's values are compared as whole planes instead. Of a guide only the input's gradient
is wanted and the weights never change: there a convolution's gradient is a convolution with turned weights, which
onnxruntime lays out once. Results and gradients are those of the layers that are replaced, ties included.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from server_sdk.reference.guide import Guide

__all__ = ["cheap_gradient", "cheap_guide", "convolution", "folded", "from_blocks", "guide_on_blocks", "twice"]

_FEW_CHANNELS = 4
_BLOCK = 16  # channels that onnxruntime computes together: with fewer outputs a transposed convolution is faster


def cheap_gradient(front: nn.Module, *, planes: bool = True) -> nn.Module:
    """A copy of a sequential front with its max-pools of two rewritten; any other module is only copied.

    ReLU directly before a pool moves behind it, where it has a part of the work. Square pools lose their index
    lists, and with ``planes`` a first convolution of few channels before such a pool computes the window's four
    values as four planes, which saves where its weights get a gradient. Names of weights stay.
    """
    front = copy.deepcopy(front)
    if type(front) is not nn.Sequential:
        return front
    layers = list(zip(front._modules, front, strict=True))  # named_children would skip a layer that is used twice
    result: OrderedDict[str, nn.Module] = OrderedDict(layers)
    for position, (name, layer) in enumerate(layers):
        square = _is_plain_pool(layer)
        if not square and not _is_pool_of_pairs(layer):
            continue
        before = position - 1
        active = before >= 0 and type(layers[before][1]) is nn.ReLU
        pool: nn.Module = _PlanePool() if square else layer
        if active:
            result[layers[before][0]] = nn.Identity()
            before -= 1
        first = layers[0][1]
        if planes and square and before == 0 and isinstance(first, nn.Conv2d) and _is_thin(first):
            result[layers[0][0]] = _PooledConvolution(first)
            pool = nn.Identity()
        result[name] = nn.Sequential(pool, nn.ReLU()) if active else pool
    return nn.Sequential(result)


def folded(front: nn.Module) -> nn.Module:
    """A copy of a sequential front in evaluation mode whose BatchNorms go into the convolutions before them.

    A few operators on weights take the place of a pass over the grid; any other module is only copied. Names of weights
    and statistics stay.
    """
    front = copy.deepcopy(front).eval()
    return _Folded(OrderedDict(zip(front._modules, front, strict=True))) if type(front) is nn.Sequential else front


class _Folded(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if layers and type(layer) in (nn.Conv1d, nn.Conv2d) and type(layers[0]) in (nn.BatchNorm1d, nn.BatchNorm2d):
                x = _normalised_convolution(layer, layers.pop(0), x)
            else:
                x = layer(x)
        return x


def _normalised_convolution(convolution: Any, norm: Any, x: Tensor) -> Tensor:
    gain = (norm.running_var + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * norm.weight
    mean = norm.running_mean if convolution.bias is None else norm.running_mean - convolution.bias
    shift = -mean * gain if norm.bias is None else norm.bias - mean * gain
    weight = convolution.weight * gain.reshape(-1, *[1] * (convolution.weight.dim() - 1))
    y: Tensor = convolution._conv_forward(x, weight, shift)
    return y


def guide_on_blocks(guide: Guide) -> nn.Sequential:
    """What this SDK's guide does behind its space-to-depth, layer by layer; a signal is an image of one row."""
    first, pool, second = (_as_image(layer) for layer in (guide.conv1, guide.pool, guide.conv2))
    entry = [_OneRow()] if len(guide.shape) == 2 else []
    return nn.Sequential(*entry, first, nn.ReLU(), pool, second, nn.ReLU(), pool, nn.Flatten(), guide.head)


class _OneRow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(2)


def _as_image(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.MaxPool1d):
        return nn.MaxPool2d((1, 2))
    if not isinstance(layer, nn.Conv1d):
        return layer
    image = nn.Conv2d(
        layer.in_channels, layer.out_channels, (1, layer.kernel_size[0]), padding=(0, int(layer.padding[0]))
    )
    image.weight, image.bias = nn.Parameter(layer.weight.unsqueeze(2)), layer.bias
    return image


def from_blocks(blocks: Tensor) -> Tensor:
    """Back to the grid from a space-to-depth of 2: (N, 4 C, H, W) to (N, C, 2 H, 2 W), (N, 2 C, T) to (N, C, 2 T).

    As a transposed convolution by zeros and ones, which takes a third to a fifth of the time of onnxruntime's
    DepthToSpace; values have to be finite.
    """
    axes = blocks.dim() - 2
    channels = blocks.shape[1] // 2**axes
    places = torch.eye(2**axes).reshape(-1, 1, *[2] * axes).repeat(channels, *[1] * (axes + 1)).to(blocks)
    spread = nn.functional.conv_transpose2d if axes == 2 else nn.functional.conv_transpose1d
    return spread(blocks, places, stride=2, groups=channels)


def cheap_guide(guide: nn.Module) -> nn.Module:
    """As ``cheap_gradient``, for a module whose input alone gets a gradient; that of any weight is lost.

    Convolutions of stride 1 get theirs by turned weights, and compute no row that a pool behind them drops.
    """
    guide = cheap_gradient(guide, planes=False)
    if type(guide) is not nn.Sequential:
        return guide
    layers = [layer for layer in guide if not isinstance(layer, nn.Identity)]
    for position, layer in enumerate(layers):
        if type(layer) is nn.Conv2d and _can_be_turned(layer):
            behind = nn.Sequential(*layers[position + 1 : position + 2])
            layers[position] = _FixedConvolution(layer, any(type(inner) is _PlanePool for inner in behind.modules()))
    return nn.Sequential(*layers)


def _can_be_turned(layer: nn.Conv2d) -> bool:
    plain = layer.stride == (1, 1) and layer.dilation == (1, 1) and layer.groups == 1 and layer.padding_mode == "zeros"
    if not plain or isinstance(layer.padding, str) or layer.in_channels < _BLOCK:
        return False
    return all(padding < taps for padding, taps in zip(layer.padding, layer.kernel_size, strict=True))


def _is_plain_pool(layer: nn.Module) -> bool:
    return _is_pool(layer, nn.MaxPool2d, 2, (2, 2))


def _is_pool_of_pairs(layer: nn.Module) -> bool:
    return _is_pool(layer, nn.MaxPool1d, 2, (2,)) or _is_pool(layer, nn.MaxPool2d, (1, 2))


def _is_pool(layer: nn.Module, kind: type[nn.MaxPool1d | nn.MaxPool2d], *extents: int | tuple[int, ...]) -> bool:
    if type(layer) is not kind:
        return False
    stride = layer.kernel_size if layer.stride is None else layer.stride
    fits = layer.kernel_size in extents and stride in extents and layer.padding in (0, (0,), (0, 0))
    return fits and layer.dilation in (1, (1,), (1, 1)) and not layer.ceil_mode and not layer.return_indices


def _is_thin(layer: nn.Conv2d) -> bool:
    return (
        layer.in_channels <= _FEW_CHANNELS and layer.groups == 1 and layer.stride == (1, 1) and layer.dilation == (1, 1)
    )


class _LargestPlane(torch.autograd.Function):
    """The largest of four planes; its gradient goes to the first of those that are equal.

    Which plane that is needs no gradient to be known, so that only one product waits for it.
    """

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        first, second, third, fourth = _planes(values).unbind(1)
        return torch.maximum(torch.maximum(torch.maximum(first, second), third), fourth)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        values, best = ctx.saved_tensors
        first, second, third, _ = _planes(values).unbind(1)
        two = torch.maximum(first, second)
        place = _first_equal((first, two, torch.maximum(two, third)), best)
        chosen = place.unsqueeze(1) == torch.arange(4, dtype=best.dtype).view(4, 1, 1, 1)
        return (chosen.to(gradient.dtype) * gradient.unsqueeze(1)).reshape(values.shape)


def _planes(values: Tensor) -> Tensor:
    return values.reshape(-1, 4, values.shape[1] // 4, *values.shape[2:])


def _first_equal(largest: Sequence[Tensor], best: Tensor) -> Tensor:
    """Number of the first of a window's four values that equals its maximum.

    Args:
        largest: the largest of the first value, of the first two, of the first three.
        best: the largest of all.
    """
    one, two, three = ((value == best).to(best.dtype) for value in largest)
    return 3 - (one + two + three)


class _PooledConvolution(nn.Module):
    """A convolution and the 2x2 max-pool behind it: one strided convolution gives the windows' values as planes."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.bias = convolution.bias
        self.padding = convolution.padding

    def forward(self, x: Tensor) -> Tensor:
        fan_out, fan_in, *kernel = self.weight.shape
        height, width = (_shifts(extent).to(x) for extent in kernel)
        # weight[o, c, i, j] lands on tap (i + row, j + column) of the kernel for the window's value (row, column)
        places = torch.einsum("iua,jvb->ijuvab", height, width).reshape(kernel[0] * kernel[1], -1)
        spread = self.weight.reshape(fan_out * fan_in, -1) @ places
        spread = spread.reshape(fan_out, fan_in, 4, kernel[0] + 1, kernel[1] + 1).permute(2, 0, 1, 3, 4)
        stacked = spread.reshape(4 * fan_out, fan_in, kernel[0] + 1, kernel[1] + 1)
        bias = None if self.bias is None else torch.cat([self.bias] * 4)
        values = nn.functional.conv2d(x, stacked, bias, stride=2, padding=self.padding)
        best: Tensor = _LargestPlane.apply(values)  # type: ignore[no-untyped-call]
        return best


def _shifts(extent: int) -> Tensor:
    """(extent, 2, extent + 1): one where tap + shift meets the wider kernel's tap."""
    taps, shift, wide = torch.arange(extent), torch.arange(2), torch.arange(extent + 1)
    return (taps.view(-1, 1, 1) + shift.view(1, -1, 1)) == wide.view(1, 1, -1)


@torch.library.custom_op("psgl::twice", mutates_args=())
def twice(x: Tensor, height: int, width: int) -> Tensor:
    """Each value four times, as a 2x2 square, then zeros up to the extents: (N, C, H, W) becomes (N, C, *extents).

    An operator of its own, since a trace of torch's forms either excludes batches of one or becomes copies.
    """
    large = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return nn.functional.pad(large, (0, width - large.shape[3], 0, height - large.shape[2]))


@twice.register_fake
def _(x: Tensor, height: int, width: int) -> Tensor:
    return x.new_empty(*x.shape[:2], height, width)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(x, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, best = ctx.saved_tensors
        grid = x.shape[2:]
        x = x[:, :, : 2 * best.shape[2], : 2 * best.shape[3]]
        pool = nn.functional.max_pool2d
        row, column = pool(x, (1, 2), stride=2), pool(x, (2, 1), stride=2)
        place = _first_equal((pool(x, 1, stride=2), row, torch.maximum(row, column)), best)
        number = (torch.arange(grid[0]) % 2 * 2).view(-1, 1) + torch.arange(grid[1]) % 2
        chosen = twice(place, *grid) == number.to(best.dtype)
        spread: Tensor = twice(gradient, *grid) * chosen.to(gradient.dtype)
        return spread


class _PlanePool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Pool.apply(x)  # type: ignore[no-untyped-call]
        return result


@torch.library.custom_op("psgl::convolution", mutates_args=())
def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, zeros: Sequence[int]) -> Tensor:
    """A convolution of stride 1 with so many zeros around its input: as ``torch.nn.functional.pad`` takes them.

    An operator of its own, since a trace of torch's padding excludes batches of one.
    """
    return nn.functional.conv2d(nn.functional.pad(x, zeros), weight, bias)


@convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, zeros: Sequence[int]) -> Tensor:
    width, height = (sum(zeros[2 * i : 2 * i + 2]) + x.shape[3 - i] - weight.shape[3 - i] + 1 for i in range(2))
    return x.new_empty(x.shape[0], weight.shape[0], height, width)


class _FixedWeights(torch.autograd.Function):
    """A convolution of stride 1 whose weights get no gradient."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, zeros: Sequence[int]) -> Tensor:
        y: Tensor = convolution(x, weight, bias, zeros)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Sequence[int]], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.zeros = inputs[3]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        height, width = (extent - 1 for extent in weight.shape[2:])
        rest = [reach - zeros for reach, zeros in zip((width, width, height, height), ctx.zeros, strict=True)]
        return convolution(gradient, weight.flip(2, 3).transpose(0, 1), None, rest), None, None, None


class _FixedConvolution(nn.Module):
    """A convolution of stride 1 with fixed weights; if ``pooled``, less padding spares an odd last row and column."""

    def __init__(self, convolution: nn.Conv2d, pooled: bool) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.bias = convolution.bias
        self.padding = [int(padding) for padding in convolution.padding]
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        zeros = []
        for extent, taps, padding in zip(x.shape[:1:-1], self.weight.shape[:1:-1], self.padding[::-1], strict=True):
            odd = (extent + 2 * padding - taps + 1) % 2 if self.pooled and padding else 0
            zeros += [padding, padding - odd]
        y: Tensor = _FixedWeights.apply(x, self.weight, self.bias, zeros)  # type: ignore[no-untyped-call]
        return y
