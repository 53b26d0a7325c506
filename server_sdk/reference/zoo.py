"""Small reference models for common samples, each with a narrow cut: ``psgl-export models`` lists them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from server_sdk.errors import ModelError
from server_sdk.reference.specification import ModelSpec, build
from server_sdk.reference.split import split

__all__ = ["ZOO", "Counted", "ZooModel", "count", "small_network"]

_FACTORY = "server_sdk.reference.zoo:small_network"
_CUT = "bottleneck"


def small_network(
    input_shape: Sequence[int],
    classes: int,
    widths: Sequence[int] = (16, 32),
    bottleneck: int = 4,
    separable: bool = False,
) -> nn.Sequential:
    """A convolutional network that takes samples as they are; cut it at ``bottleneck``.

    Front: for each width a convolution with BatchNorm and ReLU that halves the grid (``conv1``, ``bn1``, ``relu1``), or
    a depthwise and a pointwise one from the second width on, then a 1x1 convolution to few channels. Back: two
    convolutions of 64 channels, mean over the grid, head.

    Args:
        input_shape: (C, H, W) or (C, T), each axis at least 8.
        classes: K, at least 2.
        widths: channels of the front's stages.
        bottleneck: channels at the cut.
        separable: depthwise-separable stages, which need a fraction of the products and weights.

    Raises:
        ModelError: a shape of neither two nor three sizes, or a size out of its range.
    """
    channels, *grid = input_shape
    if len(grid) not in (1, 2) or min(*grid, 8) < 8 or min(channels, bottleneck, *widths) < 1 or classes < 2:
        raise ModelError(
            f"input {tuple(input_shape)}, {classes} classes, widths {tuple(widths)}, bottleneck {bottleneck}: give "
            "(C, T) or (C, H, W) with axes of at least 8, 2 classes and sizes of at least 1"
        )
    image = len(grid) == 2
    convolution, norm = (nn.Conv2d, nn.BatchNorm2d) if image else (nn.Conv1d, nn.BatchNorm1d)
    kernel = 3 if image else 9
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    fan_in = channels
    for number, width in enumerate(widths, start=1):
        strided: dict[str, Any] = {"stride": 2, "padding": kernel // 2, "bias": False}
        if separable and number > 1:
            layers[f"depth{number}"] = convolution(fan_in, fan_in, kernel, groups=fan_in, **strided)
            layers[f"depthbn{number}"] = norm(fan_in)
            layers[f"depthrelu{number}"] = nn.ReLU()
            layers[f"conv{number}"] = convolution(fan_in, width, 1, bias=False)
        else:
            layers[f"conv{number}"] = convolution(fan_in, width, kernel, **strided)
        layers[f"bn{number}"] = norm(width)
        layers[f"relu{number}"] = nn.ReLU()
        fan_in = width
    layers["bottleneck"] = convolution(fan_in, bottleneck, 1)
    fan_in = bottleneck
    for name in ("a", "b"):
        layers[f"conv_{name}"] = convolution(fan_in, 64, kernel, padding=kernel // 2, bias=False)
        layers[f"bn_{name}"] = norm(64)
        layers[f"relu_{name}"] = nn.ReLU()
        fan_in = 64
    layers["pool"] = nn.AdaptiveAvgPool2d(1) if image else nn.AdaptiveAvgPool1d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(64, classes)
    return nn.Sequential(layers)


@dataclass(frozen=True)
class ZooModel:
    """A reference model.

    Attributes:
        input_shape, classes: that it is listed with; it takes others too.
        arguments: further ones of ``small_network``.
        about: what it is for.
    """

    input_shape: tuple[int, ...]
    classes: int
    arguments: Mapping[str, Any]
    about: str

    def spec(self, input_shape: Sequence[int] | None = None, classes: int | None = None) -> ModelSpec:
        """The model for samples of a shape and for so many classes; None: those that it is listed with."""
        shape = list(self.input_shape if input_shape is None else input_shape)
        arguments = {"input_shape": shape, "classes": self.classes if classes is None else classes}
        return ModelSpec(_FACTORY, arguments | dict(self.arguments), _CUT)


ZOO: Mapping[str, ZooModel] = MappingProxyType(
    {
        "grey28": ZooModel((1, 28, 28), 10, {"widths": [16, 32]}, "small grey images"),
        "rgb64": ZooModel((3, 64, 64), 4, {"widths": [16, 32, 48]}, "colour images"),
        "grey128": ZooModel((1, 128, 128), 2, {"widths": [12, 24, 48]}, "larger grey images, as of radiology"),
        "separable64": ZooModel(
            (3, 64, 64), 4, {"widths": [16, 32, 64], "separable": True}, "colour images, depthwise-separable front"
        ),
        "ecg256": ZooModel((1, 256), 5, {"widths": [16, 24, 32]}, "heart beats of one lead"),
        "watch128": ZooModel((6, 128), 6, {"widths": [24, 32]}, "acceleration and rotation of a smartwatch"),
    }
)
"""Every reference model by its name."""


@dataclass(frozen=True)
class Counted:
    """What a model costs.

    Attributes:
        front, back: parameters.
        front_macs, back_macs: products of convolutions and linear layers for one sample.
        cut_shape: of the activations of one sample.
    """

    front: int
    back: int
    front_macs: int
    back_macs: int
    cut_shape: tuple[int, ...]


def count(model: ModelSpec, input_shape: Sequence[int]) -> Counted:
    """Parameters and products of both halves.

    Raises:
        ModelError: the model cannot be built or split.
    """
    halves = split(build(model, 0).eval(), model.cut)
    value = torch.zeros(1, *input_shape)
    macs, shapes = [0, 0], []
    for number, half in enumerate(halves):

        def add(layer: nn.Module, taken: Any, given: Tensor, number: int = number) -> None:
            weight = layer.get_parameter("weight")
            macs[number] += given.numel() * weight.numel() // weight.shape[0]

        for layer in half.modules():
            if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
                layer.register_forward_hook(add)
        with torch.no_grad():
            value = half(value)
        shapes.append(tuple(int(extent) for extent in value.shape[1:]))
    front, back = (sum(each.numel() for each in half.parameters()) for half in halves)
    return Counted(front, back, macs[0], macs[1], shapes[0])
