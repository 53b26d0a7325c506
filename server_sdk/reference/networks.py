"""Reference networks, each a ``torch.nn.Sequential`` of named layers so that it can be cut at any of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from server_sdk.errors import ModelError

__all__ = ["reference_network", "step_network"]


def reference_network(in_channels: int, grid: Sequence[int], classes: int) -> nn.Sequential:
    """The network of the ``paper`` profile; cut it at ``relu2``.

    Front: conv1 (3, 16) bn1 relu1 conv2 (3, 32) bn2 relu2, grid unchanged. Back: pool1, conv3 (64) bn3 relu3,
    pool2, conv4 (64) bn4 relu4, pool3 to two cells an axis, flatten, head.

    Args:
        in_channels: channels that reach the front, for instance ``4 * C + 1`` for an image with a map
            channel.
        grid: spatial extents that reach the front: ``(H, W)`` or ``(T,)``, each at least 4.
        classes: number of classes K.

    Raises:
        ModelError: a grid of neither one nor two axes, or too small for the two pools.
    """
    if len(grid) not in (1, 2):
        raise ModelError(f"grid {tuple(grid)} has {len(grid)} axes: networks for 1 (signal) and 2 (image) exist")
    if min(grid) < 4:
        raise ModelError(f"grid {tuple(grid)} is too small for two pools: at least 4 cells an axis are needed")
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
        pool1=pool(),
        conv3=convolution(32, 64),
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
