"""The front as stock onnxruntime sessions: a pure function of its state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_sdk.batch import Samples, as_batch
from edge_sdk.errors import BatchError, BundleError, ConfigError
from edge_sdk.front import Front, FrontState

Draw = Callable[[int, int], Samples]


def batch(samples: Draw, count: int = 6) -> Any:
    return as_batch(samples(count, 1).x, (1, 8, 8), max_batch=count)


def test_the_perturbation_stays_in_its_budget_and_zero_switches_it_off(built: dict[str, Any], samples: Draw) -> None:
    front = Front(built["paper"].bundle)
    x = batch(samples)
    forward = front.forward(front.initial_state(), x, None, training=False)
    assert forward.map is not None and forward.guide is not None
    assert set(np.unique(forward.map)) <= {np.float32(0), np.float32(0.2)} and forward.map.any()
    assert np.abs(forward.perturbed - x).max() <= 0.2 + 1e-6
    off = front.forward(front.initial_state(), x, None, training=False, epsilon=0.0)
    assert np.array_equal(off.perturbed, x) and off.unperturbed == len(x)


def test_vanilla_sends_the_input_as_it_is(built: dict[str, Any], samples: Draw) -> None:
    front = Front(built["vanilla"].bundle)
    x = batch(samples)
    forward = front.forward(front.initial_state(), x, None, training=True)
    assert forward.perturbed is x and forward.map is None and forward.guide is None and forward.unperturbed == len(x)


@pytest.mark.parametrize("profile", ["vanilla", "paper"])
def test_backward_returns_a_new_state_and_leaves_the_old(profile: str, built: dict[str, Any], samples: Draw) -> None:
    front = Front(built[profile].bundle)
    before = front.initial_state()
    kept = {name: value.copy() for name, value in before.tensors.items()}
    forward = front.forward(before, batch(samples), None, training=True)
    gradient = np.random.default_rng(0).normal(size=forward.activations.shape).astype(np.float32)
    prepared = front.prepare(before, forward)
    after = front.backward(before, prepared, gradient, rate=0.01)
    assert after.version == 1 and set(after.tensors) == set(before.tensors)
    assert all(np.array_equal(before.tensors[name], value) for name, value in kept.items())
    changed = {name for name, value in after.tensors.items() if not np.array_equal(value, kept[name])}
    assert {name for name in kept if name[:2] in ("p.", "b.")} <= changed
    again = front.backward(before, prepared, gradient, rate=0.01)
    assert all(np.array_equal(again.tensors[name], value) for name, value in after.tensors.items())


def test_a_frozen_front_infers_and_nothing_else(built: dict[str, Any], samples: Draw) -> None:
    front = Front(built["hardened"].bundle, noise_key=bytes(32))
    state, x = front.initial_state(), batch(samples)
    forward = front.forward(state, x, None, training=False)
    assert forward.activations.shape == (6, 32)
    bare = front.forward(state, x, None, training=False, noise=0.0).activations
    assert np.abs(bare).max() <= 1 and abs((forward.activations - bare).std() - 1) < 0.15
    for attempt in (
        lambda: front.forward(state, x, None, training=True),
        lambda: front.prepare(state, forward),
        lambda: front.backward(state, forward, forward.activations, rate=0.1),
    ):
        with pytest.raises(ConfigError, match="hand samples over with store"):
            attempt()


def test_laplace_noise_is_the_bundles(built: dict[str, Any], samples: Draw) -> None:
    drawn = {}
    for profile in ("gaussian", "laplace"):
        front = Front(built[profile].bundle, noise_key=bytes(32))
        state, x = front.initial_state(), batch(samples)
        noisy, bare = (front.forward(state, x, None, training=False, noise=s).activations for s in (None, 0.0))
        drawn[profile] = (noisy - bare).ravel()
        assert abs(drawn[profile].std() - 1) < 0.1
    heavy, light = (
        float(np.mean(drawn[kind] ** 4) / np.mean(drawn[kind] ** 2) ** 2) for kind in ("laplace", "gaussian")
    )
    assert heavy > 4.5 and 2.5 < light < 3.5, "kurtosis is 6 and 3"


def test_a_weight_without_a_gradient_stays(built: dict[str, Any], samples: Draw) -> None:
    """Adam divides 0 by its epsilon there, which the graph must not have lost."""
    front = Front(built["paper"].bundle)
    before = front.initial_state()
    forward = front.forward(before, batch(samples), None, training=True, epsilon=0.0)
    after = front.backward(before, front.prepare(before, forward), np.full_like(forward.activations, 0.01), rate=0.01)
    weight, was = after.tensors["p.conv1.weight"], before.tensors["p.conv1.weight"]
    assert np.array_equal(weight[:, -1], was[:, -1]), "the map's channel, dark without a perturbation"
    assert not np.array_equal(weight[:, :-1], was[:, :-1])


def test_an_exploding_step_is_refused(built: dict[str, Any], samples: Draw) -> None:
    front = Front(built["vanilla"].bundle)
    state = front.initial_state()
    forward = front.forward(state, batch(samples), None, training=True)
    with pytest.raises(BatchError, match="learning rate"):
        front.backward(state, front.prepare(state, forward), np.full_like(forward.activations, 1e30), rate=1e38)


def test_onnxruntime_never_leaks(built: dict[str, Any], samples: Draw) -> None:
    bundle = built["vanilla"].bundle
    with pytest.raises(BundleError, match="'train' graph is not an ONNX file"):
        Front(replace(bundle, graphs={**bundle.graphs, "train": b"no graph"}))
    front = Front(bundle)
    with pytest.raises(BatchError, match="refused its input"):
        front.forward(front.initial_state(), np.zeros((1, 2, 8, 8), np.float32), None, training=True)
    lacking = dict(bundle.initial)
    lacking.popitem()
    with pytest.raises(BundleError, match="does not hold"):
        Front(replace(bundle, initial=lacking))


def test_noise_is_added_to_the_activations_and_leaves_the_gradient(built: dict[str, Any], samples: Draw) -> None:
    front = Front(built["gaussian"].bundle, noise_key=bytes(32))
    state, x = front.initial_state(), batch(samples, 40)
    for training in (True, False):
        noisy, again, half, bare = (
            front.forward(state, x, None, training=training, noise=noise).activations for noise in (None, 1.0, 0.5, 0.0)
        )
        assert np.array_equal(noisy, again), "the bundle's noise is 1, and the same again"
        assert np.allclose(half - bare, (noisy - bare) / 2, atol=1e-5)
        assert abs((noisy - bare).std() - 1) < 0.03
    gradient = np.random.default_rng(1).normal(size=noisy.shape).astype(np.float32)
    forwards = [front.forward(state, x, None, training=True, noise=noise) for noise in (None, 0.0)]
    after = [front.backward(state, front.prepare(state, each), gradient, rate=0.1) for each in forwards]
    assert all(np.array_equal(after[0].tensors[name], value) for name, value in after[1].tensors.items())


def test_activations_that_differ_share_no_noise(built: dict[str, Any], samples: Draw) -> None:
    """Else their difference would be free of it: of two runs, of a front before and after a mean."""
    bundle = built["gaussian"].bundle
    front, other = (Front(bundle, noise_key=bytes([one]) * 32) for one in (0, 1))
    state, x = front.initial_state(), batch(samples, 40)
    moved = FrontState(0, {name: value * np.float32(1.0001) for name, value in state.tensors.items()})

    def noise(which: Front, at: FrontState, rows: slice, **how: Any) -> Any:
        sent, bare = (which.forward(at, x[rows], None, noise=sigma, **how).activations for sigma in (None, 0.0))
        return (sent - bare)[:8].ravel()

    first = noise(front, state, slice(40), training=False)
    assert np.allclose(first, noise(front, state, slice(8), training=False), atol=1e-5), "batch-mates do not matter"
    changed = [
        noise(front, moved, slice(40), training=False),
        noise(front, FrontState(1, state.tensors), slice(40), training=False),
        noise(front, state, slice(40), training=False, epsilon=0.1),
        noise(other, state, slice(40), training=False),
        noise(front, state, slice(40), training=True),
        noise(front, state, slice(8), training=True),
    ]
    together = np.corrcoef(np.stack([first, *changed]))
    assert np.abs(together - np.eye(len(together))).max() < 0.1


def test_a_bundle_with_noise_needs_a_key(built: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="noise_key"):
        Front(built["gaussian"].bundle)
