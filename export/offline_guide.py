"""The guide of a bundle that perturbs nothing: it only decides, on the device, where the server cannot be asked."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import torch
from torch import Tensor, nn
from torch.func import functional_call

from edge_sdk.compact import ZERO_POINT
from export.errors import ExportError
from export.gradient import TRACE_BATCH, export_graphs
from export.model import GraphInput, GraphPlan

__all__ = ["guide_graph"]

_PREFIX = "guide."


def guide_graph(
    guide: nn.Module, input_shape: Sequence[int], compact: Mapping[str, npt.NDArray[Any]] | None = None
) -> bytes:
    """Export a guide as a graph of its own.

    Args:
        guide: x to logits (N, K); it is exported as it is in evaluation mode, its weights baked in.
        input_shape: of one sample, ``(C, H, W)`` or ``(C, T)``.
        compact: its weights as ``edge_sdk.compact.compacted`` says them, which they must be equal to: those in 8 bits
            are built in so, and expanded by ``DequantizeLinear``.

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
    return traced["guide"] if compact is None else _in_8_bits(traced["guide"], compact)


def _logits(guide: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    return {"logits": functional_call(guide, weights, (tensors["x"],))}


def _in_8_bits(graph: bytes, compact: Mapping[str, npt.NDArray[Any]]) -> bytes:
    model = onnx.load_from_string(graph)
    kept = {tensor.name: tensor for tensor in model.graph.initializer}
    expansions = []
    for name, steps in compact.items():
        weight = _PREFIX + name.removeprefix("p.")
        if steps.dtype != np.uint8 or weight not in kept:
            continue
        scale = compact[f"q.{name.removeprefix('p.')}"]
        parts = {"steps": steps, "scale": scale, "zero": np.full(scale.shape, ZERO_POINT, np.uint8)}
        del kept[weight]
        for part, array in parts.items():
            kept[f"{weight}.{part}"] = onnx.numpy_helper.from_array(array, f"{weight}.{part}")
        given = [f"{weight}.{part}" for part in parts]
        expansions.append(onnx.helper.make_node("DequantizeLinear", given, [weight], axis=0))
    nodes = [*expansions, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept.values())
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString(deterministic=True))
