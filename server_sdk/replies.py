"""Replies that were sent, kept so that a repeated step is answered and never trained twice."""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["Replies"]


class Replies:
    """The last replies of each device, as the bytes that were sent.

    Args:
        kept: replies kept for each device; a device has one step in flight, so a few are plenty.
        max_devices: beyond this number the device that was silent longest is forgotten.
    """

    def __init__(self, *, kept: int = 2, max_devices: int = 1024) -> None:
        self._kept = kept
        self._max_devices = max_devices
        self._replies: OrderedDict[str, OrderedDict[tuple[str, int], tuple[bytes, ...]]] = OrderedDict()
        self._newest: dict[str, tuple[str, int]] = {}

    def keep(self, device: str, session: str, step: int, frames: tuple[bytes, ...]) -> None:
        """Keep the reply to a step."""
        replies = self._replies.setdefault(device, OrderedDict())
        self._replies.move_to_end(device)
        replies[session, step] = frames
        while len(replies) > self._kept:
            replies.popitem(last=False)
        while len(self._replies) > self._max_devices:
            forgotten, _ = self._replies.popitem(last=False)
            self._newest.pop(forgotten, None)
        newest = self._newest.get(device)
        if newest is None or newest[0] != session or newest[1] < step:
            self._newest[device] = (session, step)

    def find(self, device: str, session: str, step: int) -> tuple[bytes, ...] | None:
        """The reply to that step, or None if the step is new (or too old, see ``is_old``)."""
        return self._replies.get(device, OrderedDict()).get((session, step))

    def is_old(self, device: str, session: str, step: int) -> bool:
        """Whether a later step of this session was already answered: its sender has long gone on."""
        newest = self._newest.get(device)
        return newest is not None and newest[0] == session and step <= newest[1]
