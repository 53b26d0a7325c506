"""The graphs of a front: inference, and a training step in three parts (which a frozen front does not have).

All weights and statistics of the front travel as inputs (``p.*``, ``b.*``), the optimizer's state as ``s.*``;
the guide is baked in. ``next.*`` outputs are the inputs of the following step; ``f.*`` and ``r.*`` are what the parts
of one step hand on, of use to each other alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from export.errors import ExportError
from export.gradient import TRACE_BATCH, export_graphs
from export.layers import check_guide, check_layers
from export.model import GraphInput, GraphPlan
from export.optimizer import Optimizer, initial_state, step
from export.partition import before_inputs, for_outputs
from export.rewrite import cheap_gradient, cheap_guide, folded, from_blocks, guide_on_blocks
from server_sdk.reference.guide import Guide
from server_sdk.reference.perturbation import Perturbation, front_input, perturb, space_to_depth

__all__ = ["GraphSet", "Optimizer", "StepGraphs", "build_graphs"]


@dataclass(frozen=True)
class StepGraphs:
    """A training step in three parts.

    Attributes:
        train: as ``infer``, with BatchNorm in training mode, and with ``next.b.*`` and ``f.*``, ``r.*`` as outputs.
        prepare: what of the backward pass needs no gradient: ``f.*`` to ``r.*``.
        backward: ``r.*`` ``gradient`` ``rate ()`` ``p.*`` ``s.*`` to ``next.p.*`` and ``next.s.*``.
    """

    train: bytes
    prepare: bytes
    backward: bytes


@dataclass(frozen=True)
class GraphSet:
    """Graphs and what they start from.

    Attributes:
        infer: ONNX bytes. ``x (N, C, *S)`` [``label (N,)`` int64, ``epsilon ()``] ``p.*`` ``b.*`` to ``activations``
            [``perturbed``, ``map``, ``guide (N, K)``]; BatchNorm in evaluation mode. With noise, ``noise (N, *cut)`` is
            an input too, and is added to the activations.
        tensors: initial ``p.*``, ``b.*`` and, where there is a step, ``s.*`` in the graphs' order, float32.
        step: the graphs of a training step, or None of a frozen front.
        guide: of a guide that only decides (``offline_guide``), or None.
    """

    infer: bytes
    tensors: dict[str, npt.NDArray[np.float32]]
    step: StepGraphs | None = None
    guide: bytes | None = None

    @property
    def by_name(self) -> dict[str, bytes]:
        """Every graph by its name in a bundle."""
        aside = {} if self.guide is None else {"guide": self.guide}
        return {"infer": self.infer} | ({} if self.step is None else vars(self.step)) | aside


def build_graphs(
    front: nn.Module,
    guide: nn.Module | None,
    *,
    input_shape: Sequence[int],
    perturbation: Perturbation | None,
    downsample: int,
    optimizer: Optimizer,
    noise: bool = False,
    frozen: bool = False,
) -> GraphSet:
    """Export a front with its perturbation, its gradient and its optimizer.

    Args:
        front: the layers on the device; its weights and statistics become the initial tensors. It is not
            changed.
        guide: the classifier that steers the perturbation; needed with ``perturbation``, ignored without.
        input_shape: of one sample, ``(C, H, W)`` or ``(C, T)``.
        perturbation: None for a profile without it.
        downsample: 1 leaves the grid, 2 moves blocks of two along each spatial axis into channels.
        noise: the graphs take noise and add it to the activations.
        frozen: export the inference alone; any layer that torch can trace will do.

    Raises:
        ExportError: a layer without a known gradient graph (named), a front or guide that does not take the
            input, a missing guide, nothing to train.
    """
    if perturbation is not None and guide is None:
        raise ExportError("a perturbation needs a guide: fit one with server_sdk.reference.guide.fit_guide")
    if downsample not in (1, 2):
        raise ExportError(f"downsample is {downsample}: use 1 or 2")
    check_layers(front, frozen=frozen)
    if not frozen and not any(True for _ in front.parameters()):
        raise ExportError("the front has no weights to train: place the cut behind a layer that has some")
    if guide is not None and perturbation is not None:
        check_guide(guide)
    builder = _Builder(front, guide, tuple(input_shape), perturbation, downsample, None if frozen else optimizer, noise)
    graphs = export_graphs(builder, builder.inputs(), builder.plans())
    tensors = {name: tensor.numpy().copy() for name, tensor in builder.carried().items()}
    if frozen:
        return GraphSet(graphs["infer"], tensors)
    late = {"gradient", "rate", *(f"s.{name}" for name in builder.state)}
    early, graphs["backward"] = before_inputs(graphs.pop("step"), late, "r.")
    graphs["train"], graphs["prepare"] = for_outputs(early, builder.awaited(), "f.")
    return GraphSet(graphs["infer"], tensors, StepGraphs(graphs["train"], graphs["prepare"], graphs["backward"]))


class _Builder:
    """The names, tensors and functions that the graphs of one front are made of."""

    def __init__(
        self,
        front: nn.Module,
        guide: nn.Module | None,
        shape: tuple[int, ...],
        perturbation: Perturbation | None,
        downsample: int,
        optimizer: Optimizer | None,
        noise: bool,
    ) -> None:
        self.shape = shape
        self.noise = noise
        self.perturbation = perturbation
        self.downsample = downsample
        self.optimizer = optimizer
        self.front = _bare_copy(front)
        self.pulled = None if optimizer is None else cheap_gradient(self.front)
        self.settled = folded(self.front)
        guide = None if guide is None or perturbation is None else _bare_copy(guide).eval()
        self.on_blocks = type(guide) is Guide
        if type(guide) is Guide:
            guide = guide_on_blocks(guide)
        self.guide = None if guide is None else cheap_guide(guide)
        self.parameters = {name: p.detach() for name, p in self.front.named_parameters()}
        self.statistics = {name: b.detach() for name, b in self.front.named_buffers()}
        self.state = {} if optimizer is None else initial_state(optimizer, self.parameters)
        self.guide_weights = {} if self.guide is None else _detached(self.guide.state_dict())

    def carried(self) -> dict[str, Tensor]:
        """What travels from step to step: ``p.*``, ``b.*``, ``s.*`` in the graphs' order."""
        groups = (("p", self.parameters), ("b", self.statistics), ("s", self.state))
        return {f"{kind}.{name}": tensor for kind, group in groups for name, tensor in group.items()}

    def inputs(self) -> list[GraphInput]:
        example = torch.rand(TRACE_BATCH, *self.shape, generator=torch.Generator().manual_seed(0))
        entries = [GraphInput("x", example, batched=True)]
        if self.guide is not None:
            entries.append(GraphInput("label", torch.full((TRACE_BATCH,), -1), batched=True))
            entries.append(GraphInput("epsilon", torch.tensor(0.1)))
        if self.noise:
            entries.append(GraphInput("noise", self._activations_like(example), batched=True))
        if self.optimizer is not None:
            entries.append(GraphInput("gradient", self._activations_like(example), batched=True))
            entries.append(GraphInput("rate", torch.tensor(0.1)))
        weights = [GraphInput(name, tensor) for name, tensor in self.carried().items()]
        baked = [GraphInput(f"guide.{name}", t, baked=True) for name, t in self.guide_weights.items()]
        return [*entries, *weights, *baked]

    def plans(self) -> dict[str, GraphPlan]:
        entry = ["x", *(["label", "epsilon"] if self.guide is not None else []), *(["noise"] if self.noise else [])]
        infer = [*entry, *(name for name in self.carried() if not name.startswith("s."))]
        step = [*entry, "gradient", "rate", *self.carried()]

        def plan(kind: str, inputs: list[str], further: Sequence[str]) -> GraphPlan:
            outputs = {"activations": f"{kind}.activations"} | {name: name for name in (*self._shown(), *further)}
            return GraphPlan({name: name for name in inputs}, outputs)

        plans = {"infer": plan("infer", infer, ())}
        if self.optimizer is not None:
            plans["step"] = plan("train", step, [f"next.{name}" for name in self.carried()])
        return plans

    def awaited(self) -> set[str]:
        """What the first part of a step gives."""
        statistics = (f"next.{name}" for name in self.carried() if name.startswith("b."))
        return {"activations", *self._shown(), *statistics}

    def _shown(self) -> list[str]:
        return ["perturbed", "map", "guide"] if self.guide is not None else []

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen, shown = self._seen(tensors)
        parameters, statistics = _group(tensors, "p."), _group(tensors, "b.")
        settled = functional_call(self.settled, parameters | statistics, (seen,))
        if self.noise:
            settled = settled + tensors["noise"]
        if self.optimizer is None or self.pulled is None:
            return {"infer.activations": settled, **shown}
        pulled = self.pulled

        def forward(weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            updated = {name: tensor.clone() for name, tensor in statistics.items()}
            return functional_call(pulled, {**weights, **updated}, (seen,)), updated

        trained, pull, updated = vjp(forward, parameters, has_aux=True)  # type: ignore[misc]
        (gradients,) = pull(tensors["gradient"])
        if self.noise:
            trained = trained + tensors["noise"]
        stepped, state = step(self.optimizer, parameters, gradients, _group(tensors, "s."), tensors["rate"])
        groups = (("p", stepped), ("b", updated), ("s", state))
        after = {f"next.{kind}.{name}": tensor for kind, group in groups for name, tensor in group.items()}
        return {"train.activations": trained, "infer.activations": settled, **shown, **after}

    def _seen(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """What the front sees of ``x``, and what the perturbation shows of itself."""
        if self.guide is None or self.perturbation is None:
            return front_input(tensors["x"], None, self.downsample), {}
        guide = functools.partial(functional_call, self.guide, _group(tensors, "guide."))
        x, how = tensors["x"], self.perturbation.normalisation
        given = space_to_depth(x) if self.on_blocks else x
        result = perturb(guide, given, tensors["label"], normalisation=how, epsilon=tensors["epsilon"])
        perturbed, scaled, downsample = result.perturbed, result.map, self.downsample
        if self.on_blocks:
            scaled = from_blocks(result.map)
            perturbed = (x + scaled).clamp(0.0, 1.0)
        shown = {"perturbed": perturbed, "map": scaled, "guide": result.guide}
        if self.on_blocks and downsample == 2:
            # the front wants the very blocks that the map was made on
            perturbed, scaled, downsample = result.perturbed, result.map, 1
        return front_input(perturbed, scaled if self.perturbation.map_channel else None, downsample), shown

    def _activations_like(self, example: Tensor) -> Tensor:
        scaled = example if self.perturbation is not None and self.perturbation.map_channel else None
        try:
            with torch.no_grad():
                activations = self.settled(front_input(example, scaled, self.downsample))
        except RuntimeError as exc:
            problem = str(exc).splitlines()[0]
            raise ExportError(f"the front does not take the input {tuple(self.shape)}: {problem}") from exc
        return torch.zeros_like(activations)


def _group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _bare_copy(front: nn.Module) -> nn.Module:
    """A float32 copy in training mode that overwrites nothing and counts no batches: no graph needs the count."""
    bare = copy.deepcopy(front).float().cpu().train()
    for layer in bare.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.num_batches_tracked = None
        if getattr(layer, "inplace", False):
            setattr(layer, "inplace", False)  # noqa: B010 - torch types any attribute as tensor or module
    return bare
