"""The device's perturbation: reversed JSMA map, its normalisation, and what the front sees of it.

Source: Khowaja et al., "Get your Foes Fooled", arXiv 2201.04569, section on the device's side. Everything is
plain torch with ``torch.func.vjp``, so that the exporter traces the very functions that tests and audits
call. Images are ``(N, C, H, W)``, signals ``(N, C, T)``; the same code serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from server_sdk.errors import ModelError

__all__ = [
    "Normalisation",
    "Perturbation",
    "Perturbed",
    "front_input",
    "normalise",
    "perturb",
    "saliency_map",
    "space_to_depth",
]

Normalisation = Literal["sign", "max"]


@dataclass(frozen=True)
class Perturbation:
    """How a profile perturbs.

    Attributes:
        normalisation: ``sign`` (every chosen pixel moves by the full budget) or ``max`` (proportional,
            largest moves by it).
        epsilon: the L-infinity budget in units of the input's range, 0 to 1; the default of the graphs'
            ``epsilon`` input.
        map_channel: the front sees the map as one more channel.
    """

    normalisation: Normalisation = "sign"
    epsilon: float = 0.2
    map_channel: bool = True

    def __post_init__(self) -> None:
        if self.normalisation not in ("sign", "max"):
            raise ModelError(f"unknown normalisation {self.normalisation!r}: use 'sign' or 'max'")
        if not 0.0 <= self.epsilon <= 1.0:
            raise ModelError(f"epsilon {self.epsilon} is outside 0..1: it is a part of the input's range")


@dataclass(frozen=True)
class Perturbed:
    """What the perturbation gives.

    Attributes:
        perturbed: x_hat = clip(x + Map', 0, 1), shaped like x.
        map: Map', the normalised map before the clip, shaped like x, values 0 to epsilon.
        guide: logits of the guide on x, ``(N, K)``.
    """

    perturbed: Tensor
    map: Tensor
    guide: Tensor


def space_to_depth(x: Tensor, factor: int = 2) -> Tensor:
    """Move blocks of ``factor`` along every spatial axis into channels; nothing is lost.

    Args:
        x: ``(N, C, *S)`` with every spatial extent a multiple of ``factor``.

    Returns:
        ``(N, C * factor**len(S), *(s // factor))``; channel ``c * factor**len(S) + offset``, as
        ``torch.nn.PixelUnshuffle``.

    Raises:
        ModelError: an extent is not a multiple of ``factor``.
    """
    batch, channels, *grid = x.shape
    if any(extent % factor for extent in grid):
        raise ModelError(f"input grid {tuple(grid)} is not a multiple of {factor}: pad or crop the sensor's batch")
    axes = len(grid)
    if axes == 2:
        return torch.nn.functional.pixel_unshuffle(x, factor)
    split = [batch, channels]
    for extent in grid:
        split += [extent // factor, factor]
    blocks = x.reshape(split)
    outer = [2 + 2 * axis for axis in range(axes)]
    inner = [3 + 2 * axis for axis in range(axes)]
    moved = blocks.permute([0, 1, *inner, *outer])
    return moved.reshape([batch, channels * factor**axes, *(extent // factor for extent in grid)])


def saliency_map(guide: Callable[[Tensor], Tensor], x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Reversed, non-targeted JSMA on the guide's logits: two vector-Jacobian products, whatever K is.

    ``alpha = d l_y / dx``, ``beta = sum over k != y of d l_k / dx``; the map is ``-alpha * beta`` where
    ``alpha < 0`` and ``beta > 0``, else 0. Logits, because on softmax probabilities beta equals -alpha.

    Args:
        guide: ``(N, C, *S)`` to logits ``(N, K)``, each row depending on its own sample only.
        x: float ``(N, C, *S)`` in 0..1.
        label: int64 ``(N,)``; -1 takes the class that the guide predicts.

    Returns:
        The guide's logits ``(N, K)`` and the map, shaped like ``x``, not negative, not normalised.
    """
    logits: Tensor
    logits, pull = torch.func.vjp(guide, x)  # type: ignore[misc]
    target = torch.where(label < 0, logits.argmax(dim=1), label)
    classes = torch.arange(logits.shape[1], device=logits.device)
    chosen = (target.unsqueeze(1) == classes).to(logits.dtype)
    alpha = pull(chosen)[0]
    beta = pull(1.0 - chosen)[0]
    return logits, torch.relu(-alpha) * torch.relu(beta)


def normalise(saliency: Tensor, how: Normalisation, epsilon: Tensor | float) -> Tensor:
    """Scale a map: ``sign`` is ``epsilon * (map > 0)``, ``max`` is ``epsilon * map / max(map)`` per sample.

    Args:
        saliency: float ``(N, C, *S)``, not negative.
        epsilon: a number or a float tensor of shape ``()``, 0 to 1.

    Returns:
        Shaped like the map, values 0 to epsilon; a sample whose map is all zero stays zero.
    """
    if how == "sign":
        return (saliency > 0).to(saliency.dtype) * epsilon
    largest = saliency.amax(dim=tuple(range(1, saliency.dim())), keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    return saliency / scale * epsilon


def perturb(
    guide: Callable[[Tensor], Tensor],
    x: Tensor,
    label: Tensor,
    *,
    normalisation: Normalisation,
    epsilon: Tensor | float,
) -> Perturbed:
    """Perturb a batch: ``x_hat = clip(x + Map', 0, 1)``.

    Args:
        guide: as in `saliency_map`.
        x: float ``(N, C, *S)`` in 0..1.
        label: int64 ``(N,)``; -1 takes the class that the guide predicts.
        epsilon: L-infinity budget, 0 to 1; 0 passes the batch unchanged.
    """
    logits, saliency = saliency_map(guide, x, label)
    scaled = normalise(saliency, normalisation, epsilon)
    return Perturbed(perturbed=(x + scaled).clamp(0.0, 1.0), map=scaled, guide=logits)


def front_input(perturbed: Tensor, scaled_map: Tensor | None, downsample: int) -> Tensor:
    """What the front's first layer takes: x_hat on the coarse grid, plus Map' averaged to the same grid.

    Args:
        perturbed: float ``(N, C, *S)``.
        scaled_map: Map', shaped like ``perturbed``; None for a profile without perturbation.
        downsample: 1 leaves the grid alone, 2 halves every spatial axis.

    Returns:
        ``(N, C * downsample**len(S) + (1 if there is a map), *(s // downsample))``.
    """
    grid = perturbed if downsample == 1 else space_to_depth(perturbed, downsample)
    if scaled_map is None:
        return grid
    spread = scaled_map if downsample == 1 else space_to_depth(scaled_map, downsample)
    return torch.cat([grid, spread.mean(dim=1, keepdim=True)], dim=1)
