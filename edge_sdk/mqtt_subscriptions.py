"""Which subscriptions a connection should have, and what the broker says to them."""

from __future__ import annotations

import time

from edge_sdk.mqtt_link import Link

__all__ = ["ASK_AGAIN_S", "Subscriptions"]

ASK_AGAIN_S = 30.0
"""Seconds until a refused subscription is asked for again: its ACL may be corrected meanwhile."""


class Subscriptions:
    """The patterns of a transport. Not thread-safe: its user holds a lock.

    Attributes:
        patterns: what was subscribed to.
        refused: of these, what the broker does not grant now.
    """

    def __init__(self) -> None:
        self.patterns: tuple[str, ...] = ()
        self.refused: tuple[str, ...] = ()
        self._asked: dict[int, tuple[str, ...]] = {}  # by packet id, what no caller waits for
        self._ask_again_at = 0.0

    def add(self, pattern: str) -> None:
        """Want a pattern."""
        if pattern not in self.patterns:
            self.patterns = (*self.patterns, pattern)

    def answered(self, pattern: str, *, granted: bool) -> None:
        """Somebody waited for the answer to this pattern: a refused one is no longer wanted."""
        self.refused = _without(self.refused, (pattern,))
        if not granted:
            self.patterns = _without(self.patterns, (pattern,))

    def connected(self, link: Link) -> dict[str, str]:
        """Take the answer to the subscriptions that were renewed on connecting, and ask for those made since.

        Returns:
            Why the broker refuses a pattern, for each that it refuses.
        """
        patterns, mid = link.renewed
        self._asked = {} if mid is None else {mid: patterns}
        refused = self.settle(link)
        self._ask(link, _without(self.patterns, patterns))
        return refused

    def settle(self, link: Link) -> dict[str, str]:
        """Take the answers that have come; returns as ``connected``."""
        refused: dict[str, str] = {}
        for mid in self._asked.keys() & link.subscribed.keys():
            patterns = self._asked.pop(mid)
            answers = zip(patterns, link.subscribed.pop(mid), strict=False)
            refused |= {pattern: why for pattern, why in answers if why is not None}
            self.refused = _without(self.refused, patterns)
        self.refused += tuple(refused)
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
    return tuple(pattern for pattern in patterns if pattern not in others)
