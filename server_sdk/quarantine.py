"""A device that floods is left unread: the broker is asked to send nothing of it for a while.

A broker queues what waits for a subscriber in one line. Messages that the server drops have stood in that line, before
those of the other devices; so dropping alone does not keep a flood from the fleet, only ending the subscription does.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from edge_sdk import topics
from edge_sdk.errors import ConfigError, TransportError
from edge_sdk.transport import Transport

__all__ = ["Quarantine"]

_WINDOW_S = 10.0  # refusals are counted for so long
_AGAIN_S = 10.0  # until a broker that refused is asked again
_OTHERS = ""  # stands for the devices beyond max_devices; no device is called so
_CHANNELS = {"step": (topics.every_step, topics.up_step), "state": (topics.every_state, topics.up_state)}


@dataclass
class _Sentence:
    """How long a device is left unread, and whether it is now; afterwards it is remembered in case it floods again."""

    seconds: float
    end_s: float
    active: bool = True


class Quarantine:
    """The server's subscriptions to its devices, without those that flood. Not thread-safe.

    Ordinarily these are two wildcards, one a channel. When a device floods a channel, its wildcard gives way to single
    subscriptions of every other known device, until the time of the flooding device is over. Each further flood within
    ``longest_s`` of the last quarantine doubles that time. Devices that the server comes to know meanwhile by the other
    channel are subscribed to at once; states are retained, so that the rest are found when the wildcard is back.

    At most ``max_devices`` devices are known, and as many floods remembered; beyond that the quarantine that ends first
    gives way.

    Args:
        transport: its subscriptions are managed; the caller opens and closes it.
        fleet: name of the fleet.
        after: so many messages within 10 s may be blamed on a device, 0 or more; with one more it is left unread.
        first_s: length of a first quarantine, positive.
        longest_s: no quarantine is longer; at least ``first_s``.
        max_devices: devices to know, at least 1.
        on_event: called with ``{"event": "quarantine", "device", "channel", "over", "seconds"}`` when a quarantine
            begins (``over`` False) and ends; ``device`` is empty for devices beyond ``max_devices``. And with
            ``{"event": "broker", "why"}`` when the broker does not change the subscriptions: it is asked again after
            10 s.
        clock: seconds that count up.

    Raises:
        ConfigError: a value out of its range.
    """

    def __init__(
        self,
        transport: Transport,
        fleet: str,
        *,
        after: int = 100,
        first_s: float = 60.0,
        longest_s: float = 3600.0,
        max_devices: int = 1024,
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if after < 0 or max_devices < 1 or not 0 < first_s <= longest_s < math.inf:
            raise ConfigError(
                f"after={after}, first_s={first_s}, longest_s={longest_s}, max_devices={max_devices}: "
                "choose after >= 0, 0 < first_s <= longest_s and max_devices >= 1"
            )
        self._transport = transport
        self._fleet = topics.check_name(fleet)
        self._after = after
        self._first_s = first_s
        self._longest_s = longest_s
        self._max_devices = max_devices
        self._on_event = on_event
        self._clock = clock
        self._known: dict[str, None] = {}  # in the order in which they came
        self._sentences: dict[tuple[str, str], _Sentence] = {}  # by device and channel
        self._refusals = Counter[tuple[str, str]]()
        self._counted_since_s = -math.inf
        self._again_s = math.inf  # when to ask a broker again that refused

    def open(self) -> None:
        """Subscribe; end what an earlier life of the server left of the known devices.

        Raises:
            TransportError: the broker refuses.
        """
        self._subscribe()

    def close(self) -> None:
        """End the single subscriptions: beside wildcards, a broker may send each message once for either.

        Raises:
            TransportError: the broker refuses.
        """
        if any(sentence.active for sentence in self._sentences.values()):
            self._transport.unsubscribe(*self._singles())

    def known(self, device: str) -> None:
        """Note a device that the server serves."""
        if device in self._known or len(self._known) >= self._max_devices:
            return
        self._known[device] = None
        single = [
            topic(self._fleet, device)
            for channel, (_, topic) in _CHANNELS.items()
            if (out := self._out(channel)) and device not in out
        ]
        if single:
            self._try(lambda: self._transport.subscribe(*single))

    def blame(self, device: str, channel: str) -> None:
        """Note a message of a device that was dropped as part of a flood.

        Args:
            device: its name.
            channel: ``step`` or ``state``.
        """
        now_s = self._clock()
        key = (device, channel)
        sentence = self._sentences.get(key)
        if sentence is not None and sentence.active:
            return  # what the broker still had of it
        if now_s - self._counted_since_s > _WINDOW_S:
            self._refusals.clear()
            self._counted_since_s = now_s
        if key not in self._refusals and len(self._refusals) >= self._max_devices:
            key = (_OTHERS, channel)
            sentence = self._sentences.get(key)
        self._refusals[key] += 1
        if self._refusals[key] <= self._after or (sentence is not None and sentence.active):
            return
        del self._refusals[key]
        again = sentence is not None and now_s - sentence.end_s <= self._longest_s
        seconds = min(2 * sentence.seconds, self._longest_s) if sentence is not None and again else self._first_s
        if key not in self._sentences and len(self._sentences) >= self._max_devices:
            self._end(min(self._sentences, key=lambda other: self._sentences[other].end_s))
        self._sentences[key] = _Sentence(seconds, now_s + seconds)
        self._tell(key)
        self._try(self._subscribe)

    def tend(self) -> None:
        """End each quarantine whose time is over. Call it often."""
        now_s = self._clock()
        over = [key for key, sentence in self._sentences.items() if sentence.active and sentence.end_s <= now_s]
        for key in over:
            self._sentences[key].active = False
            self._tell(key)
        if over or now_s >= self._again_s:
            self._try(self._subscribe)

    def _end(self, key: tuple[str, str]) -> None:
        """Forget a flood, to remember another."""
        sentence = self._sentences[key]
        if sentence.active:
            sentence.active = False
            self._tell(key)
        del self._sentences[key]

    def _tell(self, key: tuple[str, str]) -> None:
        device, channel = key
        sentence = self._sentences[key]
        self._on_event(
            {
                "event": "quarantine",
                "device": device,
                "channel": channel,
                "over": not sentence.active,
                "seconds": sentence.seconds,
            }
        )

    def _out(self, channel: str) -> set[str]:
        """Whose messages on a channel are left unread."""
        return {device for (device, of), sentence in self._sentences.items() if of == channel and sentence.active}

    def _wanted(self) -> Iterator[str]:
        """The patterns that should be subscribed to."""
        for channel, (everyone, topic) in _CHANNELS.items():
            out = self._out(channel)
            if out:
                yield from (topic(self._fleet, device) for device in self._known if device not in out)
            else:
                yield everyone(self._fleet)

    def _singles(self) -> Iterator[str]:
        """The single subscriptions that there may be, of this life of the server or an earlier one."""
        devices = dict.fromkeys((*self._known, *(device for device, _ in self._sentences if device != _OTHERS)))
        for _, topic in _CHANNELS.values():
            yield from (topic(self._fleet, device) for device in devices)

    def _subscribe(self) -> None:
        """Bring the subscriptions about; first the new ones, so that no message finds none."""
        wanted = dict.fromkeys(self._wanted())
        self._transport.subscribe(*wanted)
        possible = (*(everyone(self._fleet) for everyone, _ in _CHANNELS.values()), *self._singles())
        self._transport.unsubscribe(*(pattern for pattern in possible if pattern not in wanted))
        self._again_s = math.inf

    def _try(self, change: Callable[[], None]) -> None:
        try:
            change()
        except TransportError as exc:
            self._on_event({"event": "broker", "why": str(exc)})
            self._again_s = self._clock() + _AGAIN_S
