"""How much of a sample a reconstruction shows: always measured against x itself, never against the perturbed x_hat."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from server_sdk.errors import ServerError

__all__ = ["Likeness", "likeness"]

Array = npt.NDArray[np.float32]
_LEAST_MSE = 1e-10
_PART = 1024
_SMALLEST_IMAGE = 6  # SSIM's window reflects five pixels at the border


@dataclass(frozen=True)
class Likeness:
    """Means over the samples.

    Attributes:
        ssim: structural similarity (Wang et al. 2004, Gaussian window of 11, sigma 1.5) in [-1, 1]; None for signals,
            where it says nothing, and for images below 6 pixels.
        psnr: peak signal-to-noise ratio in dB of the mean squared error, at most 100.
        mse: mean squared error, inputs in [0, 1].
        correlation: Pearson correlation with the sample, in [-1, 1]; 0 where either is constant.
        nmse: the squared error in units of what the mean sample of this set would make: 1 is a foe who knows the
            mean and nothing else.
    """

    ssim: float | None
    psnr: float
    mse: float
    correlation: float
    nmse: float

    def as_fields(self) -> dict[str, float | None]:
        """As JSON values."""
        return asdict(self)


def likeness(reconstructed: Array, x: Array) -> Likeness:
    """Compare reconstructions with the samples they are of.

    Args:
        reconstructed: float32 (N, C, H, W) or (N, C, T).
        x: the same shape, values in [0, 1], N at least 1.

    Raises:
        ServerError: other shapes, or values that are not finite.
    """
    if reconstructed.shape != x.shape or x.ndim not in (3, 4) or not len(x):
        raise ServerError(f"reconstructions of shape {reconstructed.shape} of samples of shape {x.shape}")
    if not np.isfinite(reconstructed).all():
        raise ServerError("a reconstruction holds NaN or infinity: the attack has diverged, lower its rate")
    wanted, got = (each.reshape(len(x), -1).astype(np.float64) for each in (x, reconstructed))
    squared = float(np.square(got - wanted).mean())
    spread = float(np.square(wanted - wanted.mean(axis=0)).mean())
    return Likeness(
        ssim=_ssim(reconstructed, x) if x.ndim == 4 and min(x.shape[2:]) >= _SMALLEST_IMAGE else None,
        psnr=-10.0 * float(np.log10(max(squared, _LEAST_MSE))),
        mse=squared,
        correlation=float(_correlation(got, wanted).mean()),
        nmse=squared / max(spread, _LEAST_MSE),
    )


def _ssim(reconstructed: Array, x: Array) -> float:
    total = 0.0
    for start in range(0, len(x), _PART):
        part = slice(start, start + _PART)
        values = structural_similarity_index_measure(
            torch.from_numpy(np.ascontiguousarray(reconstructed[part])),
            torch.from_numpy(np.ascontiguousarray(x[part])),
            data_range=1.0,
            reduction="sum",
        )
        total += float(values)  # type: ignore[arg-type]
    return total / len(x)


def _correlation(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    first = first - first.mean(axis=1, keepdims=True)
    second = second - second.mean(axis=1, keepdims=True)
    scale = np.sqrt(np.square(first).sum(axis=1) * np.square(second).sum(axis=1))
    together = (first * second).sum(axis=1)
    result: npt.NDArray[np.float64] = np.divide(together, scale, out=np.zeros_like(scale), where=scale > 1e-12)
    return result
