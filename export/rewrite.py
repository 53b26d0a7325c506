"""The same front in a form whose gradient is cheaper on a device: pools without index lists.

A pool's gradient goes to the first maximum of each window. onnxruntime finds it with a branch per input value
and then scatters; here the window's values are compared as whole planes instead. Results and gradients are
those of the layers that are replaced, ties included; names of weights stay.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["cheap_gradient", "twice"]

_FEW_CHANNELS = 4


def cheap_gradient(front: nn.Module) -> nn.Module:
    """A copy of a sequential front with its 2x2 max-pools rewritten; any other module is only copied.

    ReLU directly before a pool moves behind it, where it has a quarter of the work. A first convolution of
    few channels before such a pool computes the window's four values as four planes.
    """
    front = copy.deepcopy(front)
    if type(front) is not nn.Sequential:
        return front
    layers = list(zip(front._modules, front, strict=True))  # named_children would skip a layer that is used twice
    result: OrderedDict[str, nn.Module] = OrderedDict(layers)
    for position, (name, layer) in enumerate(layers):
        if not _is_plain_pool(layer):
            continue
        before = position - 1
        active = before >= 0 and type(layers[before][1]) is nn.ReLU
        pool: nn.Module = _PlanePool()
        if active:
            result[layers[before][0]] = nn.Identity()
            before -= 1
        first = layers[0][1]
        if before == 0 and isinstance(first, nn.Conv2d) and _is_thin(first):
            result[layers[0][0]] = _PooledConvolution(first)
            pool = nn.Identity()
        result[name] = nn.Sequential(pool, nn.ReLU()) if active else pool
    return nn.Sequential(result)


def _is_plain_pool(layer: nn.Module) -> bool:
    if type(layer) is not nn.MaxPool2d:
        return False
    stride = layer.kernel_size if layer.stride is None else layer.stride
    fits = layer.kernel_size in (2, (2, 2)) and stride in (2, (2, 2)) and layer.padding in (0, (0, 0))
    return fits and layer.dilation in (1, (1, 1)) and not layer.ceil_mode and not layer.return_indices


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
