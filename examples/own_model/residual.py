"""A small residual network, to be split at one of its stages: ``--cut layer1`` or ``--cut layer2``."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Residual", "Stage"]


class Stage(nn.Module):
    """Two convolutions and the way around them, on half the grid.

    Args:
        inputs, outputs: channels.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.around = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Float (N, inputs, H, W) to (N, outputs, H/2, W/2), rounded up."""
        hidden = self.relu(self.bn1(self.conv1(x)))
        added: Tensor = self.relu(self.bn2(self.conv2(hidden)) + self.around(x))
        return added


class Residual(nn.Module):
    """A stem, three stages, a linear layer.

    Args:
        channels: of a sample.
        classes: number of classes.
        width: channels of the stem and the first stage; each further stage has twice as many.
    """

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.layer1 = Stage(width, width)
        self.layer2 = Stage(width, 2 * width)
        self.layer3 = Stage(2 * width, 4 * width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Float (N, channels, H, W) to logits (N, classes)."""
        features = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: Tensor = self.head(self.pool(features).flatten(1))
        return logits
