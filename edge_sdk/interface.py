"""What a bundle's manifest says of each graph: inputs, outputs, opset, costs; and whether a graph is as it says.

A graph is data too: an ONNX file can name other files to read its weights from, or operators of a library that somebody
would have to load. So the file itself is looked through (protobuf, ``onnx.proto3``) before onnxruntime sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_sdk.errors import BundleError

__all__ = [
    "BATCH_AXIS",
    "DTYPES",
    "INNER",
    "OPSETS",
    "Cost",
    "Extent",
    "Interface",
    "TensorType",
    "check_file",
    "check_session",
    "parse_cost",
    "parse_interface",
]

BATCH_AXIS = "N"
"""Stands for the number of samples in a shape."""

DTYPES = {"float32": "tensor(float)", "float64": "tensor(double)"} | {
    name: f"tensor({name})" for name in ("float16", "int8", "int32", "int64", "uint8", "bool")
}
"""Element types by their name in a manifest, and what onnxruntime calls them."""

INNER = ("f.", "r.")
"""Prefixes of what the parts of a training step hand on to each other; only their rank is fixed."""

OPSETS = range(13, 100)
"""Versions of the operator set that a manifest may name."""

Extent = int | str | None
_MAX_TENSORS = 4096
_MAX_DIMS = 8
_MAX_NUMBER = 1 << 62
_MAX_NESTING = 8


@dataclass(frozen=True)
class TensorType:
    """One input or output of a graph.

    Attributes:
        name: of the input or output.
        dtype: a name of ``DTYPES``.
        shape: extents; ``"N"`` is the number of samples, None one that is known only at run time.
    """

    name: str
    dtype: str
    shape: tuple[Extent, ...]


@dataclass(frozen=True)
class Interface:
    """What goes into a graph and comes out.

    Attributes:
        opset: version of ``ai.onnx`` that the graph is written in.
        inputs, outputs: in the graph's order.
    """

    opset: int
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]


@dataclass(frozen=True)
class Cost:
    """What one run of a graph on one sample takes, counted at export.

    Attributes:
        macs: multiplications with addition of convolutions and matrix products.
        parameters: weights that the graph reads: inputs ``p.*`` and ``b.*``, and what is built in.
        peak_activation_bytes: largest sum of the values between input and output that are needed at the same
            time, in the graph's order; weights and optimizer state not counted. What a runtime adds is its own.
    """

    macs: int
    parameters: int
    peak_activation_bytes: int


def parse_interface(value: object) -> Interface:
    """Read one graph's entry of a manifest.

    Raises:
        ValueError: it is none; the text says what of it.
    """
    entry = _entry(value, {"opset", "inputs", "outputs"})
    opset = entry["opset"]
    if type(opset) is not int or opset not in OPSETS:
        raise ValueError(f"opset {opset!r} is not one of {OPSETS.start} to {OPSETS.stop - 1}")
    return Interface(opset, _tensors(entry["inputs"]), _tensors(entry["outputs"]))


def parse_cost(value: object) -> Cost:
    """Read one graph's entry of the cost table.

    Raises:
        ValueError: it is none; the text says what of it.
    """
    entry = _entry(value, {"macs", "parameters", "peak_activation_bytes"})
    for name, number in entry.items():
        if type(number) is not int or not 0 <= number < _MAX_NUMBER:
            raise ValueError(f"{name} {number!r} is not a number of something")
    return Cost(**entry)


def check_file(name: str, graph: bytes, interface: Interface) -> None:
    """Check that an ONNX file reads no other file, has operators of ``ai.onnx`` alone, and the opset that is stated.

    Raises:
        BundleError: it does not.
    """
    try:
        opsets, foreign = _imports(graph)
        outside = _reads_outside(graph)
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"the bundle's {name!r} graph is not an ONNX file: export the bundle again") from exc
    if outside:
        raise BundleError(f"the bundle's {name!r} graph wants to read another file: do not use it")
    if foreign:
        raise BundleError(f"the bundle's {name!r} graph has operators of its own: do not use it, or export it again")
    if opsets != [interface.opset]:
        raise BundleError(
            f"the bundle's {name!r} graph is of another opset than {interface.opset}, which its manifest says: "
            "export the bundle again"
        )


def check_session(name: str, inputs: Sequence[Any], outputs: Sequence[Any], interface: Interface) -> None:
    """Check what onnxruntime found in a graph against the manifest.

    Args:
        inputs, outputs: of ``InferenceSession.get_inputs`` and ``get_outputs``.

    Raises:
        BundleError: a name, type or shape differs.
    """
    for kind, found, stated in (("input", inputs, interface.inputs), ("output", outputs, interface.outputs)):
        there = {one.name: one for one in found}
        if there.keys() != {tensor.name for tensor in stated}:
            raise BundleError(f"the bundle's {name!r} graph has other {kind}s than its manifest says: export it again")
        for tensor in stated:
            one = there[tensor.name]
            same = len(one.shape) == len(tensor.shape) and (
                tensor.name.startswith(INNER) or tuple(one.shape) == tensor.shape
            )
            if not same or one.type != DTYPES[tensor.dtype]:
                raise BundleError(
                    f"the bundle's {name!r} graph has an {kind} {tensor.name!r} of another type or shape than its "
                    "manifest says: export it again"
                )


def _entry(value: object, keys: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != keys:
        raise ValueError(f"{value!r:.100} does not have exactly {', '.join(sorted(keys))}")
    return value


def _tensors(value: object) -> tuple[TensorType, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_TENSORS:
        raise ValueError(f"{value!r:.100} is not a list of tensors")
    tensors = tuple(_tensor(each) for each in value)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("two tensors have one name")
    return tensors


def _tensor(value: object) -> TensorType:
    entry = _entry(value, {"name", "dtype", "shape"})
    name, dtype, shape = entry["name"], entry["dtype"], entry["shape"]
    if not isinstance(name, str) or not 1 <= len(name) <= 256:
        raise ValueError(f"{name!r:.100} is not a tensor's name")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r:.100} of {name!r:.100} is none of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
        raise ValueError(f"{shape!r:.100} of {name!r:.100} is not a shape")
    for axis, extent in enumerate(shape):
        fixed = type(extent) is int and 1 <= extent <= 1 << 30
        free = extent is None and name.startswith(INNER)
        if not fixed and not free and not (extent == BATCH_AXIS and axis == 0):
            raise ValueError(f"{extent!r:.100} of {name!r:.100} is not an extent")
    return TensorType(name, dtype, tuple(shape))


# ---------------------------------------------------------------- protobuf

_Fields = Iterator[tuple[int, int | bytes]]
_EXTERNAL_DATA = 13  # of a TensorProto: without it there is no file to read


def _fields(message: bytes) -> _Fields:
    """Number and value of each field of a protobuf message: an integer, or the bytes of what has a length."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        if tag >> 32:
            raise ValueError("a field has a number that ONNX does not have")
        kind = tag & 7
        value: int | bytes
        if kind == 0:
            value, position = _varint(message, position)
        elif kind in (1, 2, 5):
            size = {1: 8, 5: 4}.get(kind, 0)
            if kind == 2:
                size, position = _varint(message, position)
            value, position = message[position : position + size], position + size
        else:
            raise ValueError("a field of a kind that ONNX does not have")
        if position > len(message):
            raise ValueError("a field is longer than what holds it")
        yield tag >> 3, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError("an integer is cut off")
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("an integer has no end")


