"""What a device may spend of its battery and its tariff: when it connects, how many bytes it sends in an hour."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from edge_sdk.errors import ConfigError
from edge_sdk.state import DEVICE, State

__all__ = ["Allowance", "Budget"]

_HOUR_S = 3600.0
_BURST = 1 / 6
_LEFT, _AT = f"{DEVICE}allowance", f"{DEVICE}allowance-ms"


@dataclass(frozen=True)
class Budget:
    """How much a device may use its radio.

    Attributes:
        connect_every_s: a stream gathers windows for so long, connects, has them decided and disconnects; it connects
            earlier when its backlog is full. None: it stays connected. Training stays connected.
        max_bytes_per_hour: of steps and questions, repeats included, and of the parts of a bundle that is fetched, once
            they have come (what MQTT, TLS and TCP add, and the state messages of some hundred bytes, are not counted).
            In no hour are more sent, but for a message larger than a sixth of it: that waits until a whole sixth may be
            sent, and is paid for afterwards. None: no limit.

    Raises:
        ConfigError: a value that is not positive.
    """

    connect_every_s: float | None = None
    max_bytes_per_hour: int | None = None

    def __post_init__(self) -> None:
        for name in ("connect_every_s", "max_bytes_per_hour"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}: give a positive number, or leave it out")


class Allowance:
    """A token bucket over wall time whose level is a counter of the device's state, so that a restart does not fill it.

    It holds a sixth of an hour's bytes and gains five sixths in an hour. A clock that is set back brings nothing and
    takes nothing; one that is set forward may fill it.

    Args:
        max_bytes_per_hour: see ``Budget``.
        state: keeps the level; what is spent is committed before the bytes leave.
        clock: seconds of wall time.
    """

    def __init__(self, max_bytes_per_hour: int, state: State, clock: Callable[[], float] = time.time) -> None:
        self._capacity = max_bytes_per_hour * _BURST
        self._per_s = max_bytes_per_hour * (1 - _BURST) / _HOUR_S
        self._state = state
        self._clock = clock

    @property
    def left(self) -> float:
        """Bytes that may be sent at once now; negative while a large message is paid for."""
        counters = self._state.counters
        if _LEFT not in counters:
            return self._capacity
        elapsed_s = max(0.0, self._clock() - counters[_AT] / 1000)
        return min(self._capacity, counters[_LEFT] + elapsed_s * self._per_s)

    def wait_s(self, size: int) -> float:
        """Seconds until so many bytes may be sent, 0 for now."""
        lacking = min(float(size), self._capacity) - self.left
        return max(0.0, lacking / self._per_s)

    def spend(self, size: int) -> None:
        """Bytes are about to be sent.

        Raises:
            StateError: the disk refuses; nothing may be sent then.
        """
        left = math.floor(self.left - size)
        self._state.note({_LEFT: left, _AT: math.ceil(self._clock() * 1000)})
