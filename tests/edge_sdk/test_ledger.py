from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from edge_sdk.bundle import Manifest
from edge_sdk.ledger import bits_per_sample

PLAIN = Manifest("hardened", (1, 8, 8), ("a", "b"), (32,), "adam", 1e-3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"noise": 1.0}, None),
        ({"bound": 1.0}, None),
        ({"bound": 1.0, "noise": 1.0, "noise_kind": "laplace"}, None),
        ({"bound": 1.0, "noise": 1.0}, 16.0),
        ({"bound": 3.0, "noise": 1.0, "cut_shape": (4, 2, 2)}, 8 * math.log2(10)),
        ({"bound": 1.0, "noise": 1.0, "bits": 4, "span": (-3.0, 3.0)}, 16.0),
        ({"bound": 1.0, "noise": 1e-6, "bits": 4, "span": (-3.0, 3.0)}, 128.0),
        ({"bound": 1.0, "noise": 1e-6, "bits": 4}, 192.0),
        ({"bits": 1, "span": (-1.0, 1.0)}, 32.0),
        ({"bits": 2, "noise": 1.0, "noise_kind": "laplace", "bound": 1.0, "span": (-1.0, 1.0)}, 64.0),
    ],
)
def test_the_least_of_all_that_bounds_it(changes: dict[str, object], expected: float | None) -> None:
    found = bits_per_sample(replace(PLAIN, **changes))  # type: ignore[arg-type]
    assert found is None if expected is None else found == pytest.approx(expected)


def test_no_channel_of_bounded_inputs_says_more() -> None:
    """The exact mutual information of equally likely inputs -1 and 1 with noise of deviation 1, by integration."""
    y = np.linspace(-12, 12, 200_001)
    given = [np.exp(-((y - x) ** 2) / 2) / math.sqrt(2 * math.pi) for x in (-1.0, 1.0)]
    mixed = (given[0] + given[1]) / 2
    entropy = -float(np.sum(mixed * np.log2(mixed)) * (y[1] - y[0]))
    information = entropy - 0.5 * math.log2(2 * math.pi * math.e)
    bound = bits_per_sample(replace(PLAIN, cut_shape=(1,), bound=1.0, noise=1.0))
    assert bound is not None and 0.4 < information < bound == 0.5
