"""What the stations of a client share: the bundle's graphs, the state, the conversation with the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.batch import as_batch, as_labels
from edge_sdk.bundle import Bundle, Manifest
from edge_sdk.errors import BundleError, ConfigError
from edge_sdk.exchange import Exchange
from edge_sdk.front import Front
from edge_sdk.packing import Packing
from edge_sdk.plan import Plan
from edge_sdk.state import State
from edge_sdk.wire import Message, encode

__all__ = ["Loaded", "Station"]


@dataclass(frozen=True)
class Loaded:
    """A bundle that is ready to run.

    Attributes:
        bundle: what export made.
        front: its graphs.
    """

    bundle: Bundle
    front: Front


@dataclass
class Station:
    """The parts of one device, and what each of its stations needs of them.

    Attributes:
        loaded: the bundle that runs; ``switch`` alone replaces it.
        state: front, outbox and counters.
        exchange: the conversation with the server.
        codec: of activations on the wire, unless the bundle packs them into few bits.
        chunk_bytes: largest payload of one MQTT message.
        train_epsilon: perturbation budget of training steps in place of the bundle's.
        threads: threads of onnxruntime.
    """

    loaded: Loaded
    state: State
    exchange: Exchange
    codec: str
    chunk_bytes: int
    train_epsilon: float | None
    threads: int

    @property
    def bundle(self) -> Bundle:
        """What export made."""
        return self.loaded.bundle

    @property
    def front(self) -> Front:
        """The bundle's graphs."""
        return self.loaded.front

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

    def replacement(self, bundle: Bundle) -> Loaded:
        """Another bundle for this device, ready to run; nothing has changed yet.

        Raises:
            BundleError: this onnxruntime cannot run it, or it takes other inputs or decides between other classes.
        """
        for name in ("input_shape", "input_range", "classes"):
            mine, other = getattr(self.manifest, name), getattr(bundle.manifest, name)
            if mine != other:
                raise BundleError(
                    f"bundle {bundle.id} has {name} {str(other)[:60]}, the one that runs {str(mine)[:60]}: "
                    "start the device anew with a configuration for it"
                )
        return Loaded(bundle, Front(bundle, threads=self.threads, noise_key=self.state.noise_key))

    def switch(self, loaded: Loaded) -> None:
        """From now on run this bundle, between two steps: the state goes over to it in one commit, then the rest.

        Raises:
            StateError: the disk refuses; nothing has changed.
        """
        self.exchange.forget(self.state.change_bundle(loaded.bundle.id, loaded.front.initial_state()))
        self.loaded = loaded
        self.exchange.change_bundle(loaded.bundle.id)

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
            codec: str | Packing = self.manifest.packing or self.codec
            return tuple(encode(message, codec=codec, chunk_bytes=self.chunk_bytes))
        return tuple(encode(message, chunk_bytes=self.chunk_bytes))
