"""One graph becomes several that run one after the other, each as soon as its inputs are there.

A training step is traced as a whole. ``train`` must end early, for its activations are awaited; what of the backward
pass needs no gradient (masks, patches for the weights' gradient) can run while the server works; the rest waits for
the gradient, and so do mere views. Nothing is computed twice, and the parts compute the very bits of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from export.errors import ExportError

__all__ = ["before_inputs", "for_outputs"]

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice")
Parts = tuple[bytes, bytes]


def before_inputs(model: bytes, late: set[str], prefix: str) -> Parts:
    """Split off what can be computed before the late inputs are known.

    Args:
        model: serialised ONNX.
        late: names of inputs.
        prefix: the values that the second part takes from the first are called ``<prefix>0``, ``<prefix>1``, ...;
            those that were outputs of the model keep their names.

    Returns:
        (everything that depends on no late input, the rest).

    Raises:
        ExportError: an unknown input, or a value between both parts whose type is not known.
    """
    whole = onnx.load_from_string(model)
    _require(late, (value.name for value in whole.graph.input), "inputs")
    dependent = set(late)
    first = set()
    for node in whole.graph.node:
        if dependent & set(node.input):
            dependent |= set(node.output)
        else:
            first.add(node.name)
    needed = {value.name for value in whole.graph.output}
    for node in reversed(whole.graph.node):
        # A view is made where it is used: handing one on would mean a copy of what it looks at.
        if node.op_type in _VIEWS and not needed & set(node.output):
            first.discard(node.name)
        if node.name in first:
            needed |= set(node.input)
    return _cut(whole, first, prefix)


def for_outputs(model: bytes, outputs: set[str], prefix: str) -> Parts:
    """Split off what some outputs need.

    Args:
        model: serialised ONNX.
        outputs: names of outputs that are awaited first.
        prefix: as in ``before_inputs``.

    Returns:
        (what the outputs need, the rest).

    Raises:
        ExportError: an unknown output, or a value between both parts whose type is not known.
    """
    whole = onnx.load_from_string(model)
    _require(outputs, (value.name for value in whole.graph.output), "outputs")
    used = set(outputs)
    first = []
    for node in reversed(whole.graph.node):
        if used & set(node.output):
            used |= set(node.input)
            first.append(node.name)
    return _cut(whole, set(first), prefix)


def _require(names: set[str], present: Iterable[str], kind: str) -> None:
    unknown = sorted(names - set(present))
    if unknown:
        raise ExportError(f"the graph has no {kind} {unknown} to be split at")


def _cut(whole: onnx.ModelProto, first: set[str], prefix: str) -> Parts:
    graph = whole.graph
    if len({node.name for node in graph.node}) != len(graph.node):
        raise ExportError("nodes of the graph share a name: update onnxscript")
    head = [node for node in graph.node if node.name in first]
    tail = [node for node in graph.node if node.name not in first]
    made = {name for node in head for name in node.output}
    public = {value.name for value in graph.output}
    crossing = [name for name in dict.fromkeys(name for node in tail for name in node.input) if name in made]
    names = {name: f"{prefix}{number}" for number, name in enumerate(n for n in crossing if n not in public)}
    inferred = onnx.shape_inference.infer_shapes(whole, strict_mode=True, data_prop=True)
    types = {value.name: value for value in (*inferred.graph.value_info, *graph.output)}
    unknown = [name for name in crossing if name not in types]
    if unknown:
        raise ExportError(f"{len(unknown)} values of the gradient have no type that onnx can infer: update onnx")
    hidden = [_between(types[name], names[name]) for name in crossing if name in names]
    passed = [types[name] for name in crossing if name in public]
    inputs = [*graph.input, *passed, *hidden]
    head_outputs = [value for value in graph.output if value.name in made]
    tail_outputs = [value for value in graph.output if value.name not in made]
    return _model(whole, head, inputs, [*head_outputs, *hidden], names), _model(
        whole, tail, inputs, tail_outputs, names
    )


def _between(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    """Rank and element type alone: an inferred extent may be a formula that no reader needs."""
    between = onnx.ValueInfoProto(name=name)
    between.type.tensor_type.elem_type = value.type.tensor_type.elem_type
    between.type.tensor_type.shape.SetInParent()
    for _ in value.type.tensor_type.shape.dim:
        between.type.tensor_type.shape.dim.add()
    return between


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
    own = {name for node in part.graph.node for name in node.output}
    part.graph.input.extend(value for value in inputs if value.name in read and value.name not in own)
    part.graph.output.extend(outputs)
    part.graph.initializer.extend(tensor for tensor in whole.graph.initializer if tensor.name in read)
    onnx.checker.check_model(part)
    serialised: bytes = part.SerializeToString(deterministic=True)
    return serialised
