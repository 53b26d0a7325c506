from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from export.errors import ExportError
from export.layers import check_layers


class _Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_known_layers_and_own_modules_pass() -> None:
    check_layers(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.ReLU(), _Own())))
    check_layers(nn.Sequential(nn.Dropout(0.0)))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Dropout(0.3), "random mask"),
        (nn.LSTM(2, 2), "behind the cut"),
        (nn.ConvTranspose2d(1, 1, 2), "behind the cut"),
        (nn.Conv2d(1, 1, 3, padding="same"), "padding='same'"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), "padding_mode"),
        (nn.BatchNorm2d(2, momentum=None), "momentum=None"),
        (nn.BatchNorm2d(2, track_running_stats=False), "track_running_stats"),
        (nn.MaxPool2d(3, stride=2), "overlapping"),
        (nn.MaxPool2d(2, stride=(2, 1)), "overlapping"),
        (nn.MaxPool2d(2, ceil_mode=True), "ceil_mode"),
        (nn.AvgPool2d(2, ceil_mode=True), "ceil_mode"),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), "count_include_pad"),
        (nn.AvgPool2d(2, divisor_override=3), "divisor_override"),
    ],
)
def test_a_refused_layer_is_named_with_the_reason(layer: nn.Module, reason: str) -> None:
    front = nn.Sequential()
    front.add_module("first", nn.ReLU())
    front.add_module("culprit", layer)
    with pytest.raises(ExportError, match=rf"'culprit' \({type(layer).__name__}\).*{reason}"):
        check_layers(front)


def test_a_frozen_front_may_have_what_needs_no_gradient() -> None:
    layers = (nn.Dropout(0.3), nn.AdaptiveAvgPool2d(2), nn.Conv2d(1, 1, 3, padding="same"), nn.MaxPool2d(3, stride=2))
    check_layers(nn.Sequential(*layers, nn.BatchNorm2d(2, momentum=None)), frozen=True)
    with pytest.raises(ExportError, match="track_running_stats"):
        check_layers(nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)), frozen=True)
    layer = _Own()
    layer.register_buffer("scale", torch.ones(3))
    with pytest.raises(ExportError, match="buffer 'scale'"):
        check_layers(nn.Sequential(layer), frozen=True)


def test_a_buffer_outside_batch_norm_is_refused() -> None:
    layer = _Own()
    layer.register_buffer("scale", torch.ones(3))
    with pytest.raises(ExportError, match=r"layer '0'.*buffer 'scale'"):
        check_layers(nn.Sequential(layer))