def _parts(message: bytes, wanted: Mapping[int, Callable[[bytes], bool]]) -> bool:
    return any(wanted[number](_message(part)) for number, part in _fields(message) if number in wanted)


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where ONNX has a message")
    return value


def _imports(model: bytes) -> tuple[list[int], bool]:
    """Versions of ``ai.onnx`` that a ModelProto imports, and whether it has operators beyond it."""
    opsets, foreign = [], False
    for number, value in _fields(model):
        if number == 8 and isinstance(value, bytes):  # opset_import
            entry = dict(_fields(value))
            version = entry.get(2)
            foreign |= entry.get(1, b"") not in (b"", b"ai.onnx")
            opsets.append(version if isinstance(version, int) else 0)
        foreign |= number in (20, 25)  # training_info, functions
    return opsets, foreign


def _reads_outside(model: bytes) -> bool:
    """Whether a weight anywhere in a ModelProto lies in another file."""

    def tensor(message: bytes) -> bool:
        return any(number == _EXTERNAL_DATA for number, _ in _fields(message))

    def sparse(message: bytes) -> bool:
        return _parts(message, {1: tensor, 2: tensor})

    def graph(message: bytes, depth: int) -> bool:
        if depth > _MAX_NESTING:
            raise ValueError("graphs in graphs without end")

        def inner(part: bytes) -> bool:
            return graph(part, depth + 1)

        def attribute(part: bytes) -> bool:
            return _parts(part, {5: tensor, 6: inner, 10: tensor, 11: inner, 22: sparse, 23: sparse})

        def node(part: bytes) -> bool:
            return _parts(part, {5: attribute})

        return _parts(message, {1: node, 5: tensor, 15: sparse})

    return _parts(model, {7: lambda part: graph(part, 0)})
