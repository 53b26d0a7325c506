"""A torch function with gradients inside -> a plain inference graph: opset 18, only ``ai.onnx`` operators.

The function may call ``torch.func.vjp``. It is traced with every extent fixed but the batch's,
`export.decompositions` says how its backward operators are written, and torch's ONNX exporter writes the
rest. What comes out runs in a stock onnxruntime, which has no training operators.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from export.decompositions import DECOMPOSITIONS, TRANSLATIONS
from export.errors import ExportError
from export.model import BATCH_AXIS, OPSET, GraphInput, GraphPlan, extract

__all__ = ["TRACE_BATCH", "export_graphs"]

TRACE_BATCH = 3  # odd and above one: nothing broadcasts by accident, few extents are taken for it

_LARGEST_BATCH = 1 << 16


def export_graphs(
    function: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    inputs: Sequence[GraphInput],
    graphs: Mapping[str, GraphPlan],
) -> dict[str, bytes]:
    """Trace a torch function once and write one ONNX model for each plan.

    Args:
        function: takes the inputs' tensors by name, returns tensors by name; may use ``torch.func.vjp``, must
            not let its control flow depend on values of tensors.
        inputs: every argument that any of the graphs needs; names are unique.
        graphs: which inputs and outputs each graph has; a graph holds only the nodes that its outputs need.

    Returns:
        For each plan a serialised ONNX model: opset 18, ``ai.onnx`` operators only, first axis of batched
        tensors named ``N``, no metadata. The same function and inputs give the same bytes.

    Raises:
        ExportError: something in the function has no such form; the message names the operator.
    """
    outputs: list[str] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = function(dict(zip((entry.name for entry in inputs), tensors, strict=True)))
        outputs[:] = results
        return tuple(results.values())

    batch = torch.export.Dim(BATCH_AXIS, min=1, max=_LARGEST_BATCH)
    try:
        with _quiet():
            graph = _trace(flat, inputs)
            exported = torch.export.export(
                graph,
                tuple(entry.example for entry in inputs),
                dynamic_shapes=tuple({0: batch} if entry.batched else None for entry in inputs),
                strict=False,
            )
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                input_names=[entry.name for entry in inputs],
                output_names=outputs,
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    except ExportError:
        raise
    except Exception as exc:
        refusal = _refused(exc)
        raise refusal or ExportError(f"the network cannot be written as ONNX: {_innermost(exc)}") from exc
    if program is None:
        raise ExportError("the network cannot be written as ONNX: torch.onnx.export gave nothing")
    return {name: extract(program.model_proto, inputs, plan) for name, plan in graphs.items()}


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
        tracer = make_fx(function, decomposition_table=DECOMPOSITIONS, tracing_mode="real")
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


def _refused(exc: BaseException) -> ExportError | None:
    """Our own refusal, raised inside a translation, from under torch's wrappers."""
    cause: BaseException | None = exc
    while cause is not None and not isinstance(cause, ExportError):
        cause = cause.__cause__
    return cause


def _innermost(exc: BaseException) -> str:
    while exc.__cause__ is not None:
        exc = exc.__cause__
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return f"{type(exc).__name__}: {lines[0] if lines else 'no message'}"
