"""A server that answers each step with itself: what the wire benchmark and its tests talk to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge_sdk import topics
from edge_sdk.transport import Transport
from edge_sdk.wire import VERSION, Message, encode
from server_sdk.activations import ActivationStore
from server_sdk.inbox import Arrival, Inbox
from server_sdk.log import Log
from server_sdk.rates import RateLimits, Rates
from server_sdk.replies import Replies

__all__ = ["BUNDLE", "CHUNK_BYTES", "CUT", "EchoService"]

BUNDLE = "echo"
CUT = (10, 25)
"""Shape of one sample's activations, 1000 bytes."""
CHUNK_BYTES = 65536
_MAX_BATCH = 256


class EchoService:
    """The stations of ``server_sdk.service`` in its order; a step's gradient is its activations.

    Args:
        transport: opened here, closed by the caller.
        fleet: name of the fleet.
        log: where steps are written before they are answered, or None.
        chunk_bytes: of the replies.
    """

    def __init__(self, transport: Transport, fleet: str, log: Log | None, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._transport = transport
        self._fleet = fleet
        self._log = log
        self._chunk_bytes = chunk_bytes
        self._round = 0
        # No rate limit: the default one is a policy and would hide what is measured.
        rates = Rates(RateLimits(messages_per_s=1e9, bytes_per_s=1e12))
        self._inbox = Inbox(fleet, "run", CUT, classes=10, max_batch=_MAX_BATCH, rates=rates)
        self._replies = Replies()
        self._store = ActivationStore(0, 64, "equal")

    def open(self) -> None:
        """Connect, announce the run and listen."""
        self._transport.open(None)
        fields = {
            "bundle": BUNDLE,
            "status": "training",
            "rounds": 1 << 30,
            "evaluate_every": 0,
            "batch": _MAX_BATCH,
            "speaks": [VERSION],
        }
        self._publish(topics.down_model(self._fleet), self._encode("model", "", 0, fields, {}), retain=True)
        self._transport.subscribe(topics.every_step(self._fleet))
        self._transport.subscribe(topics.every_state(self._fleet))

    def serve(self, timeout_s: float) -> None:
        """Take one message of a device, waiting at most this long, and answer it."""
        received = self._transport.receive(timeout_s)
        if received is None:
            return
        arrival = self._inbox.take(received)
        waiting = self._step(arrival) if isinstance(arrival, Arrival) and arrival.message.kind != "state" else False
        if waiting and isinstance(arrival, Arrival):
            self._train(arrival)
        received.acknowledge()

    def _step(self, arrival: Arrival) -> bool:
        """Write a new step, answer stored samples; True for a step that waits to be trained."""
        message, topic = arrival.message, topics.down_step(self._fleet, arrival.device)
        known = self._replies.find(arrival.key)
        if known is not None or self._store.holds(arrival.key) or self._replies.is_old(arrival.key):
            self._publish(topic, known or ())
            return False
        place = None
        if self._log is not None:
            device, session, step = arrival.key
            fields = {"device": device, "kind": message.kind, "session": session, "step": step}
            place = self._log.append("step", fields, arrival.body)
        if message.kind != "store":
            return True
        if place is not None:
            self._store.add(arrival.device, message, arrival.body, place)
        self._publish(topic, self._encode("stored", *arrival.key[1:], {"samples": len(self._store)}, {}))
        return False

    def _train(self, arrival: Arrival) -> None:
        """A round of one device: a record, and the reply, which is kept."""
        if self._log is not None:
            self._log.append("round", {"steps": [list(arrival.key)], "absent": []})
        self._round += 1
        fields = {"front": arrival.message.fields["front"], "rate": 1.0, "loss": 0.0, "round": self._round}
        gradient = {"gradient": arrival.message.tensors["activations"]}
        frames = self._encode("gradient", *arrival.key[1:], fields, gradient)
        self._replies.keep(arrival.key, frames)
        self._publish(topics.down_step(self._fleet, arrival.device), frames)

    def _encode(
        self, kind: str, session: str, step: int, fields: Mapping[str, Any], tensors: Mapping[str, Any]
    ) -> tuple[bytes, ...]:
        return tuple(encode(Message(kind, "run", session, step, fields, tensors), chunk_bytes=self._chunk_bytes))

    def _publish(self, topic: str, frames: tuple[bytes, ...], *, retain: bool = False) -> None:
        for frame in frames:
            self._transport.publish(topic, frame, retain=retain)
