"""A broker without a network, for tests and simulation: what MQTT with persistent sessions does."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import NamedTuple

from edge_sdk.errors import TransportError
from edge_sdk.transport import Received, Will, check_pattern, check_topic, matches

__all__ = ["MemoryBroker", "MemoryTransport"]

_log = logging.getLogger(__name__)

_OVERHEAD_BYTES = 64


class _Message(NamedTuple):
    topic: str
    payload: bytes
    retained: bool


class _Session:
    """What the broker keeps of a client, connected or not."""

    def __init__(self, lock: threading.RLock) -> None:
        self.patterns: set[str] = set()
        self.unacknowledged: dict[int, _Message] = {}
        self.fresh: deque[int] = deque()  # of these, what was not received on this connection
        self.arrived = threading.Condition(lock)


class MemoryBroker:
    """Connects the :class:`MemoryTransport` objects that are made with it; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._running = True
        self._ids = count(1)
        self._sessions: dict[str, _Session] = {}
        self._transports: dict[str, MemoryTransport] = {}
        self._retained: dict[str, bytes] = {}
        self._forbidden: tuple[str, ...] = ()

    def forbid(self, *patterns: str) -> None:
        """Refuse, from now on, to subscribe to these patterns and to publish on what they match, as an ACL does.

        Replaces what was forbidden before. Subscriptions that exist stay until they are renewed.
        """
        with self._lock:
            self._forbidden = patterns

    def stop(self) -> None:
        """Vanish as a killed broker does: clients are disconnected and no last will is published."""
        with self._lock:
            self._running = False
            for transport in self._transports.values():
                transport._connected = False

    def start(self, *, lose_sessions: bool = False) -> None:
        """Come back: every open client reconnects and sends what it queued.

        Args:
            lose_sessions: nothing was kept, neither subscriptions nor unacknowledged nor retained messages.
        """
        with self._lock:
            self._running = True
            if lose_sessions:
                for session in self._sessions.values():
                    session.patterns.clear()
                    session.unacknowledged.clear()
                self._retained.clear()
            for transport in self._transports.values():
                self._connect(transport)
            for transport in self._transports.values():
                while transport._outbox:
                    self._accept(transport, *transport._outbox.popleft())

    def drop(self, client_id: str) -> None:
        """Cut one client's connection: its last will is published, then it reconnects.

        Raises:
            TransportError: no such client is open.
        """
        with self._lock:
            transport = self._transports.get(client_id)
            if transport is None:
                raise TransportError(f"no client {client_id!r} is open: open it first")
            if self._running:
                self._bequeath(transport)
                self._connect(transport)

    def _attach(self, transport: MemoryTransport) -> None:
        if not self._running:
            raise TransportError("no broker in memory: start the MemoryBroker first")
        if transport._client_id in self._transports:
            raise TransportError(f"client id {transport._client_id!r} is in use: give each client its own")
        self._transports[transport._client_id] = transport
        self._connect(transport)

    def _detach(self, transport: MemoryTransport) -> None:
        del self._transports[transport._client_id]
        self._session(transport).arrived.notify_all()

    def _session(self, transport: MemoryTransport) -> _Session:
        return self._sessions.setdefault(transport._client_id, _Session(self._lock))

    def _connect(self, transport: MemoryTransport) -> None:
        session = self._session(transport)
        session.fresh = deque(session.unacknowledged)
        transport._connected = True
        transport._generation += 1
        granted = [pattern for pattern in transport._patterns if pattern not in self._forbidden]
        for pattern in granted:
            self._subscribe(session, pattern)
        transport._refused_patterns = tuple(pattern for pattern in transport._patterns if pattern not in granted)
        transport._complaining = bool(transport._refused_patterns)
        session.patterns.difference_update(transport._refused_patterns)
        session.arrived.notify_all()

    def _bequeath(self, transport: MemoryTransport) -> None:
        if transport._will is not None:
            self._publish(transport._will.topic, transport._will.payload, transport._will.retain)

    def _subscribe(self, session: _Session, pattern: str) -> None:
        session.patterns.add(pattern)
        for topic, payload in self._retained.items():
            if matches(pattern, topic):
                self._deliver(session, _Message(topic, payload, True))

    def _accept(self, transport: MemoryTransport, topic: str, payload: bytes, retain: bool) -> None:
        if any(matches(pattern, topic) for pattern in self._forbidden):
            level = logging.DEBUG if transport._refused_messages else logging.WARNING
            transport._refused_messages += 1
            _log.log(level, "the broker in memory refuses to publish on %s", topic)
        else:
            self._publish(topic, payload, retain)

    def _publish(self, topic: str, payload: bytes, retain: bool) -> None:
        if retain and payload:
            self._retained[topic] = payload
        elif retain:
            self._retained.pop(topic, None)
        for session in self._sessions.values():
            if any(matches(pattern, topic) for pattern in session.patterns):
                self._deliver(session, _Message(topic, payload, False))

    def _deliver(self, session: _Session, message: _Message) -> None:
        number = next(self._ids)
        session.unacknowledged[number] = message
        session.fresh.append(number)
        session.arrived.notify()


