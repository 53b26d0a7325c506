"""Recovery of attacked activations: singular-value shrinkage of every sample.

The perturbation that a device adds shows up as the dominant low-rank part of the activations. Proximal
gradient descent on ``lambda * ||M||_* + 1/2 * ||A - M||_F^2`` (Khowaja et al., arXiv 2201.04569) estimates
that part, the trace M; what the recovered stream sees is the residual R = A - M, whose singular values are
those of A clipped at lambda.

The fixed point is closed form: with A = U diag(sigma) V^T it is M = U diag(max(sigma - lambda, 0)) V^T = P A,
where P = U diag(max(1 - lambda/sigma, 0)) U^T. P needs U and sigma alone, and the eigen-decomposition of the
Gram matrix A A^T (of A^T A where A has more rows than columns) gives both, cheaper than an SVD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from server_sdk.errors import ServerError

__all__ = ["Method", "Recovery", "recover", "remove", "shrinkage_projector"]

Method = Literal["gram", "svd", "iterate"]

# A float32 Gram matrix knows sigma/sigma_max near the threshold to eps/threshold: too little below this one.
_DOUBLE_BELOW = 0.05
# Products of larger values could overflow within float32 sums; they are formed 2**64 times smaller.
_LARGE = 1e30
_SHIFT = 2.0**-64


@dataclass(frozen=True)
class Recovery:
    """What `recover` found.

    Attributes:
        recovered: the residual R = A - M, the recovered activations; shape and dtype of A.
        trace: M, the estimate of the attack's trace (the paper's recovered gradient map); as A.
    """

    recovered: Tensor
    trace: Tensor


def recover(
    activations: Tensor,
    *,
    threshold: float = 0.1,
    method: Method = "gram",
    step: float = 0.55,
    iterations: int = 10,
) -> Recovery:
    """Split activations into the recovered part and the attack's trace, each sample by itself.

    No sample's result depends on its batch-mates: lambda is ``threshold`` times the sample's own largest
    singular value. The projector P is detached: the gradient of R with respect to A is that of the linear map
    A -> (I - P) A, finite for every finite A (repeated singular values included). An all-zero sample has the
    trace 0 and P = 0.

    Args:
        activations: (N, C, \\*S) float32 or float64, finite, S of one dimension or more; N may be 0.
        threshold: lambda relative to the largest singular value, in [0, 1]; 0 calls everything trace, 1
            nothing.
        method: ``gram`` (closed form from the Gram matrix's eigenvectors), ``svd`` (closed form from an SVD)
            or ``iterate`` (the paper's proximal iteration from zero, for comparison: one SVD an iteration).
        step: mu of the iteration, in (0, 1]; used by ``iterate`` only.
        iterations: k of the iteration, at least 1; ``iterate`` finds ``(1 - (1 - step)**k)`` times the closed
            form's M.

    Raises:
        ServerError: wrong shape or dtype, a value that is not finite, or an option out of its range.
    """
    _check(activations, threshold, method, step, iterations)
    if activations.shape[0] == 0:
        return Recovery(activations.clone(), torch.zeros_like(activations))
    matrix = activations.detach().flatten(2)
    if matrix.shape[1] > matrix.shape[2]:
        matrix = matrix.mT
    peak = matrix.abs().amax(dim=(1, 2), keepdim=True)
    highest = float(peak.max())
    if not math.isfinite(highest):
        raise ServerError("activations hold NaN or infinity: refuse them, the front has diverged")
    with torch.no_grad():
        # With its largest entry 1 a sample can neither overflow nor vanish when squared.
        scaled = matrix / torch.where(peak > 0, peak, 1.0)
        if method == "iterate":
            projector = _iterate(scaled, threshold, step, iterations)
        else:
            projector = shrinkage_projector(scaled, threshold, method=method)
    if highest < _LARGE:
        recovered = remove(projector, activations)
    else:
        shift = torch.where(peak > _LARGE, _SHIFT, 1.0).reshape(-1, *[1] * (activations.dim() - 1))
        recovered = remove(projector, activations * shift) / shift
    return Recovery(recovered, activations - recovered)


def shrinkage_projector(matrix: Tensor, threshold: float, *, method: Literal["gram", "svd"] = "gram") -> Tensor:
    """P with P X = U diag(max(sigma - lambda, 0)) V^T, lambda = threshold * sigma_max, for each X of a batch.

    Args:
        matrix: X, (N, r, c) with r <= c, float32 or float64, finite; its largest entry should be near 1,
            since the Gram matrix squares it.
        threshold: in [0, 1].
        method: where U and sigma come from.

    Returns:
        (N, r, r), symmetric, eigenvalues in [0, 1]; 0 where X is 0. Meant to be called without gradients.

    Raises:
        ServerError: the decomposition did not converge.
    """
    vectors, sigma = _decompose(matrix, method, double=threshold < _DOUBLE_BELOW)
    return _shrink(vectors, sigma, threshold * sigma.amax(dim=1, keepdim=True)).to(matrix.dtype)


def remove(projector: Tensor, activations: Tensor) -> Tensor:
    """R = (I - P) A for every sample, on A's shorter side: linear in A; keeps A's memory format.

    Args:
        projector: (N, r, r), r = min(C, prod(S)), from `shrinkage_projector`.
        activations: (N, C, \\*S) of the same dtype.
    """
    matrix = activations.flatten(2)
    residual = torch.eye(projector.shape[1], dtype=projector.dtype, device=projector.device) - projector
    left = matrix.shape[1] <= matrix.shape[2]
    if matrix.stride(1) == 1 and not matrix.is_contiguous():  # channels last
        turned = matrix.mT
        product = (turned @ residual if left else residual @ turned).mT
    else:
        product = residual @ matrix if left else matrix @ residual
    return product.reshape(activations.shape)


def _decompose(matrix: Tensor, method: Literal["gram", "svd"], *, double: bool) -> tuple[Tensor, Tensor]:
    """Left singular vectors (N, r, r), singular values (N, r) floored at what rounding leaves."""
    try:
        if method == "svd":
            vectors, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
            floor = torch.finfo(sigma.dtype).eps * matrix.shape[1]
        else:
            wide = matrix.double() if double else matrix
            values, vectors = torch.linalg.eigh(wide @ wide.mT)
            sigma = values.clamp_min(0.0).sqrt()
            floor = math.sqrt(torch.finfo(sigma.dtype).eps * matrix.shape[1])
    except RuntimeError as exc:
        raise ServerError(f"the activations were not decomposed ({exc}): use method='svd'") from exc
    return vectors, torch.maximum(sigma, floor * sigma.amax(dim=1, keepdim=True))


def _shrink(vectors: Tensor, sigma: Tensor, shrinkage: Tensor) -> Tensor:
    """U diag(max(1 - shrinkage/sigma, 0)) U^T; all-zero where every sigma is 0."""
    factor = (1.0 - shrinkage / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)).clamp_min(0.0)
    factor = factor * (sigma.amax(dim=1, keepdim=True) > 0)
    return (vectors * factor.unsqueeze(1)) @ vectors.mT


def _iterate(matrix: Tensor, threshold: float, step: float, iterations: int) -> Tensor:
    """The projector after k iterations M <- SVT_{mu lambda}(M - mu (M - A)) from M = 0.

    Every iterate is P_k A, and shrinking T A multiplies it from the left: so P can be carried instead of M.
    """
    _, sigma = _decompose(matrix, "svd", double=False)
    shrinkage = step * threshold * sigma.amax(dim=1, keepdim=True)
    identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    projector = torch.zeros_like(identity).expand(matrix.shape[0], -1, -1)
    for _ in range(iterations):
        towards = (1.0 - step) * projector + step * identity
        vectors, sigma = _decompose(towards @ matrix, "svd", double=False)
        projector = _shrink(vectors, sigma, shrinkage) @ towards
    return projector


def _check(activations: Tensor, threshold: float, method: str, step: float, iterations: int) -> None:
    if activations.dim() < 3 or 0 in activations.shape[1:]:
        raise ServerError(f"activations have the shape {tuple(activations.shape)}: give (N, C, *S), C and S at least 1")
    if activations.dtype not in (torch.float32, torch.float64):
        raise ServerError(f"activations are {activations.dtype}: convert them to torch.float32")
    if not 0.0 <= threshold <= 1.0:
        raise ServerError(f"threshold is {threshold}: give a share of the largest singular value between 0 and 1")
    if method not in get_args(Method):
        raise ServerError(f"there is no recovery method '{method}': use one of {', '.join(get_args(Method))}")
    if not 0.0 < step <= 1.0 or iterations < 1:
        raise ServerError(f"step is {step}, iterations {iterations}: give a step in (0, 1] and at least 1 iteration")
