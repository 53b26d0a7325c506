"""How much one device may send: token buckets, asked before anything of a message is decoded.

A device that floods costs the server one dictionary look-up for each message beyond its rate; the others keep theirs.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from edge_sdk.errors import ConfigError

__all__ = ["RateLimits", "Rates"]

_STRANGERS = ""  # no device is called so


@dataclass(frozen=True)
class RateLimits:
    """What one device may send, in the long run and at once.

    The defaults let an honest device be as fast as it can (it stores samples at some 80 MB/s over a loopback), and let
    the largest message of the wire's default limits (64 MiB, or 4096 frames) pass in one burst. Lower them to what the
    network can carry: a device above its rate is left unread for a while (``server_sdk/quarantine.py``).

    Attributes:
        messages_per_s: MQTT messages (frames), any positive number.
        bytes_per_s: payload bytes, any positive number.
        burst_s: a device that was silent may send what it may send in this many seconds at once; positive.

    Raises:
        ConfigError: a value that is not finite and positive.
    """

    messages_per_s: float = 4096.0
    bytes_per_s: float = 128e6
    burst_s: float = 2.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"{field.name}={value!r}: a rate limit is a positive number")


class _Bucket:
    """What a device may still send; full when it comes."""

    __slots__ = ("bytes", "messages", "updated_s")

    def __init__(self, limits: RateLimits, now_s: float) -> None:
        self.messages, self.bytes = _capacity(limits)
        self.updated_s = now_s

    def refill(self, limits: RateLimits, now_s: float) -> bool:
        """Add what time has brought; True when full. A clock that was set back brings nothing and takes nothing."""
        elapsed_s = max(0.0, now_s - self.updated_s)
        self.updated_s = now_s
        messages, size = _capacity(limits)
        self.messages = min(messages, self.messages + elapsed_s * limits.messages_per_s)
        self.bytes = min(size, self.bytes + elapsed_s * limits.bytes_per_s)
        return self.messages >= messages and self.bytes >= size


class Rates:
    """Decides for each message whether its device may send it now; constant time, not thread-safe.

    At most ``max_devices`` devices are remembered. One that has been silent until its bucket was full again is
    forgotten for a new one, which changes nothing for either; while there is none such, new devices are refused.

    Args:
        limits: of each device.
        clock: seconds that count up; steps backwards are harmless.
        max_devices: devices to remember, at least 1.

    Raises:
        ConfigError: ``max_devices`` below 1.
    """

    def __init__(
        self,
        limits: RateLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_devices: int = 1024,
    ) -> None:
        if max_devices < 1:
            raise ConfigError(f"max_devices={max_devices} must be at least 1")
        self._limits = limits or RateLimits()
        self._clock = clock
        self._max_devices = max_devices
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()  # the longest silent first
        self._refused: Counter[str] = Counter()

    @property
    def refused(self) -> Mapping[str, int]:
        """Messages refused so far, by device; under ``""`` those of devices that are not remembered (any more)."""
        return MappingProxyType(self._refused)

    def allow(self, device: str, size: int) -> bool:
        """Whether a message of ``size`` bytes (0 or more) may be taken now; what is refused costs its device nothing.

        A message larger than a whole burst passes when the bucket is full, and its device pays for it afterwards.
        """
        now_s = self._clock()
        bucket = self._buckets.get(device)
        if bucket is None:
            if not self._make_room(now_s):
                self._refused[_STRANGERS] += 1
                return False
            bucket = self._buckets[device] = _Bucket(self._limits, now_s)
        else:
            bucket.refill(self._limits, now_s)
            self._buckets.move_to_end(device)
        messages, most = _capacity(self._limits)
        if bucket.messages < min(1.0, messages) or bucket.bytes < min(size, most):
            self._refused[device] += 1
            return False
        bucket.messages -= 1.0
        bucket.bytes -= size
        return True

    def _make_room(self, now_s: float) -> bool:
        if len(self._buckets) < self._max_devices:
            return True
        device, bucket = next(iter(self._buckets.items()))
        if not bucket.refill(self._limits, now_s):
            return False
        del self._buckets[device]
        self._refused[_STRANGERS] += self._refused.pop(device, 0)
        return True


def _capacity(limits: RateLimits) -> tuple[float, float]:
    """(messages, bytes) of a full bucket."""
    return limits.messages_per_s * limits.burst_s, limits.bytes_per_s * limits.burst_s
