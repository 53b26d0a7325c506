"""The bundle's file, part by part, for devices that follow what the server announces.

Nothing is kept of a device but its rate: each part is a function of the question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from server_sdk.rates import RateLimits, Rates

__all__ = ["MOST_PART_BYTES", "BundleParts", "Part", "Unavailable"]

MOST_PART_BYTES = 1 << 20
"""Of one part, however much a device asks for."""

_RATES = RateLimits(messages_per_s=512.0, bytes_per_s=32e6)  # a question of some bytes brings a thousand times as many


@dataclass(frozen=True)
class Part:
    """What a device asked for.

    Attributes:
        fields: ``bundle``, ``first``, ``total`` of the ``part`` message.
        data: uint8 (n), n from 1 to ``MOST_PART_BYTES``.
    """

    fields: Mapping[str, Any]
    data: npt.NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True)
class Unavailable:
    """Why there is no such part.

    Attributes:
        reason: short code, see docs/wire.md, section 13.
        detail: one sentence for the device's operator.
    """

    reason: str
    detail: str


class BundleParts:
    """Answers ``fetch``.

    Args:
        bundle: id of the server's bundle.
        data: the bytes of its file, or None where the server hands none out.
        rates: how many parts, and how many of their bytes, a device may ask for.
    """

    def __init__(self, bundle: str, data: bytes | None, rates: Rates | None = None) -> None:
        self._bundle = bundle
        self._data = None if data is None else np.frombuffer(data, np.uint8)
        self._rates = rates or Rates(_RATES)

    def find(self, device: str, fields: Mapping[str, Any]) -> Part | Unavailable | None:
        """The part that the ``fields`` of a ``fetch`` name; None while the device asks for more than its rate."""
        first, most = int(fields["first"]), min(int(fields["most"]), MOST_PART_BYTES)
        if self._data is None:
            return Unavailable("bundle", "this server hands out no bundle: copy it to the device")
        if fields["bundle"] != self._bundle:
            return Unavailable("bundle", f"this server has bundle {self._bundle}: wait for its announcement")
        if first >= len(self._data) or most < 1:
            return Unavailable("range", f"the bundle has {len(self._data)} bytes: ask for at least 1 of them")
        data = self._data[first : first + most]
        if not self._rates.allow(device, len(data)):
            return None
        return Part({"bundle": self._bundle, "first": first, "total": len(self._data)}, data)
