from __future__ import annotations

import math

import numpy as np
import pytest

from edge_sdk.errors import ConfigError
from edge_sdk.noise import KEY_BYTES, draw_noise

KEY, OTHER = bytes(range(KEY_BYTES)), bytes(KEY_BYTES)
HERE, THERE = b"a" * KEY_BYTES, b"b" * KEY_BYTES
X = np.random.default_rng(0).random((6, 1, 8, 8), dtype=np.float32)


def test_a_sample_has_the_same_noise_whenever_it_is_sent() -> None:
    whole = draw_noise(KEY, HERE, X, (4, 5))
    assert whole.dtype == np.float32 and whole.shape == (6, 4, 5)
    assert np.array_equal(draw_noise(KEY, HERE, X[[4, 1]], (4, 5)), whole[[4, 1]])


def test_key_context_and_sample_each_change_all_of_it() -> None:
    first = draw_noise(KEY, HERE, X, (200,))
    nearly = X.copy()
    nearly[:, 0, 0, 0] = np.nextafter(nearly[:, 0, 0, 0], np.float32(2))
    for other in (
        draw_noise(OTHER, HERE, X, (200,)),
        draw_noise(KEY, THERE, X, (200,)),
        draw_noise(KEY, HERE, nearly, (200,)),
    ):
        assert np.abs([np.corrcoef(a, b)[0, 1] for a, b in zip(first, other, strict=True)]).max() < 0.3
    assert np.abs(np.corrcoef(first) - np.eye(6)).max() < 0.3, "nor do samples share noise"


def test_it_is_standard_normal() -> None:
    values = np.sort(draw_noise(KEY, HERE, X, (5000,)).ravel().astype(np.float64))
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    normal = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in values[::100]])
    assert np.abs(normal - np.linspace(0, 1, len(values))[::100]).max() < 0.015, "Kolmogorov and Smirnov's distance"


def test_the_numbers_are_frozen() -> None:
    """Another numpy, or another release of this file, must give a device's samples the same noise."""
    x = np.arange(4, dtype=np.float32).reshape(1, 4)
    assert draw_noise(KEY, HERE, x, (3,)).tobytes().hex() == "043f903f35ce12bf3c950c3f"
    assert draw_noise(KEY, HERE, x, (3,), "laplace").tobytes().hex() == "b15887beac727a3fea60cabc"


def test_laplace_noise_has_the_same_deviation_and_heavier_tails() -> None:
    drawn = draw_noise(KEY, HERE, X, (5000,), "laplace")
    assert drawn.dtype == np.float32
    values = np.sort(drawn.ravel().astype(np.float64))
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    scaled = values[::100] * math.sqrt(2)
    laplace = np.where(scaled < 0, np.exp(-np.abs(scaled)) / 2, 1 - np.exp(-np.abs(scaled)) / 2)
    assert np.abs(laplace - np.linspace(0, 1, len(values))[::100]).max() < 0.015, "Kolmogorov and Smirnov's distance"
    assert np.array_equal(draw_noise(KEY, HERE, X[[4, 1]], (5000,), "laplace"), drawn[[4, 1]])
    with pytest.raises(ConfigError, match="gaussian or laplace"):
        draw_noise(KEY, HERE, X, (3,), "uniform")


@pytest.mark.parametrize("key", [b"", KEY[:31], KEY + b"\0"])
def test_a_key_of_another_length(key: bytes) -> None:
    with pytest.raises(ConfigError, match="noise key has 32 bytes"):
        draw_noise(key, HERE, X, (2,))
    with pytest.raises(ConfigError, match="noise context has 32 bytes"):
        draw_noise(KEY, key, X, (2,))