class MemoryTransport:
    """A :class:`~edge_sdk.transport.Transport` of a :class:`MemoryBroker`.

    Args:
        broker: whom it connects to.
        client_id: the session's name; it outlives the transport.
        max_queued: messages that ``publish`` takes while the broker is stopped.
        max_packet_bytes: largest packet.
    """

    def __init__(
        self,
        broker: MemoryBroker,
        client_id: str,
        *,
        max_queued: int = 100,
        max_packet_bytes: int = 16 * 1024 * 1024,
    ) -> None:
        self._broker = broker
        self._client_id = client_id
        self._max_queued = max_queued
        self._max_packet_bytes = max_packet_bytes
        self._will: Will | None = None
        self._open = False
        self._used = False
        self._connected = False
        self._generation = 0
        self._patterns: list[str] = []
        self._refused_patterns: tuple[str, ...] = ()
        self._complaining = False
        self._refused_messages = 0
        self._outbox: deque[tuple[str, bytes, bool]] = deque()

    @property
    def generation(self) -> int:
        """Connections established so far."""
        return self._generation

    @property
    def connected(self) -> bool:
        """Whether the broker runs and this client is open."""
        return self._connected

    @property
    def max_packet_bytes(self) -> int:
        """The configured limit."""
        return self._max_packet_bytes

    @property
    def refused_messages(self) -> int:
        """Messages that :meth:`MemoryBroker.forbid` kept from others."""
        return self._refused_messages

    @property
    def refused_patterns(self) -> tuple[str, ...]:
        """Subscriptions that :meth:`MemoryBroker.forbid` kept from being renewed."""
        return self._refused_patterns

    def open(self, will: Will | None = None) -> None:
        """Connect. See :meth:`Transport.open`."""
        with self._broker._lock:
            if self._used:
                raise TransportError("this transport was opened before: make a new one")
            self._will = will
            self._broker._attach(self)
            self._open = self._used = True

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Deliver at once, or when the broker is back. See :meth:`Transport.publish`."""
        check_topic(topic)
        size = len(payload) + len(topic.encode()) + _OVERHEAD_BYTES
        with self._broker._lock:
            self._require_open()
            if size > self._max_packet_bytes:
                limit = self._max_packet_bytes
                raise TransportError(f"a packet of {size} bytes is above the limit of {limit}: send smaller chunks")
            if self._connected:
                self._broker._accept(self, topic, bytes(payload), retain)
            elif len(self._outbox) < self._max_queued:
                self._outbox.append((topic, bytes(payload), retain))
            else:
                raise TransportError(
                    f"{self._max_queued} messages wait for the broker in memory, which is not connected: "
                    "wait for it or raise max_queued"
                )

    def subscribe(self, *patterns: str) -> None:
        """Subscribe. See :meth:`Transport.subscribe`."""
        for pattern in patterns:
            check_pattern(pattern)
        with self._broker._lock:
            self._require_open()
            self._forget(patterns)
            refused = [each for each in patterns if self._connected and each in self._broker._forbidden]
            for pattern in patterns:
                if pattern not in refused:
                    self._patterns.append(pattern)
                    if self._connected:
                        self._broker._subscribe(self._broker._session(self), pattern)
            if refused:
                names = ", ".join(map(repr, refused))
                raise TransportError(f"the broker in memory refuses the subscription {names}: correct its ACL")

    def unsubscribe(self, *patterns: str) -> None:
        """End subscriptions. See :meth:`Transport.unsubscribe`."""
        with self._broker._lock:
            self._require_open()
            self._forget(patterns)
            self._broker._session(self).patterns.difference_update(patterns)

    def receive(self, timeout_s: float) -> Received | None:
        """The next message, or None. See :meth:`Transport.receive`."""
        with self._broker._lock:
            self._require_open()
            session = self._broker._session(self)
            session.arrived.wait_for(
                lambda: not self._open or (self._connected and (self._complaining or bool(session.fresh))),
                max(timeout_s, 0.0),
            )
            if self._open and self._connected and self._complaining:
                self._complaining = False
                names = ", ".join(map(repr, self._refused_patterns))
                raise TransportError(f"the broker in memory refuses the subscription {names}: correct its ACL")
            if not self._open or not self._connected or not session.fresh:
                return None
            number = session.fresh.popleft()
            message = session.unacknowledged[number]
            acknowledge = partial(self._acknowledge, session, self._generation, number)
            return Received(message.topic, message.payload, message.retained, acknowledge)

    def close(self) -> None:
        """Stop without a last will. See :meth:`Transport.close`."""
        self._end(bequeath=False)

    def kill(self) -> None:
        """Stop as a crash would: the broker publishes the last will."""
        self._end(bequeath=True)

    def _end(self, *, bequeath: bool) -> None:
        with self._broker._lock:
            if not self._open:
                return
            self._open = self._connected = False
            self._broker._detach(self)
            if bequeath and self._broker._running:
                self._broker._bequeath(self)

    def _acknowledge(self, session: _Session, generation: int, number: int) -> None:
        with self._broker._lock:
            if self._connected and generation == self._generation:
                session.unacknowledged.pop(number, None)

    def _forget(self, patterns: Sequence[str]) -> None:
        self._patterns = [known for known in self._patterns if known not in patterns]
        self._refused_patterns = tuple(known for known in self._refused_patterns if known not in patterns)

    def _require_open(self) -> None:
        if not self._open:
            raise TransportError("the transport is not open: open it first, and make a new one after close")
