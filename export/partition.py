"""One graph becomes two: what can be computed before some of its inputs are known, and the rest.

A device waits for its gradient while the server works; the part of the backward pass that does not need the gradient
(the front's forward pass, masks, patches for the weights' gradient) runs in that time.
"""

from __future__ import annotations

import onnx

from export.errors import ExportError

__all__ = ["partition"]

_RESIDUAL = "r."


def partition(model: bytes, late: set[str]) -> tuple[bytes, bytes]:
    """Split a graph at the edge of what depends on its late inputs. Both parts together compute the very same bits.

    Args:
        model: serialised ONNX.
        late: names of inputs that are known last.

    Returns:
        (early, rest). ``early`` gives ``r.*``, what the rest needs of it, and the outputs that need no late input;
        ``rest`` takes ``r.*`` and gives the other outputs.

    Raises:
        ExportError: a value between both parts has no known type.
    """
    whole = onnx.load_from_string(model)
    graph = whole.graph
    unknown = late - {value.name for value in graph.input}
    if unknown:
        raise ExportError(f"the graph has no inputs {sorted(unknown)} to wait for")
    dependent = set(late)
    early: list[onnx.NodeProto] = []
    rest: list[onnx.NodeProto] = []
    for node in graph.node:
        if dependent & set(node.input):
            rest.append(node)
            dependent |= set(node.output)
        else:
            early.append(node)
    made = {name for node in early for name in node.output}
    wanted = [name for node in rest for name in node.input if name in made]
    residuals = {name: f"{_RESIDUAL}{number}" for number, name in enumerate(dict.fromkeys(wanted))}
    inferred = onnx.shape_inference.infer_shapes(whole, strict_mode=True, data_prop=True)
    types = {value.name: value for value in (*inferred.graph.value_info, *inferred.graph.output)}
    missing = [name for name in residuals if name not in types]
    if missing:
        raise ExportError(f"{len(missing)} values of the gradient have no type that onnx can infer: update onnx")
    between = []
    for name, public in residuals.items():
        value = onnx.ValueInfoProto(name=public)
        # Only the rank and the element type: an inferred extent may be a formula that no reader needs.
        shape = types[name].type.tensor_type.shape
        value.type.tensor_type.elem_type = types[name].type.tensor_type.elem_type
        for _ in shape.dim:
            value.type.tensor_type.shape.dim.add()
        between.append(value)
    outputs_early = [value for value in graph.output if value.name in made]
    outputs_rest = [value for value in graph.output if value.name not in made]
    both = {value.name for value in outputs_early} & residuals.keys()
    if both:
        raise ExportError(f"outputs {sorted(both)} are read by the gradient too: export them once")
    inputs = list(graph.input)
    return (
        _model(whole, early, inputs, [*between, *outputs_early], residuals),
        _model(whole, rest, [*inputs, *between], outputs_rest, residuals),
    )


def _model(
    whole: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    names: dict[str, str],
) -> bytes:
    part = onnx.ModelProto(ir_version=whole.ir_version, producer_name=whole.producer_name)
    part.opset_import.extend(whole.opset_import)
    part.graph.name = whole.graph.name
    for node in nodes:
        copy = part.graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = [names.get(name, name) for name in node.input]
        copy.output[:] = [names.get(name, name) for name in node.output]
    read = {name for node in part.graph.node for name in node.input}
    part.graph.input.extend(value for value in inputs if value.name in read)
    part.graph.output.extend(outputs)
    part.graph.initializer.extend(tensor for tensor in whole.graph.initializer if tensor.name in read)
    onnx.checker.check_model(part)
    serialised: bytes = part.SerializeToString(deterministic=True)
    return serialised
