"""Weights in 8 bits a value: each row (an output channel) is whole steps of a scale of its own.

In a bundle ``p.<name>`` is then uint8 and ``q.<name>`` has the rows' scales; in memory all is float32 again.
Source: symmetric quantisation per channel, Krishnamoorthi, "Quantizing deep convolutional networks for efficient
inference", arXiv 1806.08342, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import BundleError

__all__ = ["ZERO_POINT", "compacted", "expanded"]

ZERO_POINT = 128
"""What stands for 0."""

_MOST = 127
Tensors = Mapping[str, npt.NDArray[Any]]


def compacted(tensors: Tensors) -> dict[str, npt.NDArray[Any]]:
    """Parameters of two axes or more in 8 bits, everything else as it is.

    Args:
        tensors: float32, finite, by name; parameters are ``p.*``.
    """
    kept: dict[str, npt.NDArray[Any]] = {}
    for name, array in tensors.items():
        if not name.startswith("p.") or array.ndim < 2:
            kept[name] = array
            continue
        rows = np.abs(array).reshape(len(array), -1).max(axis=1)
        scale = np.where(rows > 0, rows / np.float32(_MOST), np.float32(1.0)).astype(np.float32)
        steps = np.rint(array / _along(scale, array)).clip(-_MOST, _MOST)
        kept[name] = (steps + ZERO_POINT).astype(np.uint8)
        kept[f"q.{name[2:]}"] = scale
    return kept


def expanded(tensors: Tensors) -> dict[str, npt.NDArray[Any]]:
    """What ``compacted`` keeps, as float32; the same on every machine.

    Raises:
        BundleError: scales that are not positive, or that belong to no parameter in 8 bits, or the other way round.
    """
    found: dict[str, npt.NDArray[Any]] = {}
    scales = {name[2:]: array for name, array in tensors.items() if name.startswith("q.")}
    for name, array in tensors.items():
        if name.startswith("q."):
            continue
        if array.dtype != np.uint8 or not name.startswith("p."):
            found[name] = array
            continue
        scale = scales.pop(name[2:], None)
        if scale is None or scale.dtype != np.float32 or scale.shape != array.shape[:1] or array.ndim < 2:
            raise BundleError(f"initial tensor {name!r} is in 8 bits and has no scale for each row: export it again")
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise BundleError(f"the scales of initial tensor {name!r} are no positive numbers: export it again")
        found[name] = (array.astype(np.float32) - np.float32(ZERO_POINT)) * _along(scale, array)
    if scales:
        raise BundleError(f"scales of {sorted(scales)[0]!r} belong to no parameter in 8 bits: export it again")
    return found


def _along(scale: npt.NDArray[np.float32], array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return scale.reshape(-1, *[1] * (array.ndim - 1))
