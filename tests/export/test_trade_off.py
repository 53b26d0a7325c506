"""What a trained front costs and shows, on a bundle as small as can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edge_sdk.batch import Samples
from export.errors import ExportError
from export.trade_off import LEAST_HELD_OUT, TradeOff, weigh

Draw = Callable[[int, int], Samples]


class Constant(nn.Module):
    """Decides for class 0."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.zeros(len(x), dtype=torch.int64), 3).float()


def test_a_frozen_bundle_is_weighed(built: dict[str, Any], samples: Draw) -> None:
    held_out = samples(60, 5)
    found = weigh(built["hardened"].path, held_out, undefended=Constant(), epochs=2)
    again = weigh(built["hardened"].path, held_out, undefended=Constant(), epochs=2)
    assert found == again, "the seed decides"
    assert (found.measure, found.victims, found.bytes_per_sample) == ("SSIM", 30, 16), "32 values of 4 bits"
    assert found.undefended == pytest.approx(1 / 3) and 0 <= found.accuracy <= 1
    assert found.bits_per_sample == pytest.approx(16.0)
    assert np.isfinite(found.excess)
    assert found.alone is not None and found.alone > 0.9, "the fixture's guide was fitted on such samples"
    words = f"accuracy {found.accuracy:.1%} (33.3% without a defence), {found.alone:.1%} by the device's guide where"
    assert words in str(found) and "16 bytes" in str(found)


def test_a_front_that_hides_nothing_shows_more(built: dict[str, Any], samples: Draw) -> None:
    plain = weigh(built["vanilla"].path, samples(120, 5), epochs=20)
    assert plain.excess > 0.05 and plain.bits_per_sample is None and plain.undefended is None
    assert plain.bytes_per_sample == 2 * 32 * 4 * 4 and plain.alone is None
    assert f"shows {plain.excess:.3f} SSIM more than" in str(plain)
    assert f"shows {plain.excess:.3f} SSIM less than" in str(replace(plain, excess=-plain.excess))
    assert "no bound in bits" in str(plain) and "guide" not in str(plain) and "without a defence" not in str(plain)


def test_too_few_samples_are_refused(built: dict[str, Any], samples: Draw) -> None:
    assert isinstance(weigh(built["hardened"].path, samples(LEAST_HELD_OUT, 5), epochs=1), TradeOff)
    with pytest.raises(ExportError, match="19 held-out samples are too few to measure anything: give at least 20"):
        weigh(built["hardened"].path, samples(LEAST_HELD_OUT - 1, 5), epochs=1)
