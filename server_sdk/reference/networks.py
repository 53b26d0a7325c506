"""Reference networks, each a ``torch.nn.Sequential`` of named layers so that it can be cut at any of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from server_sdk.errors import ModelError

__all__ = ["hardened_network", "reference_network", "step_network"]


def reference_network(in_channels: int, grid: Sequence[int], classes: int, rank: int = 0) -> nn.Sequential:
    """The network of the ``paper`` profile; cut it at ``relu2``, or at ``filter`` where it has one.

    Front: conv1 (3, 16) bn1 relu1 conv2 (3, 32) bn2 relu2, grid unchanged, and with a ``rank`` the low-rank filter
    ``filter``, a 1x1 convolution to so many channels. Back: pool1, conv3 (64) bn3 relu3, pool2, conv4 (64) bn4 relu4,
    pool3 to two cells an axis, flatten, head.

    Args:
        in_channels: channels that reach the front, for instance ``4 * C + 1`` for an image with a map
            channel.
        grid: spatial extents that reach the front: ``(H, W)`` or ``(T,)``, each at least 4.
        classes: number of classes K.
        rank: of the activations' channels, 0 for no filter.

    Raises:
        ModelError: a grid of neither one nor two axes, or too small for the two pools; a negative rank.
    """
    _check_grid(grid)
    if rank < 0:
        raise ModelError(f"rank is {rank}: give 0 for no filter, or at least 1")
    image = len(grid) == 2

    def convolution(fan_in: int, fan_out: int) -> nn.Module:
        kind = nn.Conv2d if image else nn.Conv1d
        return kind(fan_in, fan_out, 3, padding=1, bias=False)

    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if image else nn.BatchNorm1d(channels)

    def pool() -> nn.Module:
        return nn.MaxPool2d(2) if image else nn.MaxPool1d(2)

    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=convolution(in_channels, 16),
        bn1=norm(16),
        relu1=nn.ReLU(),
        conv2=convolution(16, 32),
        bn2=norm(32),
        relu2=nn.ReLU(),
    )
    if rank:
        layers["filter"] = (nn.Conv2d if image else nn.Conv1d)(32, rank, 1, bias=False)
    layers |= OrderedDict(
        pool1=pool(),
        conv3=convolution(rank or 32, 64),
        bn3=norm(64),
        relu3=nn.ReLU(),
        pool2=pool(),
        conv4=convolution(64, 64),
        bn4=norm(64),
        relu4=nn.ReLU(),
        pool3=nn.AdaptiveAvgPool2d(2) if image else nn.AdaptiveAvgPool1d(2),
        flatten=nn.Flatten(),
        head=nn.Linear(64 * 2 ** len(grid), classes),
    )
    return nn.Sequential(layers)


def hardened_network(
    in_channels: int,
    grid: Sequence[int],
    classes: int,
    code: int = 32,
    widths: Sequence[int] = (32, 48, 64, 64),
    dropout: float = 0.2,
    kernel: int | None = None,
    cells: int = 2,
) -> nn.Sequential:
    """The network of the ``hardened`` profile, whose front ends in a short bounded vector; cut it at ``tanh``.

    Front: four convolutions with BatchNorm and ReLU (conv2 and conv4 halve the grid, rounding up), pool to ``cells`` an
    axis, dropout, flatten, a linear layer ``code``, codebn, tanh: activations in (-1, 1). Back: head, linear, for more
    would learn the noise of samples that are sent once.

    Args:
        in_channels: channels that reach the front.
        grid: spatial extents that reach the front: ``(H, W)`` or ``(T,)``, each at least 4.
        classes: number of classes K.
        code: values at the cut.
        widths: channels of the four convolutions.
        dropout: share of the features that training leaves out before ``code``, in [0, 1).
        kernel: of the convolutions, odd; None: 3 for images, 9 for signals.
        cells: of the pooled grid along each axis.

    Raises:
        ModelError: a grid of neither one nor two axes or too small, or a size, share or kernel out of its range.
    """
    _check_grid(grid)
    image = len(grid) == 2
    size = (3 if image else 9) if kernel is None else kernel
    if len(widths) != 4 or min(*widths, code, cells) < 1 or size < 1 or size % 2 == 0 or not 0 <= dropout < 1:
        raise ModelError(
            f"widths {tuple(widths)}, code {code}, cells {cells}, kernel {size}, dropout {dropout}: "
            "give four widths, sizes of at least 1, an odd kernel and a dropout in [0, 1)"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    fan_in = in_channels
    for number, (width, stride) in enumerate(zip(widths, (1, 2, 1, 2), strict=True), start=1):
        convolution, norm = (nn.Conv2d, nn.BatchNorm2d) if image else (nn.Conv1d, nn.BatchNorm1d)
        layers[f"conv{number}"] = convolution(fan_in, width, size, stride=stride, padding=size // 2, bias=False)
        layers[f"bn{number}"] = norm(width)
        layers[f"relu{number}"] = nn.ReLU()
        fan_in = width
    layers |= OrderedDict(
        pool=nn.AdaptiveAvgPool2d(cells) if image else nn.AdaptiveAvgPool1d(cells),
        dropout=nn.Dropout(dropout),
        flatten=nn.Flatten(),
        code=nn.Linear(fan_in * cells ** len(grid), code, bias=False),
        codebn=nn.BatchNorm1d(code),
        tanh=nn.Tanh(),
        head=nn.Linear(code, classes),
    )
    return nn.Sequential(layers)


def step_network(classes: int) -> nn.Sequential:
    """The network of ``benchmarks.step``: 1x28x28 in, 32x7x7 at the cut; cut it at ``pool2``."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(1, 16, 3, padding=1),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(16, 32, 3, padding=1),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        conv3=nn.Conv2d(32, 64, 3, padding=1),
        relu3=nn.ReLU(),
        pool3=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        head=nn.Linear(64 * 3 * 3, classes),
    )
    return nn.Sequential(layers)


def _check_grid(grid: Sequence[int]) -> None:
    if len(grid) not in (1, 2):
        raise ModelError(f"grid {tuple(grid)} has {len(grid)} axes: networks for 1 (signal) and 2 (image) exist")
    if min(grid) < 4:
        raise ModelError(f"grid {tuple(grid)} is too small: at least 4 cells an axis are needed")
