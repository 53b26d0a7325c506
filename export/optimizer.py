"""The optimizer's step as a function without side effects, so that it can become part of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from export.errors import ExportError

__all__ = ["Optimizer", "initial_state", "step"]


@dataclass(frozen=True)
class Optimizer:
    """The rule by which a device steps its front, as ``torch.optim.SGD`` or ``torch.optim.Adam`` compute it.

    Attributes:
        kind: ``sgd`` or ``adam``.
        learning_rate: the default of the graph's ``rate`` input; above 0.
        momentum: of ``sgd``, 0 to below 1; 0 keeps no state.
        betas: of ``adam``, each 0 to below 1.
        epsilon: of ``adam``, above 0.
    """

    kind: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        if self.kind not in ("sgd", "adam"):
            raise ExportError(f"unknown optimizer {self.kind!r}: use 'sgd' or 'adam'")
        if not self.learning_rate > 0:
            raise ExportError(f"learning_rate {self.learning_rate} must be above 0")
        if not 0 <= self.momentum < 1:
            raise ExportError(f"momentum {self.momentum} is outside 0..1")
        if self.kind == "adam" and self.momentum:
            raise ExportError("momentum is an option of 'sgd': give 'adam' its betas instead")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ExportError(f"betas {self.betas} are outside 0..1")
        if not self.epsilon > 0:
            raise ExportError(f"epsilon {self.epsilon} must be above 0")


def initial_state(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros: ``<name>.momentum`` for sgd with momentum; for adam ``m``, ``v`` of all parameters in a row, and ``t``."""
    if optimizer.kind == "sgd":
        if not optimizer.momentum:
            return {}
        return {f"{name}.momentum": torch.zeros_like(tensor) for name, tensor in parameters.items()}
    row = torch.zeros_like(_in_a_row(parameters))
    return {"m": row, "v": row.clone(), "t": torch.zeros(())}


def _in_a_row(tensors: Mapping[str, Tensor]) -> Tensor:
    """All values of all tensors as one vector: a dozen operators for a step of adam instead of a dozen for each."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def step(
    optimizer: Optimizer,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    rate: Tensor,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One optimizer step without side effects: (next parameters, next state)."""
    after: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    if optimizer.kind == "sgd":
        for name, value in parameters.items():
            change = gradients[name]
            if optimizer.momentum:
                change = optimizer.momentum * state[f"{name}.momentum"] + change
                kept[f"{name}.momentum"] = change
            after[name] = value - rate * change
        return after, kept
    first, second = optimizer.betas
    count = state["t"] + 1.0
    # 1 - 0.999**t loses five digits in float32 while t is small
    correction1 = (1.0 - torch.pow(first, count.double())).float()
    correction2 = (1.0 - torch.pow(second, count.double())).sqrt().float()
    gradient = _in_a_row({name: gradients[name] for name in parameters})
    mean = state["m"] + (gradient - state["m"]) * (1.0 - first)
    square = second * state["v"] + (1.0 - second) * (gradient * gradient)
    # torch's rule with both sides multiplied by correction2: the ONNX optimizer takes "+ 1e-8" for "+ 0" and drops it,
    # and a parameter whose gradient was always 0 (a channel that is dead or dark) would become 0 / 0.
    change = (rate / correction1 * correction2) * mean / (square.sqrt() + optimizer.epsilon * correction2)
    stepped = torch.split(_in_a_row(parameters) - change, [value.numel() for value in parameters.values()])
    for (name, value), row in zip(parameters.items(), stepped, strict=True):
        after[name] = row.reshape(value.shape)
    return after, {"m": mean, "v": square, "t": count}
