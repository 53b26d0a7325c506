"""Every kind of layer that a front or a guide may have, and the page that lists them.

``python -m tests.export.kinds`` writes ``docs/layers.md`` again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

CHANNELS, GRID, LENGTH = 4, 6, 12
PAGE = Path(__file__).resolve().parents[2] / "docs" / "layers.md"


class Residual(nn.Module):
    """Two convolutions and a shortcut, added in place, as residual networks have it."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        convolution, norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv2d, nn.BatchNorm2d)
        self.conv1, self.bn1 = convolution(CHANNELS, 6, 3, 2, 1, bias=False), norm(6)
        self.conv2, self.bn2 = convolution(6, 6, 3, padding=1, bias=False), norm(6)
        self.short = convolution(CHANNELS, 6, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.short(x)
        return functional.relu(out)


class Mean(nn.Module):
    """Global average pooling, written as a function."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(tuple(range(2, x.dim())))


class Functions(nn.Module):
    """What is called instead of being a layer."""

    def forward(self, x: Tensor) -> Tensor:
        pool = functional.max_pool1d if x.dim() == 3 else functional.max_pool2d
        return functional.silu(pool(2 * x - 1, 2)).flatten(1)


@dataclass(frozen=True)
class Kind:
    """One row of the page; takes (N, 4, 6, 6), of signals (N, 4, 12).

    Attributes:
        name: of the row.
        image, signal: what is tested; no signal for what goes value by value.
        remark: what of it is refused, or how it goes.
    """

    name: str
    image: Callable[[], nn.Module]
    signal: Callable[[], nn.Module] | None
    remark: str = ""


def _separable(dims: int) -> nn.Module:
    convolution, norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv2d, nn.BatchNorm2d)
    return nn.Sequential(
        convolution(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False),
        norm(CHANNELS),
        nn.ReLU6(),
        convolution(CHANNELS, 6, 1, bias=False),
        norm(6),
    )


def _by_value(make: Callable[[], nn.Module], name: str) -> Kind:
    return Kind(name, make, None)


_PADDING = 'padding as numbers, filled with zeros: `padding="same"` and other modes are refused'
_POOL = "windows that do not overlap; no `ceil_mode`, `dilation`, `return_indices`"
_AVERAGE = "no `ceil_mode`, `divisor_override`; padding counts (`count_include_pad=True`)"
_NORM = "front: the batch's statistics in training, running ones after; a `momentum` and running statistics are needed"

KINDS = (
    Kind("Conv", lambda: nn.Conv2d(4, 5, 3), lambda: nn.Conv1d(4, 5, 3), _PADDING),
    Kind("Conv, padding", lambda: nn.Conv2d(4, 5, 3, padding=1), lambda: nn.Conv1d(4, 5, 5, padding=2)),
    Kind("Conv, stride", lambda: nn.Conv2d(4, 5, 3, 2, 1, bias=False), lambda: nn.Conv1d(4, 5, 3, 2, 1)),
    Kind("Conv, dilation", lambda: nn.Conv2d(4, 5, 2, dilation=2), lambda: nn.Conv1d(4, 5, 3, dilation=3)),
    Kind("Conv, groups", lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.Conv1d(4, 6, 3, groups=2)),
    Kind("Conv, depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: nn.Conv1d(4, 4, 3, groups=4)),
    Kind("Conv, pointwise", lambda: nn.Conv2d(4, 6, 1), lambda: nn.Conv1d(4, 6, 1)),
    Kind("depthwise-separable block", lambda: _separable(2), lambda: _separable(1)),
    Kind("residual block", lambda: Residual(2), lambda: Residual(1), "additions in place are written out of place"),
    Kind("BatchNorm", lambda: nn.BatchNorm2d(4), lambda: nn.BatchNorm1d(4), _NORM),
    Kind("GroupNorm", lambda: nn.GroupNorm(2, 4), lambda: nn.GroupNorm(2, 4)),
    Kind("LayerNorm", lambda: nn.LayerNorm((6, 6)), lambda: nn.LayerNorm(12)),
    Kind(
        "Flatten, Linear",
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 5)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 5)),
    ),
    _by_value(nn.Identity, "Identity"),
    _by_value(nn.ReLU, "ReLU"),
    _by_value(nn.ReLU6, "ReLU6"),
    _by_value(lambda: nn.LeakyReLU(0.1), "LeakyReLU"),
    _by_value(nn.ELU, "ELU"),
    _by_value(nn.SiLU, "SiLU"),
    _by_value(nn.GELU, "GELU"),
    _by_value(nn.Hardswish, "Hardswish"),
    _by_value(nn.Hardtanh, "Hardtanh"),
    _by_value(nn.Sigmoid, "Sigmoid"),
    _by_value(nn.Tanh, "Tanh"),
    Kind("MaxPool", lambda: nn.MaxPool2d(2), lambda: nn.MaxPool1d(3), _POOL),
    Kind("AvgPool", lambda: nn.AvgPool2d(3, 2, 1), lambda: nn.AvgPool1d(4, 2), _AVERAGE),
    Kind(
        "AdaptiveAvgPool",
        lambda: nn.AdaptiveAvgPool2d(1),
        lambda: nn.AdaptiveAvgPool1d(1),
        "to one cell an axis; for more, AvgPool",
    ),
    Kind("`x.mean(...)` over the grid", Mean, Mean),
    Kind("functions of `torch.nn.functional`", Functions, Functions, "those of the layers above, with the same limits"),
)

_HEAD = """\
# Layers of a front and of a guide

A front that devices train, and a guide, may have the layers below: the gradient of each is known, by test, to be
torch's (`tests/export/test_kinds.py`, against autograd in float64 and against finite differences, for images and, but
for what goes value by value, for signals). Everything else is refused with the layer's name, or found wrong by the
comparison with torch that every export makes. A frozen front (profile `hardened`) needs no gradient and may have any
layer that torch can write as ONNX; behind the cut everything goes that torch can train.

| layer | front | guide | remarks |
|---|---|---|---|
"""
_TAIL = """\
| Dropout | no | yes | a random mask cannot be drawn twice alike on the device: place it behind the cut; \
the guide is asked in evaluation mode |
| ConvTranspose, LSTM and all others | no | no | place them behind the cut, or freeze the front |

Buffers other than BatchNorm's are refused in a front: make them parameters or constants. Written by
`python -m tests.export.kinds`.
"""


def page() -> str:
    """``docs/layers.md``."""
    rows = [f"| {kind.name} | yes | yes | {kind.remark} |\n" for kind in KINDS]
    return _HEAD + "".join(rows) + _TAIL


if __name__ == "__main__":
    PAGE.write_text(page())
