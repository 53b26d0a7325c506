from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server_sdk.errors import ServerError
from server_sdk.recovery import recover, remove, shrinkage_projector

METHODS = ("gram", "svd", "iterate")


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference(activations: Tensor, threshold: float) -> Tensor:
    """M of every sample, sample by sample, from a float64 SVD."""
    traces = []
    for sample in activations.double():
        u, sigma, v = torch.linalg.svd(sample.flatten(1), full_matrices=False)
        traces.append((u * (sigma - threshold * sigma[0]).clamp_min(0)) @ v)
    return torch.stack(traces).reshape(activations.shape)


def proximal(activations: Tensor, threshold: float, step: float, iterations: int) -> Tensor:
    """The paper's iteration from zero, on one matrix after another, as it is written."""
    traces = []
    for sample in activations.double():
        matrix = sample.flatten(1)
        shrinkage = threshold * torch.linalg.matrix_norm(matrix, 2)
        trace = torch.zeros_like(matrix)
        for _ in range(iterations):
            u, sigma, v = torch.linalg.svd(trace - step * (trace - matrix), full_matrices=False)
            trace = (u * (sigma - step * shrinkage).clamp_min(0)) @ v
        traces.append(trace)
    return torch.stack(traces).reshape(activations.shape)


shapes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.lists(st.integers(1, 6), min_size=1, max_size=2)).map(
    lambda drawn_shape: (drawn_shape[0], drawn_shape[1], *drawn_shape[2])
)


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    threshold=st.floats(0.0, 1.0),
    seed=st.integers(0, 10_000),
    method=st.sampled_from(["gram", "svd"]),
)
def test_closed_form_is_the_clipped_svd(shape: tuple[int, ...], threshold: float, seed: int, method: str) -> None:
    activations = drawn(*shape, seed=seed)
    found = recover(activations, threshold=threshold, method=method)
    expected = reference(activations, threshold)
    # The square root in sigma = sqrt(eigenvalue) leaves half of the digits to what is near zero.
    tolerance = 1e-6 if threshold < 1e-4 else 1e-8
    torch.testing.assert_close(found.trace, expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(found.recovered, activations - expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("threshold", [0.0, 1e-6, 1e-3, 0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_float32_stays_close_to_float64(threshold: float, method: str) -> None:
    activations = drawn(6, 32, 14, 14, dtype=torch.float32).relu()
    found = recover(activations, threshold=threshold, method=method, step=1.0)
    scale = torch.linalg.matrix_norm(activations.flatten(2), 2).max().item()
    assert found.trace.dtype == torch.float32
    error = (found.trace - reference(activations, threshold)).abs().max().item()
    assert error < 1e-6 * scale


@pytest.mark.parametrize("threshold", [1e-5, 1e-3, 0.01, 0.04])
def test_float32_resolves_small_singular_values(threshold: float) -> None:
    u, _ = torch.linalg.qr(drawn(16, 16))
    v, _ = torch.linalg.qr(drawn(40, 16, seed=1))
    sigma = torch.logspace(0, -6, 16, dtype=torch.float64)
    activations = ((u * sigma) @ v.mT).float().reshape(1, 16, 8, 5)
    found = recover(activations, threshold=threshold)
    assert (found.trace - reference(activations, threshold)).abs().max().item() < 2e-7


def test_directions_that_rounding_cannot_tell_from_zero_are_treated_alike() -> None:
    weights = torch.zeros(1, 4, 3, 3, dtype=torch.float64)
    weights[0, 0], weights[0, 1] = 2.0, -1.0  # at right angles to the only singular vector, (1, 2, 3, 4)
    pulled = gradient(rank_one().double(), weights, threshold=1e-9)
    torch.testing.assert_close(pulled, weights * pulled[0, 0, 0, 0] / 2.0, atol=1e-5, rtol=0)


def test_singular_values_of_the_recovered_are_clipped() -> None:
    activations = drawn(3, 5, 4, 4)
    sigma = torch.linalg.svdvals(activations.flatten(2))
    clipped = torch.linalg.svdvals(recover(activations, threshold=0.4).recovered.flatten(2))
    torch.testing.assert_close(clipped, torch.minimum(sigma, 0.4 * sigma[:, :1]))
    assert (sigma > 0.4 * sigma[:, :1]).sum() > 3  # more than the largest one is clipped


@settings(max_examples=25, deadline=None)
@given(
    shape=shapes,
    seed=st.integers(0, 10_000),
    step=st.floats(0.05, 1.0),
    iterations=st.integers(1, 12),
)
def test_iteration_is_the_papers_and_a_fraction_of_the_closed_form(
    shape: tuple[int, ...], seed: int, step: float, iterations: int
) -> None:
    activations = drawn(*shape, seed=seed)
    found = recover(activations, threshold=0.2, method="iterate", step=step, iterations=iterations).trace
    torch.testing.assert_close(found, proximal(activations, 0.2, step, iterations), atol=1e-9, rtol=0)
    fraction = 1 - (1 - step) ** iterations
    torch.testing.assert_close(found, fraction * recover(activations, threshold=0.2).trace, atol=1e-6, rtol=0)


@pytest.mark.parametrize("step", [0.2, 0.55, 0.9])
def test_step_does_not_move_the_fixed_point(step: float) -> None:
    activations = drawn(2, 4, 5, 3)
    found = recover(activations, method="iterate", step=step, iterations=150)
    torch.testing.assert_close(found.trace, recover(activations).trace, atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("last", [False, True])
def test_a_sample_does_not_see_its_batch_mates(method: str, last: bool) -> None:
    activations = drawn(5, 8, 6, 6, dtype=torch.float32)
    activations[1] *= 1e35  # and one that takes the path for values near overflow
    activations[2] = 0.0
    activations[3] *= 1e-30
    if last:
        activations = activations.contiguous(memory_format=torch.channels_last)
    together = recover(activations, method=method)
    for index in range(5):
        alone = recover(activations[index : index + 1], method=method)
        scale = activations[index].abs().max().item()
        torch.testing.assert_close(together.recovered[index], alone.recovered[0], atol=2e-6 * scale, rtol=0)


@pytest.mark.parametrize("shape", [(3, 8, 6, 6), (3, 8, 2, 2), (3, 8, 5), (2, 1, 4, 4), (2, 4, 1, 1)])
def test_memory_format_is_kept_and_changes_nothing(shape: tuple[int, ...]) -> None:
    plain = drawn(*shape)
    if plain.dim() == 4:
        other = plain.contiguous(memory_format=torch.channels_last)
    else:
        other = plain.mT.contiguous().mT
    found = recover(other)
    torch.testing.assert_close(found.recovered, recover(plain).recovered, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.trace, recover(plain).trace, atol=1e-12, rtol=0)
    if min(shape) > 1:
        assert found.recovered.stride() == other.stride()


def gradient(activations: Tensor, weights: Tensor, method: str = "gram", threshold: float = 0.1) -> Tensor:
    leaf = activations.clone().requires_grad_()
    (pulled,) = torch.autograd.grad((recover(leaf, method=method, threshold=threshold).recovered * weights).sum(), leaf)
    return pulled


@pytest.mark.parametrize("shape", [(2, 3, 2, 4), (2, 6, 2, 2), (2, 5, 3)])
def test_gradient_is_that_of_the_detached_linear_map(shape: tuple[int, ...]) -> None:
    activations = drawn(*shape)
    matrix = activations.flatten(2)
    left = matrix.shape[1] <= matrix.shape[2]
    side = matrix if left else matrix.mT
    u, sigma, _ = torch.linalg.svd(side, full_matrices=False)
    kept = torch.minimum(torch.ones(()), 0.1 * sigma[:, :1] / sigma)  # of each singular value
    linear = (u * kept.unsqueeze(1)) @ u.mT
    weights = drawn(*shape, seed=1)
    expected = linear @ weights.flatten(2) if left else weights.flatten(2) @ linear
    for method in ("gram", "svd"):
        pulled = gradient(activations, weights, method)
        torch.testing.assert_close(pulled.flatten(2), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("shape", [(2, 3, 2, 4), (2, 6, 2, 2), (2, 5, 3)])
@pytest.mark.parametrize("last", [False, True])
def test_linear_map_passes_gradcheck(shape: tuple[int, ...], last: bool) -> None:
    activations = drawn(*shape)
    if last and activations.dim() == 4:
        activations = activations.contiguous(memory_format=torch.channels_last)
    matrix = activations.flatten(2)
    projector = shrinkage_projector(matrix if matrix.shape[1] <= matrix.shape[2] else matrix.mT, 0.3)
    assert torch.autograd.gradcheck(lambda a: remove(projector, a), (activations.requires_grad_(),))


def repeated() -> Tensor:
    return torch.eye(4, dtype=torch.float32).reshape(1, 4, 2, 2)


def rank_one() -> Tensor:
    return torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 10.0)).reshape(1, 4, 3, 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "activations",
    [
        torch.zeros(2, 3, 4, 4),
        torch.zeros(2, 9, 2, 2),
        rank_one(),
        repeated(),
        torch.ones(1, 6, 2),
        torch.full((1, 3, 2, 2), 1e-45),
        drawn(2, 4, 3, 3, dtype=torch.float32) * 1e-38,
        drawn(2, 16, 6, 6, dtype=torch.float32).sign() * 3e38,
        torch.cat([repeated() * 1e36, repeated() * 0.0, repeated() * 1e-36]),
    ],
    ids=["zero", "zero-tall", "rank-one", "repeated", "constant", "subnormal", "tiny", "huge", "mixed"],
)
def test_degenerate_samples_give_finite_values_and_gradients(activations: Tensor, method: str) -> None:
    found = recover(activations, method=method)
    assert torch.isfinite(found.recovered).all()
    assert torch.isfinite(found.trace).all()
    assert torch.isfinite(gradient(activations, torch.ones_like(activations), method)).all()


def test_sums_that_pass_through_overflow_come_out_finite() -> None:
    subspace, _ = torch.linalg.qr(drawn(64, 32))
    activations = subspace @ drawn(32, 195, seed=1)
    activations = torch.cat([activations / activations.abs().max(), torch.zeros(64, 1)], dim=1)
    linear = torch.eye(64) - shrinkage_projector(activations[None], 0.1)[0]
    # The first half of this row's sum is beyond float32, the second half takes it back.
    activations[:, -1] = linear[0].sign() * torch.tensor([1.0] * 32 + [-1.0] * 32)
    large = (activations * 3e38).float()[None]
    expected = large.double() - reference(large, 0.1)
    assert torch.isfinite(expected.float()).all()
    torch.testing.assert_close(recover(large).recovered.double(), expected, atol=1e33, rtol=0)


def test_known_values_of_degenerate_samples() -> None:
    zero = recover(torch.zeros(1, 3, 2, 2))
    assert not zero.trace.any()
    assert not zero.recovered.any()
    ones = torch.ones(1, 3, 2, 2)
    torch.testing.assert_close(gradient(0 * ones, ones), ones)  # P = 0: all of it passes
    torch.testing.assert_close(recover(rank_one()).trace, 0.9 * rank_one())
    torch.testing.assert_close(recover(repeated()).recovered, 0.1 * repeated())
    torch.testing.assert_close(recover(1e36 * repeated()).recovered, 1e35 * repeated())
    torch.testing.assert_close(recover(rank_one(), threshold=1.0).recovered, rank_one(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recover(rank_one(), threshold=0.0).trace, rank_one(), rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=12, max_size=12),
    threshold=st.floats(0.0, 1.0),
)
def test_finite_input_never_gives_nan(values: list[float], threshold: float) -> None:
    activations = torch.tensor(values, dtype=torch.float32).reshape(1, 3, 2, 2)
    found = recover(activations, threshold=threshold)
    assert not torch.isnan(found.recovered).any()
    assert not torch.isnan(found.trace).any()


def test_empty_batch_and_single_sample() -> None:
    empty = recover(torch.zeros(0, 3, 2, 2))
    assert empty.recovered.shape == empty.trace.shape == (0, 3, 2, 2)
    assert recover(torch.ones(1, 1, 1)).recovered.item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("activations", "options", "remedy"),
    [
        (torch.ones(3, 4), {}, "give \\(N, C, \\*S\\)"),
        (torch.ones(3, 4, 0), {}, "give \\(N, C, \\*S\\)"),
        (torch.ones(1, 2, 2, dtype=torch.int64), {}, "convert them to torch.float32"),
        (torch.ones(1, 2, 2, dtype=torch.float16), {}, "convert them to torch.float32"),
        (torch.full((1, 2, 2), math.nan), {}, "NaN or infinity"),
        (torch.full((1, 2, 2), math.inf), {}, "NaN or infinity"),
        (torch.ones(1, 2, 2), {"threshold": 1.5}, "between 0 and 1"),
        (torch.ones(1, 2, 2), {"threshold": math.nan}, "between 0 and 1"),
        (torch.ones(1, 2, 2), {"method": "qr"}, "gram, svd, iterate"),
        (torch.ones(1, 2, 2), {"step": 0.0}, "step in"),
        (torch.ones(1, 2, 2), {"iterations": 0}, "at least 1 iteration"),
    ],
)
def test_refusals_name_the_remedy(activations: Tensor, options: dict[str, object], remedy: str) -> None:
    with pytest.raises(ServerError, match=remedy):
        recover(activations, **options)  # type: ignore[arg-type]
