"""What a device must not lose, behind one contract: the front, the steps in flight, the session and its counters.

A step enters the outbox before it is sent and leaves it together with the new front, in one commit; so a device that
stops anywhere in between either still has the step or has finished it. ``MemoryState`` keeps the contract for one
process life, ``edge_sdk/sqlite_state.py`` keeps it across all of them.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ConfigError, OutboxFullError
from edge_sdk.front import FrontState
from edge_sdk.noise import KEY_BYTES

__all__ = ["DEVICE", "MemoryState", "OutboxLimits", "OutboxStep", "State", "device_counters", "room_for"]

DEVICE = "device."
"""How the names of counters begin that outlive a run."""


@dataclass(frozen=True)
class OutboxStep:
    """A step that is sent and not yet answered.

    Attributes:
        step: its number, counted up within the session and never reused.
        kind: of its message: ``train``, ``store`` or ``front``.
        frames: the very bytes that are sent, to be sent again until a reply comes.
        x: float32 (N, *input_shape), the batch, from which forward and so backward can be computed again; None for a
            step without backward.
        label: int64 (N), the classes that the perturbation attacked, or None where the guide chose them.
    """

    step: int
    kind: str
    frames: tuple[bytes, ...] = field(repr=False)
    x: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    label: npt.NDArray[np.int64] | None = field(default=None, repr=False)

    @property
    def frames_size(self) -> int:
        """Bytes of the frames."""
        return sum(map(len, self.frames))

    @property
    def size(self) -> int:
        """Bytes of frames, batch and labels."""
        arrays = sum(array.nbytes for array in (self.x, self.label) if array is not None)
        return self.frames_size + arrays


@dataclass(frozen=True)
class OutboxLimits:
    """How much may wait for replies, and what a full outbox does with one step more.

    Attributes:
        max_steps: steps, at least 1.
        max_bytes: of all steps together (``OutboxStep.size``), at least 1.
        when_full: ``block``: the client waits for replies; ``drop-oldest``: the oldest steps give way, are counted
            and never trained; ``refuse``: the caller gets an ``OutboxFullError``.

    Raises:
        ConfigError: a limit below 1 or an unknown policy.
    """

    max_steps: int = 64
    max_bytes: int = 64 << 20
    when_full: Literal["block", "drop-oldest", "refuse"] = "block"

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.max_bytes < 1:
            raise ConfigError(
                f"an outbox of {self.max_steps} steps and {self.max_bytes} bytes: give at least 1 of each"
            )
        if self.when_full not in ("block", "drop-oldest", "refuse"):
            raise ConfigError(f"when_full is {self.when_full!r}: use block, drop-oldest or refuse")


def room_for(step: OutboxStep, sizes: Mapping[int, int], limits: OutboxLimits) -> tuple[int, ...]:
    """Which waiting steps must give way to a new one.

    Args:
        step: the new one.
        sizes: bytes of each waiting step by its number, oldest first.
        limits: of the outbox.

    Returns:
        Numbers of the steps to drop; empty while there is room.

    Raises:
        OutboxFullError: no room, and the policy drops nothing; or a step that is above the limit by itself.
    """
    if step.size > limits.max_bytes:
        raise OutboxFullError(
            f"step {step.step} of {step.size} bytes is above the outbox's {limits.max_bytes}: send smaller batches"
        )
    count, total = len(sizes) + 1, sum(sizes.values()) + step.size
    dropped = []
    for number, size in sizes.items():
        if count <= limits.max_steps and total <= limits.max_bytes:
            break
        dropped.append(number)
        count, total = count - 1, total - size
    if dropped and limits.when_full != "drop-oldest":
        raise OutboxFullError(
            f"{len(sizes)} steps wait for the server, the outbox takes {limits.max_steps} steps and "
            f"{limits.max_bytes} bytes: wait for replies, or raise its limits"
        )
    return tuple(dropped)


def device_counters(counters: Mapping[str, int]) -> dict[str, int]:
    """Those that a new run leaves as they are."""
    return {name: value for name, value in counters.items() if name.startswith(DEVICE)}


class State(Protocol):
    """The contract of every state backend. Each method that changes something is one commit: whole or not at all.

    Every method may raise StateError: the disk is full, read-only or damaged; nothing has changed then.
    """

    @property
    def limits(self) -> OutboxLimits:
        """Bounds of the outbox."""

    @property
    def session(self) -> str:
        """16 hexadecimal digits: one life of this state."""

    @property
    def noise_key(self) -> bytes:
        """32 secret bytes, drawn with the session: what the noise on the activations is drawn from. Never sent."""

    @property
    def run(self) -> str:
        """Id of the training run that outbox, front and counters belong to; empty before the first."""

    @property
    def front(self) -> FrontState:
        """The front as of the last finished step."""

    @property
    def outbox(self) -> tuple[OutboxStep, ...]:
        """The steps in flight, oldest first."""

    @property
    def counters(self) -> Mapping[str, int]:
        """Whatever numbers the client keeps (steps trained, batches drawn, ...), as of the last commit."""

    def begin_run(self, run: str, front: FrontState) -> tuple[int, ...]:
        """Start over for a run: empty the outbox, clear the counters, take this front.

        Counters whose name begins with ``DEVICE`` are the device's own and stay.

        Returns:
            Numbers of the steps that were dropped from the outbox.
        """

    def change_bundle(self, bundle: str, front: FrontState) -> tuple[int, ...]:
        """Go over to another bundle: as ``begin_run`` of no run yet. Session, noise key and step numbers go on.

        Args:
            bundle: its id.
            front: its initial one.

        Returns:
            Numbers of the steps that were dropped from the outbox: their activations mean nothing to the new back.
        """

    def note(self, counters: Mapping[str, int]) -> None:
        """Set these counters, in a commit of their own."""

    def next_step(self) -> int:
        """Draw the next step number; a number is never drawn twice in a session, whatever crashes."""

    def begin(self, step: OutboxStep, counters: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """Put a step into the outbox and set these counters; ``dropped`` counts the steps that gave way.

        Returns:
            Numbers of the steps that gave way.

        Raises:
            OutboxFullError: no room, see ``room_for``.
            ConfigError: a step of this number is in the outbox.
        """

    def finish(self, step: int, front: FrontState | None = None, counters: Mapping[str, int] | None = None) -> None:
        """Remove a step from the outbox, take over its new front and set these counters.

        Raises:
            ConfigError: that step is not in the outbox.
        """

    def close(self) -> None:
        """Release files; may be called again."""


class MemoryState:
    """The contract for one process life: what tests and simulations use.

    Args:
        front: the front to start from.
        limits: of the outbox.
    """

    def __init__(self, front: FrontState, limits: OutboxLimits | None = None) -> None:
        self._limits = limits or OutboxLimits()
        self._session = secrets.token_hex(8)
        self._noise_key = secrets.token_bytes(KEY_BYTES)
        self._run = ""
        self._front = front
        self._outbox: dict[int, OutboxStep] = {}
        self._counters: dict[str, int] = {}
        self._step = 0

    @property
    def limits(self) -> OutboxLimits:
        """Bounds of the outbox."""
        return self._limits

    @property
    def session(self) -> str:
        """16 hexadecimal digits: one life of this state."""
        return self._session

    @property
    def noise_key(self) -> bytes:
        """32 secret bytes. See ``State.noise_key``."""
        return self._noise_key

    @property
    def run(self) -> str:
        """Id of the training run, empty before the first."""
        return self._run

    @property
    def front(self) -> FrontState:
        """The front as of the last finished step."""
        return self._front

    @property
    def outbox(self) -> tuple[OutboxStep, ...]:
        """The steps in flight, oldest first."""
        return tuple(self._outbox.values())

    @property
    def counters(self) -> Mapping[str, int]:
        """The client's numbers as of the last commit."""
        return dict(self._counters)

    def begin_run(self, run: str, front: FrontState) -> tuple[int, ...]:
        """Start over for a run. See ``State.begin_run``."""
        dropped = tuple(self._outbox)
        self._run, self._front = run, front
        self._outbox.clear()
        self._counters = device_counters(self._counters)
        return dropped

    def change_bundle(self, bundle: str, front: FrontState) -> tuple[int, ...]:
        """Go over to another bundle. See ``State.change_bundle``."""
        return self.begin_run("", front)

    def note(self, counters: Mapping[str, int]) -> None:
        """Set these counters."""
        self._counters |= counters

    def next_step(self) -> int:
        """Draw the next step number."""
        self._step += 1
        return self._step

    def begin(self, step: OutboxStep, counters: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """Put a step into the outbox. See ``State.begin``."""
        if step.step in self._outbox:
            raise ConfigError(f"step {step.step} is in flight: draw a new number")
        dropped = room_for(step, {number: each.size for number, each in self._outbox.items()}, self._limits)
        for number in dropped:
            del self._outbox[number]
        self._outbox[step.step] = step
        self._counters |= counters or {}
        if dropped:
            self._counters["dropped"] = self._counters.get("dropped", 0) + len(dropped)
        return dropped

    def finish(self, step: int, front: FrontState | None = None, counters: Mapping[str, int] | None = None) -> None:
        """Remove a step from the outbox. See ``State.finish``."""
        if step not in self._outbox:
            raise ConfigError(f"step {step} is not in flight")
        del self._outbox[step]
        if front is not None:
            self._front = front
        self._counters |= counters or {}

    def close(self) -> None:
        """Nothing to release."""
