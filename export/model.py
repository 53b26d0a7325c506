"""One finished model out of torch's: the wanted part of the graph, public names, constants, no metadata."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx.numpy_helper
from torch import Tensor

from export.errors import ExportError

__all__ = ["BATCH_AXIS", "OPSET", "GraphInput", "GraphPlan", "extract"]

OPSET = 18
BATCH_AXIS = "N"


@dataclass(frozen=True)
class GraphInput:
    """One argument of a function that becomes a graph.

    Attributes:
        name: name of the graph's input.
        example: a tensor of the input's type and shape; with ``batched`` its first extent is ``TRACE_BATCH``.
        batched: the first axis is the batch, any size at run time.
        baked: the example's values become part of the graph, which then has no such input.
    """

    name: str
    example: Tensor
    batched: bool = False
    baked: bool = False


@dataclass(frozen=True)
class GraphPlan:
    """One graph out of a trace.

    Attributes:
        inputs: public name to traced name, in the graph's order.
        outputs: the same for results.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


def extract(traced: onnx.ModelProto, inputs: Sequence[GraphInput], plan: GraphPlan) -> bytes:
    """Cut one graph out of a traced model.

    Returns:
        The serialised model: opset 18, no metadata, first axis of batched tensors named ``N``.

    Raises:
        ExportError: an operator outside ``ai.onnx``, an input that is needed but not planned, or an output
        whose extents
            behind the batch are not fixed.
    """
    source = traced.graph
    nodes, used = _needed(source, plan.outputs.values())
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in nodes if node.domain not in ("", "ai.onnx")})
    if foreign or traced.functions:
        raise ExportError(f"the graph needs operators outside ai.onnx: {', '.join(foreign) or 'local functions'}")
    unplanned = sorted(used & {entry.name for entry in inputs if not entry.baked} - set(plan.inputs.values()))
    if unplanned:
        raise ExportError(f"the graph needs inputs that its plan leaves out: {', '.join(unplanned)}")
    public = {inner: outer for outer, inner in (*plan.inputs.items(), *plan.outputs.items())}
    model = onnx.ModelProto(ir_version=traced.ir_version, producer_name="psgl")
    model.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    graph = model.graph
    graph.name = "psgl"
    for node in nodes:
        graph.node.append(_renamed(node, public))
    initialisers = {tensor.name: tensor for tensor in source.initializer}
    for entry in inputs:
        if entry.baked:
            values = entry.example.detach().cpu().numpy()
            initialisers[entry.name] = onnx.numpy_helper.from_array(values, entry.name)
    graph.initializer.extend(tensor for name, tensor in initialisers.items() if name in used)
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    types = {value.name: value for value in (*source.input, *source.output)}
    symbols = {types[entry.name].type.tensor_type.shape.dim[0].dim_param for entry in inputs if entry.batched}
    for names, target in ((plan.inputs, graph.input), (plan.outputs, graph.output)):
        for outer, inner in names.items():
            target.append(_described(types[inner], outer, symbols))
    onnx.checker.check_model(model)
    serialised: bytes = model.SerializeToString(deterministic=True)
    return serialised


def _needed(graph: onnx.GraphProto, outputs: Iterable[str]) -> tuple[list[onnx.NodeProto], set[str]]:
    """Nodes that the outputs depend on, in order, and every value that they read."""
    used = set(outputs)
    nodes = []
    for node in reversed(graph.node):
        if used & set(node.output):
            used |= {name for name in node.input if name}
            nodes.append(node)
    return nodes[::-1], used


def _renamed(node: onnx.NodeProto, public: Mapping[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.doc_string = ""
    del copy.metadata_props[:]
    copy.input[:] = [public.get(name, name) for name in node.input]
    copy.output[:] = [public.get(name, name) for name in node.output]
    return copy


def _described(value: onnx.ValueInfoProto, name: str, symbols: set[str]) -> onnx.ValueInfoProto:
    described = onnx.ValueInfoProto(name=name)
    described.type.CopyFrom(value.type)
    for axis, dim in enumerate(described.type.tensor_type.shape.dim):
        if axis == 0 and dim.dim_param in symbols:
            dim.dim_param = BATCH_AXIS
        elif not dim.HasField("dim_value"):
            raise ExportError(f"{name!r} has an extent on axis {axis} that is not fixed at export")
    return described
