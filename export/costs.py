"""What a manifest says of graphs: what each takes, gives and costs, read off the ONNX file and runs of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnxruntime as ort

from edge_sdk.interface import BATCH_AXIS, DTYPES, INNER, Cost, Extent, Interface, TensorType
from edge_sdk.vectors import LAST, pack_vectors, record, replay
from edge_sdk.verification import runner
from export.errors import ExportError
from export.vectors import steady_replay

__all__ = ["Facts", "cost_of", "facts_of", "interface_of"]

_NAMES: dict[int, str] = {onnx.helper.np_dtype_to_tensor_dtype(np.dtype(name)): name for name in DTYPES}
_BATCHED = ("x", "label", "noise", "gradient")
_Shapes = Mapping[str, tuple[tuple[int, ...], int]]


@dataclass(frozen=True)
class Facts:
    """What a bundle says of its graphs.

    Attributes:
        interfaces, costs: by the graph's name.
        given: of the parity vectors, what the graphs are given, by the input's name.
        parity: the file of the parity vectors.
    """

    interfaces: dict[str, Interface]
    costs: dict[str, Cost]
    given: dict[str, npt.NDArray[Any]]
    parity: bytes


def facts_of(graphs: Mapping[str, bytes], initial: Mapping[str, npt.NDArray[Any]], epsilon: float) -> Facts:
    """Describe graphs, count their costs and record their parity vectors; a function of the arguments alone.

    Args:
        graphs: ONNX bytes by name.
        initial: the front's tensors.
        epsilon: budget of the perturbation, where there is one.

    Raises:
        ExportError, BundleError: graphs that onnxruntime does not run, or that a manifest cannot describe.
    """
    interfaces = {name: interface_of(graph) for name, graph in graphs.items()}
    given, done = steady_replay(graphs, interfaces, initial, epsilon)
    one = {name: array[:1] if name in _BATCHED else array for name, array in given.items()}
    known = {**initial, **one}
    costs = {}
    for name, outputs in replay(tuple(graphs), runner(graphs, interfaces), initial, one).items():
        costs[name] = cost_of(graphs[name], known)
        known |= outputs if name not in LAST else {}
    return Facts(interfaces, costs, given, pack_vectors(record(given, done)))


def interface_of(graph: bytes) -> Interface:
    """Inputs, outputs and opset of an ONNX file.

    Raises:
        ExportError: a tensor that a manifest cannot describe.
    """
    model = onnx.load_from_string(graph)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return Interface(opset, _tensors(model.graph.input), _tensors(model.graph.output))


def _tensors(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorType, ...]:
    return tuple(_tensor(value) for value in values)


def _tensor(value: onnx.ValueInfoProto) -> TensorType:
    kind = value.type.tensor_type
    dtype = _NAMES.get(kind.elem_type)
    if dtype is None:
        raise ExportError(f"{value.name!r} is of a type that bundles do not have: use float32 or int64")
    return TensorType(value.name, dtype, tuple(_extent(value.name, dim) for dim in kind.shape.dim))


def _extent(name: str, dim: onnx.TensorShapeProto.Dimension) -> Extent:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return None if name.startswith(INNER) else BATCH_AXIS


def cost_of(graph: bytes, feed: Mapping[str, npt.NDArray[Any]]) -> Cost:
    """Count what one run takes; see `Cost` for the terms.

    Args:
        graph: ONNX bytes.
        feed: every input, for a batch of one sample.

    Raises:
        ExportError: onnxruntime does not run it.
    """
    model = onnx.load_from_string(graph)
    shapes = _shapes(model, feed)
    weights = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    fronts = {value.name for value in model.graph.input if value.name[:2] in ("p.", "b.")}
    floats = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and t.dims}
    built_in = (node for node in model.graph.node if weights.keys() >= {*node.input})
    expanded = {node.output[0]: node for node in built_in if node.op_type == "DequantizeLinear"}
    floats |= {node.input[0] for node in expanded.values()}
    floats -= {node.input[1] for node in expanded.values()}
    parameters = sum(weights[name] for name in floats) + sum(math.prod(shapes[name][0]) for name in fronts)
    states = {value.name for value in model.graph.input if value.name.startswith("s.")}
    lasting = weights.keys() | expanded.keys() | fronts | states
    return Cost(
        macs=sum(_macs(node, shapes) for node in model.graph.node),
        parameters=parameters,
        peak_activation_bytes=_peak(model.graph, shapes, lasting),
    )


def _shapes(model: onnx.ModelProto, feed: Mapping[str, npt.NDArray[Any]]) -> _Shapes:
    """Shape and bytes of every value, by running the model with all of them as outputs."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    there = {value.name for value in whole.graph.output}
    for node in whole.graph.node:
        whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name and name not in there)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
        inputs = {one.name: feed[one.name] for one in session.get_inputs()}
        values = session.run(None, inputs)
    except Exception as exc:  # onnxruntime raises types of its own native module
        raise ExportError(f"the graph cannot be run to count its cost: {' '.join(str(exc).split())[:160]}") from exc
    named = {**inputs, **dict(zip([one.name for one in session.get_outputs()], values, strict=True))}
    found = {name: (np.shape(value), np.asarray(value).nbytes) for name, value in named.items()}
    for tensor in model.graph.initializer:
        found[tensor.name] = tuple(tensor.dims), onnx.numpy_helper.to_array(tensor).nbytes
    return found


def _macs(node: onnx.NodeProto, shapes: _Shapes) -> int:
    if node.op_type == "Conv":
        return math.prod(shapes[node.output[0]][0]) * math.prod(shapes[node.input[1]][0][1:])
    if node.op_type == "ConvTranspose":
        return math.prod(shapes[node.input[0]][0]) * math.prod(shapes[node.input[1]][0][1:])
    if node.op_type == "MatMul":
        return math.prod(shapes[node.output[0]][0]) * shapes[node.input[0]][0][-1]
    if node.op_type == "Gemm":
        across = next((attribute.i for attribute in node.attribute if attribute.name == "transA"), 0)
        return math.prod(shapes[node.output[0]][0]) * shapes[node.input[0]][0][0 if across else 1]
    return 0


def _peak(graph: onnx.GraphProto, shapes: _Shapes, lasting: set[str]) -> int:
    """Largest sum of the values that are needed at the same time, walking the nodes in order."""
    last = {name: at for at, node in enumerate(graph.node) for name in node.input}
    last |= {value.name: len(graph.node) for value in graph.output}
    alive = {value.name for value in graph.input if value.name not in lasting}
    peak = sum(shapes[name][1] for name in alive)
    for at, node in enumerate(graph.node):
        alive |= {name for name in node.output if name} - lasting
        peak = max(peak, sum(shapes[name][1] for name in alive))
        alive = {name for name in alive if last.get(name, -1) > at}
    return peak
