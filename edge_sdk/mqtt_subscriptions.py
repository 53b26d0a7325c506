"""Which subscriptions a connection should have, and what the broker says to them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from edge_sdk.mqtt_link import Link

__all__ = ["ASK_AGAIN_S", "Subscriptions"]

ASK_AGAIN_S = 30.0
"""Seconds until a refused subscription is asked for again: its ACL may be corrected meanwhile."""


class Subscriptions:
    """The patterns of a transport. Not thread-safe: its user holds a lock.

    Attributes:
        patterns: what was subscribed to.
        refused: of these, what the broker does not grant now.
        unwanted: what was subscribed to, and the broker has not confirmed that it ended.
    """

    def __init__(self) -> None:
        self.patterns: tuple[str, ...] = ()
        self.refused: tuple[str, ...] = ()
        self.unwanted: tuple[str, ...] = ()
        self._asked: dict[int, tuple[str, ...]] = {}  # by packet id, what no caller waits for
        self._ending: dict[int, tuple[str, ...]] = {}  # the same of UNSUBSCRIBE
        self._ask_again_at = 0.0

    def add(self, patterns: tuple[str, ...]) -> None:
        """Want patterns."""
        self.unwanted = _without(self.unwanted, patterns)
        self.patterns += _without(patterns, self.patterns)

    def remove(self, patterns: tuple[str, ...]) -> None:
        """Want patterns no longer, until ``ended`` at each connection anew."""
        self.patterns = _without(self.patterns, patterns)
        self.refused = _without(self.refused, patterns)
        self.unwanted += _without(patterns, self.unwanted)

    def ended(self, patterns: tuple[str, ...]) -> None:
        """The broker has answered the UNSUBSCRIBE of these patterns."""
        self.unwanted = _without(self.unwanted, patterns)

    def answered(self, patterns: tuple[str, ...], answers: Sequence[str | None]) -> tuple[str, ...]:
        """Somebody waited for the answer to these patterns: returns the refused ones, which are no longer wanted."""
        refused = tuple(pattern for pattern, why in zip(patterns, answers, strict=False) if why is not None)
        self.refused = _without(self.refused, patterns)
        self.patterns = _without(self.patterns, refused)
        return refused

    def connected(self, link: Link) -> dict[str, str]:
        """Take the answer to the subscriptions that were renewed on connecting, ask for those made since, end others.

        Returns:
            Why the broker refuses a pattern, for each that it refuses.
        """
        patterns, mid = link.renewed
        self._asked = {} if mid is None else {mid: patterns}
        refused = self.settle(link)
        self._ask(link, _without(self.patterns, patterns))
        mid = link.unsubscribe(self.unwanted) if self.unwanted else None
        self._ending = {} if mid is None else {mid: self.unwanted}
        return refused

    def settle(self, link: Link) -> dict[str, str]:
        """Take the answers that have come; returns as ``connected``."""
        refused: dict[str, str] = {}
        for mid in self._asked.keys() & link.subscribed.keys():
            patterns = self._asked.pop(mid)
            answers = zip(patterns, link.subscribed.pop(mid), strict=False)
            refused |= {pattern: why for pattern, why in answers if why is not None and pattern in self.patterns}
            self.refused = _without(self.refused, patterns)
        self.refused += tuple(refused)
        for mid in self._ending.keys() & link.unsubscribed.keys():
            del link.unsubscribed[mid]
            self.ended(self._ending.pop(mid))
        return refused

    def ask_again(self, link: Link) -> None:
        """Ask for what is refused, if it is time to."""
        if self.refused and time.monotonic() >= self._ask_again_at:
            self._ask(link, self.refused)

    def _ask(self, link: Link, patterns: tuple[str, ...]) -> None:
        mid = link.subscribe(patterns) if patterns else None
        if mid is not None:
            self._asked[mid] = patterns
        self._ask_again_at = time.monotonic() + ASK_AGAIN_S


def _without(patterns: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    left_out = set(others)
    return tuple(pattern for pattern in patterns if pattern not in left_out)
