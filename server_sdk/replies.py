"""Replies that were sent, kept so that a repeated step is answered and never trained twice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Key", "Replies"]

Key = tuple[str, str, int]
"""(device, session, step): which step it is."""


class Replies:
    """The last replies of each device, as the bytes that were sent.

    Args:
        kept: replies kept for each device; a device has one step in flight, so a few are plenty.
        max_devices: beyond this number the device that was silent longest is forgotten; the inbox listens to fewer.
    """

    def __init__(self, *, kept: int = 2, max_devices: int = 4096) -> None:
        self._kept = kept
        self._max_devices = max_devices
        self._replies: OrderedDict[str, OrderedDict[tuple[str, int], tuple[bytes, ...]]] = OrderedDict()
        self._newest: dict[str, tuple[str, int]] = {}

    def keep(self, key: Key, frames: tuple[bytes, ...]) -> None:
        """Keep the reply to a step."""
        device, session, step = key
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

    def find(self, key: Key) -> tuple[bytes, ...] | None:
        """The reply to that step, or None if the step is new (or too old, see ``is_old``)."""
        return self._replies.get(key[0], OrderedDict()).get(key[1:])

    def is_old(self, key: Key) -> bool:
        """Whether this step or a later one of its session was already answered: its sender has long gone on."""
        newest = self._newest.get(key[0])
        return newest is not None and newest[0] == key[1] and key[2] <= newest[1]

    def dump(self) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
        """What a checkpoint keeps: plain facts, and the frames as blobs by name."""
        facts: list[dict[str, Any]] = []
        blobs: dict[str, bytes] = {}
        for device, replies in self._replies.items():
            for (session, step), frames in replies.items():
                names = [f"reply.{len(facts)}.{index}" for index in range(len(frames))]
                blobs |= dict(zip(names, frames, strict=True))
                facts.append({"device": device, "session": session, "step": step, "frames": names})
        return facts, blobs

    def load(self, facts: Sequence[Mapping[str, Any]], blobs: Mapping[str, bytes]) -> None:
        """Take over what ``dump`` gave.

        Raises:
            KeyError, TypeError, ValueError: not what it gave.
        """
        for fact in facts:
            key = (str(fact["device"]), str(fact["session"]), int(fact["step"]))
            self.keep(key, tuple(blobs[name] for name in fact["frames"]))
