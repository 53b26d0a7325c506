"""Tensors as RFC 8746 typed arrays: tag 40 [[dims], tag(bytes)], little endian, row major.

``float32`` sends the numbers as they are. ``float16`` halves the bytes: a tensor is divided by a power of two
that puts its largest magnitude into [2^14, 2^15), so nothing overflows and small gradients keep their bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import cbor2
import numpy as np
import numpy.typing as npt

from edge_sdk import cbor
from edge_sdk.errors import ConfigError, WireError
from edge_sdk.limits import DEFAULT_LIMITS, Limits

__all__ = [
    "CODECS",
    "TENSOR_TAGS",
    "compress",
    "expand",
    "from_typed_array",
    "pack_tensors",
    "to_typed_array",
    "unpack_tensors",
]

Array = npt.NDArray[Any]

CODECS = ("float16", "float32")

_MULTI_DIMENSIONAL = 40
_DTYPES: dict[int, np.dtype[np.generic]] = {
    64: np.dtype("u1"),
    78: np.dtype("<i4"),
    79: np.dtype("<i8"),
    84: np.dtype("<f2"),
    85: np.dtype("<f4"),
}
_TAGS = {dtype.newbyteorder("="): tag for tag, dtype in _DTYPES.items()}
_ALLOWED = ", ".join(sorted(dtype.name for dtype in _TAGS))
TENSOR_TAGS = frozenset({_MULTI_DIMENSIONAL, *_DTYPES})

_TOP_EXPONENT = 15  # the largest magnitude lands in [2^14, 2^15); float16 ends at 65504
_LEAST_SCALE = 2.0**-126  # smallest normal float32: dividing by a subnormal fails where they are flushed


def to_typed_array(name: str, array: Array) -> cbor2.CBORTag:
    """Wrap one array for ``cbor.dumps``.

    Args:
        name: what errors call it.
        array: any shape without a zero, dtype float32, float16, int64, int32 or uint8, native byte order.

    Raises:
        WireError: reason ``dtype`` or ``shape``.
    """
    if not isinstance(array, np.ndarray):
        raise WireError("dtype", f"tensor {name!r} is a {type(array).__name__}: pass a numpy array")
    tag = _TAGS.get(array.dtype)
    if tag is None:
        raise WireError("dtype", f"tensor {name!r} is {array.dtype}: cast it to one of {_ALLOWED}")
    if not array.size:
        raise WireError("shape", f"tensor {name!r} of shape {array.shape} is empty")
    data = array.astype(_DTYPES[tag], copy=False).tobytes()  # cbor2 makes a memoryview a list of integers
    return cbor2.CBORTag(_MULTI_DIMENSIONAL, [list(array.shape), cbor2.CBORTag(tag, data)])


def from_typed_array(name: str, value: object, limits: Limits = DEFAULT_LIMITS) -> Array:
    """Read one array; it is read-only and shares memory with the decoded bytes.

    Args:
        name: what errors call it.
        value: what ``cbor.loads`` returned.
        limits: ``max_dims`` and ``max_elements`` are applied.

    Returns:
        Array of the dtype and shape that the bytes declare, native byte order.

    Raises:
        WireError: reasons ``schema``, ``dtype``, ``shape``, ``limit``.
    """
    match value:
        case cbor2.CBORTag(tag=40, value=[(list() | tuple()) as dims, cbor2.CBORTag(tag=tag, value=bytes() as data)]):
            pass
        case _:
            raise WireError("schema", f"tensor {name!r} is not a typed array: tag 40 [[dims], tag(bytes)]")
    dtype = _DTYPES.get(tag)
    if dtype is None:
        raise WireError("dtype", f"tensor {name!r} has element tag {tag}: use one of {sorted(_DTYPES)}")
    if len(dims) > limits.max_dims:
        raise WireError("limit", f"tensor {name!r} has {len(dims)} dimensions, above max_dims={limits.max_dims}")
    elements = 1
    for dim in dims:
        if type(dim) is not int or dim < 1:
            raise WireError("shape", f"tensor {name!r} has a dimension that is no positive integer")
        elements *= dim
        if elements > limits.max_elements:
            raise WireError("limit", f"tensor {name!r} is above max_elements={limits.max_elements}")
    if elements * dtype.itemsize != len(data):
        raise WireError("shape", f"tensor {name!r} declares shape {tuple(dims)} but carries {len(data)} bytes")
    flat = np.frombuffer(data, dtype)
    return flat.astype(dtype.newbyteorder("="), copy=False).reshape(dims)


def compress(array: Array, codec: str) -> tuple[Array, float | None]:
    """Apply a codec to a finite array; only float32 is ever changed.

    Returns:
        The array to send, and for float16 its scale: x = sent * scale. Each element is within
        max(2^-11 * |x|, 2^-39 * max|x|) of what was given, while max|x| >= 2^-112.

    Raises:
        ConfigError: unknown codec.
    """
    if codec not in CODECS:
        raise ConfigError(f"unknown codec {codec!r}: choose one of {', '.join(CODECS)}")
    if codec == "float32" or array.dtype != np.float32 or not array.size:
        return array, None
    largest = max(float(array.max()), -float(array.min()))
    exponent = math.frexp(largest)[1]
    scale = max(math.ldexp(1.0, exponent - _TOP_EXPONENT), _LEAST_SCALE) if largest else 1.0
    return np.asarray(np.divide(array, np.float32(scale)).astype(np.float16)), scale  # numpy unwraps shape ()


def expand(name: str, array: Array, scale: float | None) -> Array:
    """Undo ``compress``: float16 with a scale becomes float32, anything else stays.

    Raises:
        WireError: reason ``schema``: a scale that is no positive finite float32, or float16 without one,
            or another dtype with one.
    """
    if (scale is None) != (array.dtype != np.float16):
        raise WireError("schema", f"tensor {name!r}: float16, and nothing else, comes with a scale")
    if scale is None:
        return array
    if type(scale) is not float:
        raise WireError("schema", f"tensor {name!r}: the scale must be a float")
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses elements that are not finite
        factor = np.float32(scale)
        if not (0.0 < scale < math.inf and float(factor) == scale):
            raise WireError("schema", f"tensor {name!r}: the scale must be a positive finite float32")
        return np.asarray(array.astype(np.float32) * factor)


def pack_tensors(tensors: Mapping[str, Array], limits: Limits = DEFAULT_LIMITS) -> bytes:
    """Encode named arrays as a CBOR map name -> typed array; equal arrays, equal bytes.

    Args:
        tensors: dtypes as ``to_typed_array``; a shape () is kept.
        limits: the result can be read under these.

    Raises:
        WireError: reasons ``dtype``, ``shape``, ``limit``, ``schema``.
    """
    for name, array in tensors.items():
        if not isinstance(name, str):
            raise WireError("schema", f"a tensor's name must be text, not {type(name).__name__}")
        if isinstance(array, np.ndarray) and (array.ndim > limits.max_dims or array.size > limits.max_elements):
            raise WireError("limit", f"tensor {name!r} of shape {array.shape} is above max_dims or max_elements")
    _check_count(len(tensors), limits)
    data = cbor.dumps({name: to_typed_array(name, array) for name, array in tensors.items()})
    _check_bytes(len(data), limits)
    cbor.check(data, limits, TENSOR_TAGS)
    return data


def unpack_tensors(data: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, Array]:
    """Decode what ``pack_tensors`` encoded; the arrays are read-only.

    Raises:
        WireError: the bytes are no such map or go beyond ``limits``.
    """
    _check_bytes(len(data), limits)
    content = cbor.loads(data, limits, TENSOR_TAGS)
    if not isinstance(content, dict):
        raise WireError("schema", "packed tensors must be a CBOR map name -> typed array")
    _check_count(len(content), limits)
    return {name: from_typed_array(name, value, limits) for name, value in content.items()}


def _check_bytes(size: int, limits: Limits) -> None:
    if size > limits.max_message_bytes:
        raise WireError("limit", f"{size} bytes of tensors are above max_message_bytes={limits.max_message_bytes}")


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.max_tensors:
        raise WireError("limit", f"{count} tensors are above max_tensors={limits.max_tensors}")
