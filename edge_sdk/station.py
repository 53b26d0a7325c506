"""What the stations of a client share: the bundle's graphs, the state, the conversation with the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.batch import as_batch, as_labels
from edge_sdk.bundle import Bundle, Manifest
from edge_sdk.errors import ConfigError
from edge_sdk.exchange import Exchange
from edge_sdk.front import Front
from edge_sdk.packing import Packing
from edge_sdk.plan import Plan
from edge_sdk.state import State
from edge_sdk.wire import Message, encode

__all__ = ["Station"]


@dataclass(frozen=True)
class Station:
    """The parts of one device, and what each of its stations needs of them.

    Attributes:
        bundle: what export made.
        state: front, outbox and counters.
        front: the bundle's graphs.
        exchange: the conversation with the server.
        codec: of activations on the wire.
        chunk_bytes: largest payload of one MQTT message.
        train_epsilon: perturbation budget of training steps in place of the bundle's.
    """

    bundle: Bundle
    state: State
    front: Front
    exchange: Exchange
    codec: str | Packing
    chunk_bytes: int
    train_epsilon: float | None

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    @property
    def plan(self) -> Plan:
        """The latest announcement of the server.

        Raises:
            ConfigError: the client was not started.
        """
        if self.exchange.plan is None:
            raise ConfigError("the client has no plan yet: call start() first")
        return self.exchange.plan

    def count(self, name: str) -> int:
        """A counter of the state, 0 where it is not set."""
        return self.state.counters.get(name, 0)

    def batch(self, x: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """A batch as the front takes it. See ``as_batch``."""
        manifest = self.manifest
        return as_batch(x, manifest.input_shape, max_batch=manifest.max_batch, input_range=manifest.input_range)

    def labels(self, y: npt.ArrayLike, count: int) -> npt.NDArray[np.int64]:
        """Labels of such a batch. See ``as_labels``."""
        return as_labels(y, count, len(self.manifest.classes))

    def told(self, batch: npt.NDArray[np.float32]) -> dict[str, int]:
        """The counter after one more send; committed before anything leaves."""
        return {"samples_sent": self.count("samples_sent") + len(batch)}

    def message(self, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any]]) -> Message:
        """A message of the next step number."""
        return Message(kind, self.plan.run, self.state.session, self.state.next_step(), fields, tensors)

    def frames(self, message: Message, *, packed: bool = True) -> tuple[bytes, ...]:
        """Its bytes: activations as the device's codec says, a front's tensors as they are."""
        if packed:
            return tuple(encode(message, codec=self.codec, chunk_bytes=self.chunk_bytes))
        return tuple(encode(message, chunk_bytes=self.chunk_bytes))
