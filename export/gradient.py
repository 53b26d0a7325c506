"""A torch function with gradients inside -> a plain inference graph: opset 18, only ``ai.onnx`` operators.

The function may call ``torch.func.vjp``. It is traced with every extent fixed but the batch's, `export.decompositions`
says how its backward operators are written, and torch's ONNX exporter writes the rest. What comes out runs in a stock
onnxruntime, which has no training operators.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx.numpy_helper
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from export.decompositions import DECOMPOSITIONS, TRANSLATIONS
from export.errors import ExportError

__all__ = ["BATCH_AXIS", "OPSET", "TRACE_BATCH", "GraphInput", "check_layers", "export_function"]

OPSET = 18
BATCH_AXIS = "N"
TRACE_BATCH = 3  # odd and above one: no extent of a real layer is mistaken for it, and nothing broadcasts by accident

_LARGEST_BATCH = 1 << 16

_LAYERS: tuple[type[nn.Module], ...] = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.Conv1d,
    nn.Conv2d,
    nn.ELU,
    nn.Flatten,
    nn.GELU,
    nn.GroupNorm,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LayerNorm,
    nn.LeakyReLU,
    nn.Linear,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
)


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


def check_layers(module: nn.Module) -> None:
    """Refuse a network with a layer whose gradient graph would be wrong or is not known to be right.

    Layers of classes outside ``torch.nn`` are let through: tracing refuses them if it must.

    Raises:
        ExportError: names the layer and says why.
    """
    for name, layer in module.named_modules():
        if not type(layer).__module__.startswith("torch.nn.") or isinstance(layer, nn.Sequential):
            continue
        reason = _refusal(layer)
        if reason is not None:
            kind = type(layer).__name__
            raise ExportError(f"layer {name or 'front'!r} ({kind}) cannot be exported: {reason}")


def _refusal(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        if layer.p == 0:
            return None
        return "a random mask cannot be drawn twice alike on the device; place it behind the cut"
    if not isinstance(layer, _LAYERS):
        kinds = ", ".join(kind.__name__ for kind in _LAYERS)
        return f"place it behind the cut, or use one of {kinds}"
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        if layer.padding_mode != "zeros":
            return f"padding_mode={layer.padding_mode!r}; only 'zeros' is supported"
        if isinstance(layer.padding, str):
            return f"padding={layer.padding!r}; give the padding as numbers"
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        if layer.momentum is None:
            return "momentum=None (a cumulative average); give a momentum such as 0.1"
        if not layer.track_running_stats:
            return "track_running_stats=False; inference needs running statistics"
    if isinstance(layer, nn.MaxPool1d | nn.MaxPool2d):
        return _pool_refusal(layer)
    if isinstance(layer, nn.AvgPool1d | nn.AvgPool2d):
        if layer.ceil_mode:
            return "ceil_mode=True; pad the input instead"
        if not layer.count_include_pad:
            return "count_include_pad=False; only True is supported"
        if getattr(layer, "divisor_override", None) is not None:
            return "divisor_override; leave it None"
    return None


def _pool_refusal(layer: nn.MaxPool1d | nn.MaxPool2d) -> str | None:
    def pair(value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, tuple | list) else (value, value)

    if layer.ceil_mode or layer.return_indices or set(pair(layer.dilation)) != {1}:
        return "ceil_mode, return_indices and dilation are not supported; leave them at their defaults"
    stride = layer.stride if layer.stride is not None else layer.kernel_size
    if any(s < k for s, k in zip(pair(stride), pair(layer.kernel_size), strict=True)):
        return "overlapping windows; give a stride of at least the kernel's size"
    return None


def export_function(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[GraphInput], outputs: Sequence[str]
) -> bytes:
    """Write a torch function as ONNX.

    Args:
        function: takes the inputs' tensors in order, returns one tensor per name in ``outputs``; may use
            ``torch.func.vjp``, must not depend on the values of its tensors for its control flow.
        inputs: names, examples and kinds of the arguments.
        outputs: names of the results.

    Returns:
        A serialised ONNX model: opset 18, ``ai.onnx`` operators only, first axis of batched tensors named ``N``, no
        metadata. The same function and inputs give the same bytes.

    Raises:
        ExportError: something in the function has no such form; the message names the operator.
    """
    batch = torch.export.Dim(BATCH_AXIS, min=1, max=_LARGEST_BATCH)
    examples = tuple(entry.example for entry in inputs)
    try:
        graph = _trace(function, inputs)
        with _quiet():
            exported = torch.export.export(
                graph,
                examples,
                dynamic_shapes=tuple({0: batch} if entry.batched else None for entry in inputs),
                strict=False,
            )
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                input_names=[entry.name for entry in inputs],
                output_names=list(outputs),
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    except ExportError:
        raise
    except Exception as exc:
        raise ExportError(f"the network cannot be written as ONNX: {_innermost(exc)}") from exc
    if program is None:
        raise ExportError("the network cannot be written as ONNX: torch.onnx.export gave nothing")
    return _finish(program.model_proto, inputs)


def _trace(function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[GraphInput]) -> GraphModule:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for entry in inputs:
        sizes = [DimDynamic.STATIC] * entry.example.dim()
        if entry.batched:
            sizes[0] = DimDynamic.DUCK
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        fakes.append(mode.from_tensor(entry.example, symbolic_context=context))
    with mode:
        tracer = make_fx(
            torch.func.functionalize(function), decomposition_table=DECOMPOSITIONS, tracing_mode="real"
        )
        graph: GraphModule = tracer(*fakes)
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's progress lines, warnings about its own internals and registry notes off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _innermost(exc: BaseException) -> str:
    while exc.__cause__ is not None:
        exc = exc.__cause__
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return f"{type(exc).__name__}: {lines[0] if lines else 'no message'}"


def _finish(model: onnx.ModelProto, inputs: Sequence[GraphInput]) -> bytes:
    graph = model.graph
    baked = {entry.name: entry.example for entry in inputs if entry.baked}
    kept = [value for value in graph.input if value.name not in baked]
    del graph.input[:]
    graph.input.extend(kept)
    for name, tensor in baked.items():
        graph.initializer.append(onnx.numpy_helper.from_array(tensor.detach().cpu().numpy(), name))
    used = {name for node in graph.node for name in node.input}
    initialisers = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(initialisers)
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in graph.node if node.domain not in ("", "ai.onnx")})
    if foreign or model.functions:
        raise ExportError(f"the graph needs operators outside ai.onnx: {', '.join(foreign) or 'local functions'}")
    batched = {entry.name for entry in inputs if entry.batched}
    symbols = {
        value.type.tensor_type.shape.dim[0].dim_param for value in graph.input if value.name in batched
    }
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = BATCH_AXIS
    for value in graph.output:
        if any(not dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim[1:]):
            raise ExportError(f"output {value.name!r} has an extent that is not fixed at export")
    del graph.value_info[:], model.metadata_props[:], graph.metadata_props[:]
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    graph.name = "psgl"
    model.producer_name, model.producer_version, model.doc_string = "psgl", "", ""
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)
