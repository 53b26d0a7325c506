"""The guide of a bundle that perturbs nothing: it only decides, on the device, where the server cannot be asked."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from export.errors import ExportError
from export.gradient import TRACE_BATCH, export_graphs
from export.model import GraphInput, GraphPlan

__all__ = ["guide_graph"]

_PREFIX = "guide."


def guide_graph(guide: nn.Module, input_shape: Sequence[int]) -> bytes:
    """Export a guide as a graph of its own.

    Args:
        guide: x to logits (N, K); it is exported as it is in evaluation mode, its weights baked in.
        input_shape: of one sample, ``(C, H, W)`` or ``(C, T)``.

    Returns:
        ONNX bytes: ``x (N, *input_shape)`` to ``guide (N, K)``, float32.

    Raises:
        ExportError: a guide that does not take the input, or that cannot be written as ONNX.
    """
    training = guide.training
    try:
        weights = {f"{_PREFIX}{name}": tensor.detach().clone() for name, tensor in guide.eval().state_dict().items()}
        example = torch.rand(TRACE_BATCH, *input_shape, generator=torch.Generator().manual_seed(0))
        entries = [GraphInput("x", example, batched=True)]
        entries += [GraphInput(name, tensor, baked=True) for name, tensor in weights.items()]
        with torch.no_grad():
            guide(example)
        traced = export_graphs(
            functools.partial(_logits, guide), entries, {"guide": GraphPlan({"x": "x"}, {"guide": "logits"})}
        )
    except RuntimeError as exc:
        problem = str(exc).splitlines()[0]
        raise ExportError(f"the guide does not take the input {tuple(input_shape)}: {problem}") from exc
    finally:
        guide.train(training)
    return traced["guide"]


def _logits(guide: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    return {"logits": functional_call(guide, weights, (tensors["x"],))}
