from __future__ import annotations

import json

import numpy as np
import pytest

from server_sdk.audit.metrics import likeness
from server_sdk.errors import ServerError


def images(count: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 1, 12, 10), dtype=np.float32)


def test_the_sample_itself_is_perfect() -> None:
    x = images()
    found = likeness(x, x)
    assert found.ssim == pytest.approx(1.0, abs=1e-5)
    assert (found.psnr, found.mse, found.nmse) == (100.0, 0.0, 0.0)
    assert found.correlation == pytest.approx(1.0)
    json.dumps(found.as_fields(), allow_nan=False)


def test_the_mean_sample_has_nmse_one() -> None:
    x = images()
    found = likeness(np.broadcast_to(x.mean(axis=0), x.shape).copy(), x)
    assert found.nmse == pytest.approx(1.0, rel=1e-4)
    assert found.ssim is not None and found.ssim < 0.2


def test_values_by_hand() -> None:
    x = np.zeros((2, 1, 8), np.float32)
    x[0, 0, :4], x[1, 0, 4:] = 1, 1
    found = likeness(np.stack([x[0], 1 - x[1]]), x)
    assert found.ssim is None, "SSIM says nothing about signals"
    assert found.mse == pytest.approx(0.5)
    assert found.psnr == pytest.approx(10 * np.log10(2))
    assert found.correlation == pytest.approx(0.0), "one is right, one the very opposite"
    assert found.nmse == pytest.approx(0.5 / 0.25)


def test_a_constant_reconstruction_correlates_with_nothing() -> None:
    found = likeness(np.full((3, 1, 8), 0.5, np.float32), np.random.default_rng(1).random((3, 1, 8), dtype=np.float32))
    assert found.correlation == 0.0


def test_ssim_does_not_depend_on_how_many_are_scored_at_once() -> None:
    x, noise = images(1500), images(1500, 1)
    whole = likeness(np.clip(x + 0.2 * noise, 0, 1), x).ssim
    parts = [likeness(np.clip(x[s] + 0.2 * noise[s], 0, 1), x[s]).ssim for s in (slice(0, 700), slice(700, 1500))]
    assert whole == pytest.approx((700 * parts[0] + 800 * parts[1]) / 1500, abs=1e-5)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (np.zeros((3, 1, 12, 9), np.float32), "shape"),
        (np.full((40, 1, 12, 10), np.nan, np.float32), "NaN"),
    ],
)
def test_what_cannot_be_compared(made: np.ndarray, words: str) -> None:
    with pytest.raises(ServerError, match=words):
        likeness(made, images())
