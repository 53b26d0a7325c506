"""The three graphs of a bundle: forward for training, forward for inference, backward with optimizer step.

All weights and statistics of the front travel as inputs (``p.*``, ``b.*``), the optimizer's state as ``s.*``;
the guide is baked in. ``next.*`` outputs are the inputs of the following step.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from export.errors import ExportError
from export.gradient import TRACE_BATCH, GraphInput, check_layers, export_function
from server_sdk.reference.perturbation import Perturbation, Perturbed, front_input, perturb

__all__ = ["GraphSet", "Optimizer", "build_graphs"]


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


@dataclass(frozen=True)
class GraphSet:
    """Graphs and what they start from.

    Attributes:
        train: ONNX bytes. ``x (N, C, *S)`` [``label (N,)`` int64, ``epsilon ()``] ``p.*`` to ``activations``
            [``perturbed``, ``map``, ``guide (N, K)``]; BatchNorm in training mode.
        infer: the same with ``b.*`` as inputs and BatchNorm in evaluation mode.
        backward: ``perturbed`` [``map``] ``gradient`` ``rate ()`` ``p.*`` ``b.*`` ``s.*`` to ``next.*`` of
            the last three.
        tensors: initial ``p.*``, ``b.*``, ``s.*`` in the graphs' order, float32.
    """

    train: bytes
    infer: bytes
    backward: bytes
    tensors: dict[str, npt.NDArray[np.float32]]


def build_graphs(
    front: nn.Module,
    guide: nn.Module | None,
    *,
    input_shape: Sequence[int],
    perturbation: Perturbation | None,
    downsample: int,
    optimizer: Optimizer,
) -> GraphSet:
    """Export a front with its perturbation, its gradient and its optimizer.

    Args:
        front: the layers on the device; its weights and statistics become the initial tensors. It is not
            changed.
        guide: the classifier that steers the perturbation; needed with ``perturbation``, ignored without.
        input_shape: of one sample, ``(C, H, W)`` or ``(C, T)``.
        perturbation: None for a profile without it.
        downsample: 1 leaves the grid, 2 moves blocks of two along each spatial axis into channels.

    Raises:
        ExportError: a layer without a known gradient graph (named), a front or guide that does not take the
        input, a
            missing guide.
    """
    if perturbation is not None and guide is None:
        raise ExportError("a perturbation needs a guide: fit one with server_sdk.reference.guide.fit_guide")
    if downsample not in (1, 2):
        raise ExportError(f"downsample is {downsample}: use 1 or 2")
    check_layers(front)
    builder = _Builder(front, guide, tuple(input_shape), perturbation, downsample, optimizer)
    return GraphSet(
        train=builder.forward(training=True),
        infer=builder.forward(training=False),
        backward=builder.backward(),
        tensors={
            f"{prefix}.{name}": tensor.numpy().copy()
            for prefix, group in (("p", builder.parameters), ("b", builder.statistics), ("s", builder.state))
            for name, tensor in group.items()
        },
    )


class _Builder:
    def __init__(
        self,
        front: nn.Module,
        guide: nn.Module | None,
        shape: tuple[int, ...],
        perturbation: Perturbation | None,
        downsample: int,
        optimizer: Optimizer,
    ) -> None:
        self.shape = shape
        self.perturbation = perturbation
        self.downsample = downsample
        self.optimizer = optimizer
        self.front = _bare_copy(front)
        self.guide = None if guide is None or perturbation is None else copy.deepcopy(guide).eval()
        self.guide_weights = (
            {}
            if self.guide is None
            else {name: t.detach().clone() for name, t in self.guide.state_dict().items()}
        )
        self.parameters = {name: p.detach().float().cpu() for name, p in self.front.named_parameters()}
        self.statistics = {name: b.detach().float().cpu() for name, b in self.front.named_buffers()}
        self.state = initial_state(optimizer, self.parameters)
        self.example = torch.rand(TRACE_BATCH, *shape, generator=torch.Generator().manual_seed(0))

    def forward(self, *, training: bool) -> bytes:
        front = _without_statistics(self.front) if training else copy.deepcopy(self.front).eval()
        own = {**self.parameters} if training else {**self.parameters, **self.statistics}
        inputs = [GraphInput("x", self.example, batched=True)]
        outputs = ["activations"]
        baked: dict[str, Tensor] = {}
        if self.guide is not None:
            inputs += [
                GraphInput("label", torch.full((TRACE_BATCH,), -1), batched=True),
                GraphInput("epsilon", torch.tensor(0.1)),
            ]
            outputs += ["perturbed", "map", "guide"]
            baked = {f"guide.{name}": tensor for name, tensor in self.guide_weights.items()}
        lead = len(inputs)
        inputs += [GraphInput(name, tensor) for name, tensor in self._prefixed(own).items()]
        inputs += [GraphInput(name, tensor, baked=True) for name, tensor in baked.items()]

        def function(*flat: Tensor) -> tuple[Tensor, ...]:
            weights = dict(zip(own, flat[lead:], strict=False))
            if self.guide is None:
                return (functional_call(front, weights, (front_input(flat[0], None, self.downsample),)),)
            frozen = dict(zip(self.guide_weights, flat[lead + len(own) :], strict=True))
            result = self._perturb(flat[0], flat[1], flat[2], frozen)
            sees = front_input(result.perturbed, result.map, self.downsample)
            activations = functional_call(front, weights, (sees,))
            return activations, result.perturbed, result.map, result.guide

        return export_function(function, inputs, outputs)

    def backward(self) -> bytes:
        front = copy.deepcopy(self.front).train()
        mapped = self.guide is not None
        with torch.no_grad():
            sees = front_input(self.example, self.example if mapped else None, self.downsample)
            gradient = torch.zeros_like(copy.deepcopy(front)(sees))
        inputs = [GraphInput("perturbed", self.example, batched=True)]
        if mapped:
            inputs.append(GraphInput("map", self.example.clone(), batched=True))
        inputs += [GraphInput("gradient", gradient, batched=True), GraphInput("rate", torch.tensor(0.1))]
        lead = len(inputs)
        carried = [f"p.{name}" for name in self.parameters]
        carried += [f"b.{name}" for name in self.statistics] + [f"s.{name}" for name in self.state]
        tensors = [*self.parameters.values(), *self.statistics.values(), *self.state.values()]
        inputs += [GraphInput(name, tensor) for name, tensor in zip(carried, tensors, strict=True)]
        first, second = len(self.parameters), len(self.parameters) + len(self.statistics)

        def function(*flat: Tensor) -> tuple[Tensor, ...]:
            rest = flat[lead:]
            parameters = dict(zip(self.parameters, rest[:first], strict=True))
            statistics = dict(zip(self.statistics, rest[first:second], strict=True))
            state = dict(zip(self.state, rest[second:], strict=True))
            sees = front_input(flat[0], flat[1] if mapped else None, self.downsample)

            def forward(weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
                updated = {name: tensor.clone() for name, tensor in statistics.items()}
                return functional_call(front, {**weights, **updated}, (sees,)), updated

            _, pull, updated = vjp(forward, parameters, has_aux=True)  # type: ignore[misc]
            (gradients,) = pull(flat[lead - 2])
            stepped, state = step(self.optimizer, parameters, gradients, state, flat[lead - 1])
            return (*stepped.values(), *updated.values(), *state.values())

        return export_function(function, inputs, [f"next.{name}" for name in carried])

    def _perturb(self, x: Tensor, label: Tensor, epsilon: Tensor, frozen: dict[str, Tensor]) -> Perturbed:
        guide, perturbation = self.guide, self.perturbation
        if guide is None or perturbation is None:
            raise ExportError("a perturbation needs a guide")

        def logits(batch: Tensor) -> Tensor:
            result: Tensor = functional_call(guide, frozen, (batch,))
            return result

        return perturb(logits, x, label, normalisation=perturbation.normalisation, epsilon=epsilon)

    def _prefixed(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{'p' if name in self.parameters else 'b'}.{name}": tensor for name, tensor in own.items()}


def _bare_copy(front: nn.Module) -> nn.Module:
    """A copy in training mode whose BatchNorm layers count no batches: no graph needs the count."""
    bare = copy.deepcopy(front).float().cpu().train()
    for layer in bare.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.num_batches_tracked = None
    return bare


def _without_statistics(front: nn.Module) -> nn.Module:
    bare = copy.deepcopy(front).train()
    for layer in bare.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean, layer.running_var = None, None
    return bare


def initial_state(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros: ``<name>.momentum`` for sgd with momentum, ``<name>.m``, ``<name>.v`` and ``t`` for adam."""
    if optimizer.kind == "sgd":
        if not optimizer.momentum:
            return {}
        return {f"{name}.momentum": torch.zeros_like(tensor) for name, tensor in parameters.items()}
    state = {
        f"{name}.{moment}": torch.zeros_like(tensor)
        for name, tensor in parameters.items()
        for moment in ("m", "v")
    }
    state["t"] = torch.zeros(())
    return state


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
    for name, value in parameters.items():
        gradient = gradients[name]
        mean = state[f"{name}.m"] + (gradient - state[f"{name}.m"]) * (1.0 - first)
        square = second * state[f"{name}.v"] + (1.0 - second) * (gradient * gradient)
        kept[f"{name}.m"], kept[f"{name}.v"] = mean, square
        after[name] = value - (rate / correction1) * mean / (square.sqrt() / correction2 + optimizer.epsilon)
    kept["t"] = count
    return after, kept
