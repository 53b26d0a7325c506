from __future__ import annotations

import math

import numpy as np
import pytest

from edge_sdk.errors import ConfigError
from edge_sdk.noise import KEY_BYTES, draw_noise

KEY, OTHER = bytes(range(KEY_BYTES)), bytes(KEY_BYTES)
X = np.random.default_rng(0).random((6, 1, 8, 8), dtype=np.float32)


def test_a_sample_has_the_same_noise_whenever_it_is_sent() -> None:
    whole = draw_noise(KEY, 3, X, (4, 5))
    assert whole.dtype == np.float32 and whole.shape == (6, 4, 5)
    assert np.array_equal(draw_noise(KEY, 3, X[[4, 1]], (4, 5)), whole[[4, 1]])


def test_key_version_and_sample_each_change_all_of_it() -> None:
    first = draw_noise(KEY, 3, X, (200,))
    nearly = X.copy()
    nearly[:, 0, 0, 0] = np.nextafter(nearly[:, 0, 0, 0], np.float32(2))
    for other in (draw_noise(OTHER, 3, X, (200,)), draw_noise(KEY, 4, X, (200,)), draw_noise(KEY, 3, nearly, (200,))):
        assert np.abs([np.corrcoef(a, b)[0, 1] for a, b in zip(first, other, strict=True)]).max() < 0.3
    assert np.abs(np.corrcoef(first) - np.eye(6)).max() < 0.3, "nor do samples share noise"


def test_it_is_standard_normal() -> None:
    values = np.sort(draw_noise(KEY, 0, X, (5000,)).ravel().astype(np.float64))
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    normal = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in values[::100]])
    assert np.abs(normal - np.linspace(0, 1, len(values))[::100]).max() < 0.015, "Kolmogorov and Smirnov's distance"


def test_the_numbers_are_frozen() -> None:
    """Another numpy, or another release of this file, must give a device's samples the same noise."""
    x = np.arange(4, dtype=np.float32).reshape(1, 4)
    assert draw_noise(KEY, 7, x, (3,)).tobytes().hex() == "500f953e21bb1e4029842f3f"


@pytest.mark.parametrize("key", [b"", KEY[:31], KEY + b"\0"])
def test_a_key_of_another_length(key: bytes) -> None:
    with pytest.raises(ConfigError, match="32 bytes"):
        draw_noise(key, 0, X, (2,))
