"""What a device must not lose, behind one contract: the front, the step in flight, the session and its counter.

A step enters the outbox before it is sent and leaves it together with the new front, in one commit; so a device that
stops anywhere in between either still has the step or has finished it. ``MemoryState`` keeps the contract for one
process life.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ConfigError
from edge_sdk.front import FrontState

__all__ = ["MemoryState", "OutboxStep", "State"]


@dataclass(frozen=True)
class OutboxStep:
    """A step that was sent and not yet answered.

    Attributes:
        step: its number, counted up within the session and never reused.
        frames: the very bytes that were sent, to be sent again until a reply comes.
        x: float32 (N, *input_shape), the batch, from which forward and so backward can be computed again; None for a
            step without backward.
        label: int64 (N), the classes that the perturbation attacked, or None where the guide chose them.
    """

    step: int
    frames: tuple[bytes, ...] = field(repr=False)
    x: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    label: npt.NDArray[np.int64] | None = field(default=None, repr=False)


class State(Protocol):
    """The contract of every state backend."""

    @property
    def session(self) -> str:
        """16 hexadecimal digits: one life of this state."""

    @property
    def front(self) -> FrontState:
        """The front as of the last finished step."""

    @property
    def pending(self) -> OutboxStep | None:
        """The step in flight, if there is one."""

    def next_step(self) -> int:
        """Draw the next step number; a number is never drawn twice in a session."""

    def begin(self, step: OutboxStep) -> None:
        """Put a step into the outbox.

        Raises:
            ConfigError: another step is in flight.
        """

    def finish(self, step: int, front: FrontState | None = None) -> None:
        """Remove a step from the outbox and take over its new front, in one commit.

        Raises:
            ConfigError: that step is not in flight.
        """


class MemoryState:
    """The contract for one process life: what tests and simulations use.

    Args:
        front: the front to start from.
    """

    def __init__(self, front: FrontState) -> None:
        self._session = secrets.token_hex(8)
        self._front = front
        self._pending: OutboxStep | None = None
        self._step = 0

    @property
    def session(self) -> str:
        """16 hexadecimal digits: one life of this state."""
        return self._session

    @property
    def front(self) -> FrontState:
        """The front as of the last finished step."""
        return self._front

    @property
    def pending(self) -> OutboxStep | None:
        """The step in flight, if there is one."""
        return self._pending

    def next_step(self) -> int:
        """Draw the next step number."""
        self._step += 1
        return self._step

    def begin(self, step: OutboxStep) -> None:
        """Put a step into the outbox."""
        if self._pending is not None:
            raise ConfigError(f"step {self._pending.step} is still in flight: wait for its reply")
        self._pending = step

    def finish(self, step: int, front: FrontState | None = None) -> None:
        """Remove a step from the outbox and take over its new front."""
        if self._pending is None or self._pending.step != step:
            raise ConfigError(f"step {step} is not in flight")
        self._pending = None
        if front is not None:
            self._front = front
