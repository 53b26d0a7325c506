"""Models as a user writes them: a residual network with what torch has as functions, a guide, a back for a code."""

from __future__ import annotations

import textwrap
from pathlib import Path

SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, fan_in, fan_out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Conv2d(fan_in, fan_out, 1, stride) if stride > 1 else None

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.short is None else self.short(x)
        return self.relu(out)


class MyNet(nn.Module):
    def __init__(self, width=4, classes=3, rate=0.2):
        super().__init__()
        self.rate = rate
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.layer1 = Block(width, width)
        self.layer2 = Block(width, 2 * width, 2)
        self.layer3 = Block(2 * width, 2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.stem(x)))))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.head(F.dropout(x, self.rate, training=self.training))


class MyGuide(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.gelu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(F.dropout(x, 0.1, self.training))


class MyBack(nn.Sequential):
    def __init__(self, code, classes):
        super().__init__(nn.Linear(code, 16), nn.ReLU(), nn.Linear(16, classes))
"""


def write_module(folder: Path, name: str) -> Path:
    """The models as ``<name>.py``."""
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(SOURCE))
    return path
