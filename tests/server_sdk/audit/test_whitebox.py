"""The search on fronts whose answer is known, on the bundle's own front, and against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edge_sdk.batch import Samples
from edge_sdk.front import FrontState
from server_sdk.audit.attacks import Knowledge, WhiteBox
from server_sdk.audit.metrics import likeness
from server_sdk.audit.twin import Twin
from server_sdk.audit.victim import Victim
from server_sdk.errors import ModelError, ServerError


class Linear:
    """Activations are ``matrix @ x``."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = torch.from_numpy(matrix.astype(np.float32))

    def send(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.T


@pytest.fixture
def images(samples: Callable[[int, int], Samples]) -> Callable[[int, int], np.ndarray]:
    return lambda count, seed: samples(count, seed).x.astype(np.float32) / 255


def attacked(front: Any, own: np.ndarray, x: np.ndarray, search: WhiteBox) -> np.ndarray:
    seen_own, seen = (front.send(torch.from_numpy(part)).numpy() for part in (own, x))
    return search.rebuild(Knowledge(own, seen_own, front), seen, seed=0)


def test_an_invertible_front_is_inverted(images: Callable[[int, int], np.ndarray]) -> None:
    matrix = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0]
    made = attacked(Linear(matrix), images(60, 1), images(9, 2), WhiteBox(300, variation=0.0))
    assert likeness(made, images(9, 2)).nmse < 0.01


def test_a_constant_front_is_not_inverted(images: Callable[[int, int], np.ndarray]) -> None:
    made = attacked(Linear(np.zeros((4, 64))), images(60, 1), images(9, 2), WhiteBox(50))
    assert likeness(made, images(9, 2)).nmse > 0.95


def test_without_a_twin_there_is_no_search() -> None:
    with pytest.raises(ServerError, match="twin"):
        WhiteBox().rebuild(
            Knowledge(np.zeros((2, 1, 4, 4), np.float32), np.zeros((2, 3), np.float32)),
            np.zeros((1, 3), np.float32),
            seed=0,
        )


@pytest.mark.parametrize("profile", ["vanilla", "paper"])
def test_the_twin_computes_what_the_device_computes(
    profile: str, built: dict[str, Any], images: Callable[[int, int], np.ndarray]
) -> None:
    bundle = built[profile].bundle
    front = FrontState(0, dict(bundle.initial))
    victim = Victim(bundle, front, codec="float32")
    twin, x = Twin(victim, front), images(20, 3)
    with torch.inference_mode():
        assert np.allclose(twin.send(torch.from_numpy(x)).numpy(), victim.send(x), atol=1e-4)
    given = torch.from_numpy(x[:2]).requires_grad_()
    torch.autograd.backward(twin.send(given).square().sum())
    assert given.grad is not None and float(given.grad.abs().sum()) > 0


def test_the_undefended_front_is_inverted(built: dict[str, Any], images: Callable[[int, int], np.ndarray]) -> None:
    bundle = built["vanilla"].bundle
    front = FrontState(0, dict(bundle.initial))
    victim = Victim(bundle, front, codec="float16")
    own, x = images(60, 1), images(12, 2)
    found = WhiteBox(300).rebuild(Knowledge(own, victim.send(own), Twin(victim, front)), victim.send(x), seed=0)
    assert likeness(found, x).nmse < 0.1


def test_a_front_of_another_model_is_refused(built: dict[str, Any]) -> None:
    bundle = built["vanilla"].bundle
    front = FrontState(0, dict(bundle.initial))
    victim = Victim(bundle, front)
    other = {name: value + 0.5 if name.startswith("p.") else value for name, value in front.tensors.items()}
    with pytest.raises(ModelError, match="does not compute"):
        Twin(victim, FrontState(0, other))


def test_there_is_no_search_without_a_gradient() -> None:
    assert WhiteBox().fits((32,), twin=True)
    assert not WhiteBox().fits((32,), twin=False)
