"""The rules of an MQTT connection, over any client library: reconnect for ever, a bounded queue, a window.

One thread drives the library (a :class:`~edge_sdk.mqtt_link.Link`), so nothing that the library or a broker
does ends the connection for good. The library calls back while it holds its locks; therefore a callback only
notes what happened and takes no lock of ours, and ``_settle`` looks at the notes after each round.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial

from edge_sdk.errors import TransportError
from edge_sdk.mqtt_link import ANSWER_S, Link, LinkError, Plan, Version, refusal
from edge_sdk.mqtt_subscriptions import Subscriptions
from edge_sdk.transport import Connection, Received, Will, check_pattern, check_topic, matches

__all__ = ["MqttTransport"]

_log = logging.getLogger(__name__)

_WINDOW = 20  # unacknowledged messages on the wire
_FIRST_DELAY_S, _LAST_DELAY_S = 0.2, 5.0
_STABLE_S = 5.0  # a connection that lived this long starts the delays anew
_FLUSH_S, _GOODBYE_S = 1.0, 0.3
_OVERHEAD_BYTES = 64  # header, packet id and properties of a PUBLISH
_FRUITLESS = 3
_NAMED = 3  # patterns in an error


class MqttTransport(ABC):
    """A :class:`~edge_sdk.transport.Transport` over a client library: the base of ``PahoTransport``."""

    def __init__(self, connection: Connection, client_id: str) -> None:
        self._connection = connection
        self._client_id = client_id
        self._will: Will | None = None
        self._link: Link | None = None
        self._plan = Plan.first(connection)
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._received: queue.SimpleQueue[Received | TransportError | None] = queue.SimpleQueue()
        self._overflowed = False
        self._progress = False  # a message was acknowledged on this connection
        self._rejected = 0
        self._attempt = 0

        self._changed = threading.Condition()  # guards what follows
        self._connected = False
        self._acknowledging = 0  # the attempt whose messages can be acknowledged
        self._generation = 0
        self._failure: str | None = None
        self._cause = "no answer"
        self._subscriptions = Subscriptions()
        self._complaining = False  # receive has yet to raise the last refusal
        self._refused_messages = 0
        self._pending: deque[tuple[str, bytes, bool]] = deque()
        self._in_flight: deque[str] = deque()  # topics; PUBACKs keep the order (MQTT 3.1.1 and 5.0, section 4.6)
        self._fruitless = 0
        self._window = _WINDOW
        self._max_packet_bytes = connection.max_packet_bytes

    @abstractmethod
    def _new_link(self, plan: Plan) -> Link:
        """The client library for one way to connect."""

    @property
    def generation(self) -> int:
        """Connections established so far."""
        return self._generation

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted a connection that is not known to be lost."""
        return self._connected and not self._closing.is_set()

    @property
    def max_packet_bytes(self) -> int:
        """The smaller of the configured limit and the broker's (MQTT 5: CONNACK Maximum Packet Size)."""
        return self._max_packet_bytes

    @property
    def protocol(self) -> Version:
        """The version of MQTT that is spoken; settled by ``open``."""
        return self._plan.version

    @property
    def rejected(self) -> int:
        """Packets that were dropped: topics that are no UTF-8, and messages far beyond ``max_received``."""
        return self._rejected

    @property
    def refused_messages(self) -> int:
        """Messages that the broker refused to pass on. See :attr:`Transport.refused_messages`."""
        return self._refused_messages

    @property
    def refused_patterns(self) -> tuple[str, ...]:
        """Subscriptions that the broker does not grant now. See :attr:`Transport.refused_patterns`."""
        return self._subscriptions.refused

    def open(self, will: Will | None = None) -> None:
        """Connect, and keep connected until ``close``. See :meth:`Transport.open`."""
        with self._changed:
            if self._thread is not None:
                raise TransportError("this transport was opened before: make a new one")
            self._will = will
            self._link = self._new_link(self._plan)
            self._thread = threading.Thread(target=self._run, name=f"mqtt-{self._client_id}", daemon=True)
            self._thread.start()
            timeout_s = self._connection.connect_timeout_s
            self._changed.wait_for(lambda: self._generation > 0 or self._failure is not None, timeout_s)
            if self._generation > 0:
                return
            text = self._failure or (
                f"no MQTT broker at {self._connection.address} within {timeout_s:g} s ({self._cause}): "
                "start one there or correct host and port"
            )
        self.close()
        raise TransportError(text)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand a message over; waits while a connected broker is slow. See :meth:`Transport.publish`."""
        check_topic(topic)
        with self._changed:
            self._require_open()
            size = len(payload) + len(topic.encode()) + _OVERHEAD_BYTES
            if size > self._max_packet_bytes:
                limit = self._max_packet_bytes
                raise TransportError(f"a packet of {size} bytes is above the limit of {limit}: send smaller chunks")
            deadline = time.monotonic() + self._connection.connect_timeout_s
            most = self._connection.max_queued
            while len(self._in_flight) + len(self._pending) >= most:
                where = f"{most} messages wait for the broker at {self._connection.address}"
                if not self._connected:
                    raise TransportError(f"{where}, which is not connected: wait for it or raise max_queued")
                if time.monotonic() >= deadline:
                    raise TransportError(f"{where}, which is too slow: send less or raise max_queued")
                self._changed.wait(deadline - time.monotonic())
                self._require_open()
            self._pending.append((topic, payload, retain))
            self._pump()

    def subscribe(self, *patterns: str) -> None:
        """Subscribe (QoS 1), confirmed by a connected broker. See :meth:`Transport.subscribe`."""
        for pattern in patterns:
            check_pattern(pattern)
        with self._changed:
            link = self._require_open()
            self._subscriptions.add(patterns)
            answers = self._ask(link.subscribe, link.subscribed, patterns)
            refused = () if answers is None else self._subscriptions.answered(patterns, answers)
        if refused:
            raise TransportError(
                f"the broker at {self._connection.address} refuses the subscription {_named(refused)}: correct its ACL"
            )

    def unsubscribe(self, *patterns: str) -> None:
        """End subscriptions, confirmed by a connected broker. See :meth:`Transport.unsubscribe`."""
        with self._changed:
            link = self._require_open()
            self._subscriptions.remove(patterns)
            answers = self._ask(link.unsubscribe, link.unsubscribed, patterns)
            if answers is None:
                return
            self._subscriptions.ended(patterns)
        if any(answers):
            raise TransportError(
                f"the broker at {self._connection.address} refuses to end {_named(patterns)}: correct its ACL"
            )

    def _ask(
        self,
        ask: Callable[[tuple[str, ...]], int | None],
        answers: dict[int, list[str | None]],
        patterns: tuple[str, ...],
    ) -> list[str | None] | None:
        """Ask, and wait for the answer; None: the connection is lost, the next one asks. The lock is held."""
        generation = self._generation
        mid = ask(patterns) if self._connected and patterns else None
        if mid is None:
            return None

        def answered() -> bool:
            return mid in answers or generation != self._generation or not self._connected

        if not self._changed.wait_for(answered, self._connection.connect_timeout_s):
            address = self._connection.address
            raise TransportError(f"the broker at {address} does not confirm {_named(patterns)}: is it overloaded?")
        return answers.pop(mid, None)

    def receive(self, timeout_s: float) -> Received | None:
        """The next message, or None. See :meth:`Transport.receive`."""
        self._require_open()
        try:
            received = self._received.get(timeout=max(timeout_s, 0.0))
        except queue.Empty:
            return None
        if isinstance(received, TransportError):
            self._complaining = False
            raise received
        return received

    def close(self) -> None:
        """Say goodbye and stop, in less than two seconds. See :meth:`Transport.close`."""
        with self._changed:
            if self._thread is None or self._closing.is_set():
                return
            self._changed.wait_for(lambda: not self._connected or not (self._in_flight or self._pending), _FLUSH_S)
            unsent = len(self._in_flight) + len(self._pending)
            if self._connected and self._link is not None:
                self._link.goodbye()
            self._end()
        if unsent:
            _log.warning("closed with %d messages that the broker did not acknowledge", unsent)
        self._thread.join(2 * _GOODBYE_S)

    def kill(self) -> None:
        """Drop the connection without a goodbye, as a crash would: the broker publishes the last will."""
        with self._changed:
            if self._link is not None:
                self._link.cut()
            self._end()
        if self._thread is not None:
            self._thread.join(2 * _GOODBYE_S)

    def _end(self) -> None:
        self._closing.set()
        self._changed.notify_all()
        self._received.put(None)

    def _require_open(self) -> Link:
        if self._link is None or self._closing.is_set():
            raise TransportError("the transport is not open: open it first, and make a new one after close")
        return self._link

    def _pump(self) -> None:
        """Give the library what fits into the window; the lock is held."""
        while self._link is not None and self._connected and self._pending and len(self._in_flight) < self._window:
            if not self._link.publish(*self._pending[0]):
                return
            self._in_flight.append(self._pending.popleft()[0])

    def _acknowledge(self, attempt: int, mid: int) -> None:
        with self._changed:
            if self._link is not None and self._acknowledging == attempt:
                self._link.acknowledge(mid)
                self._progress = True

    def _take(self, topic: str | None, payload: bytes, qos: int, retained: bool, mid: int) -> None:
        """A message from the library, in its callback; ``topic`` is None if it is no UTF-8."""
        if topic is None:
            self._rejected += 1
            _log.warning("a message whose topic is no UTF-8 is refused")
            if self._link is not None and qos:
                self._link.acknowledge(mid)
            return
        if qos == 0 and not any(matches(pattern, topic) for pattern in self._subscriptions.patterns):
            return  # amqtt sends a client that connects the retained messages of all
        if self._received.qsize() >= 2 * self._connection.max_received:
            self._rejected += 1
            self._overflowed = self._overflowed or qos > 0
            return
        acknowledge: Callable[[], None] = partial(self._acknowledge, self._attempt, mid) if qos else _nothing
        self._received.put(Received(topic, payload, retained, acknowledge))

    # ------------------------------------------------------------ network thread

    def _run(self) -> None:
        delay_s = _FIRST_DELAY_S
        while not self._closing.is_set():
            started = time.monotonic()
            link = self._link
            if link is None:
                break
            try:
                self._connect(link)
                self._serve(link)
                break
            except LinkError as exc:
                lost = exc
            except Exception as exc:  # a defect in the library must not end the connection for good
                _log.exception("the connection starts anew after an unexpected error")
                lost = LinkError(f"unexpected {type(exc).__name__}: {exc}")
            link.cut()
            if self._note(lost) or (lost.kind == "left" and self._progress):
                continue
            if time.monotonic() - started > _STABLE_S:
                delay_s = _FIRST_DELAY_S
            self._closing.wait(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(2 * delay_s, _LAST_DELAY_S)
        if self._link is not None:
            self._link.cut()

    def _note(self, lost: LinkError) -> bool:
        """Note a loss; True to try another plan at once. Ends the thread where ``open`` cannot succeed."""
        address = self._connection.address
        with self._changed:
            was_connected, self._connected, self._acknowledging = self._connected, False, 0
            self._cause = str(lost)
            if lost.kind != "left":
                self._fruitless = self._fruitless + 1 if self._in_flight else 0
            first = self._generation == 0
            if first and lost.kind == "final":
                self._failure = str(lost)
                self._closing.set()
            self._changed.notify_all()
        if self._closing.is_set():
            return False
        if first:
            plan = self._plan.after(lost.kind)
            at_once = plan != self._plan and self._plan.version == "5"
            if plan != self._plan:
                self._plan, self._link = plan, self._new_link(plan)
            return at_once
        level = logging.WARNING if was_connected and lost.kind != "left" else logging.INFO
        _log.log(level, "the connection to %s is lost (%s), reconnecting", address, lost)
        if self._fruitless == _FRUITLESS:
            _log.warning(
                "%s ends each connection before it acknowledges: a packet may be above its limit (send "
                "smaller chunks), or another client has the id %s",
                address,
                self._client_id,
            )
        return False

    def _connect(self, link: Link) -> None:
        """Connect and renew the subscriptions."""
        self._attempt += 1
        self._overflowed = self._progress = False
        started = time.monotonic()
        link.connect()
        now = time.monotonic()
        patience_s = min(max(self._plan.patience_s, 4 * (now - started)), ANSWER_S)
        while link.answer is None:
            self._turn(link, now + patience_s)
        answer = link.answer
        if answer.reason is not None:
            raise refusal(answer.reason, self._connection, self._client_id, self._plan)
        if self._plan.bare:
            self._say_goodbye(link)
            raise LinkError("it knows MQTT 5", "understood")
        mid = link.renewed[1]
        while mid is not None and mid not in link.subscribed:
            self._turn(link, now + 2 * ANSWER_S)
        with self._changed:
            most = self._connection.max_packet_bytes
            self._max_packet_bytes = min(answer.max_packet_bytes or most, most)
            self._window = min(answer.receive_maximum or _WINDOW, _WINDOW)
            self._complain(self._subscriptions.connected(link))
            self._connected = True
            self._generation += 1
            self._changed.notify_all()
        self._settle(link)

    def _turn(self, link: Link, deadline: float) -> None:
        """One round of the loop while connecting."""
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise LinkError("it does not answer CONNECT", "silent")
        if self._closing.is_set():
            raise LinkError("closed")
        if not link.loop(min(remaining_s, 0.1)) and link.answer is None:
            cause = link.farewell or "it closes the connection without an answer; is it a TLS port?"
            raise LinkError(cause, "unsupported")

    def _serve(self, link: Link) -> None:
        """Read and write until the connection is lost (LinkError) or the transport closed."""
        while not self._closing.is_set():
            alive = link.loop(0.1 if self._overflowed else 1.0)  # nothing else tells that the queue is empty
            self._settle(link)
            if not alive and not self._closing.is_set():
                raise LinkError(link.farewell or "closed by the broker")
            if self._overflowed and self._received.empty():
                self._overflowed = False
                self._say_goodbye(link)
                raise LinkError("messages had to be left with the broker, they come again", "left")
            if self._subscriptions.refused:
                with self._changed:
                    self._subscriptions.ask_again(link)
        self._say_goodbye(link)

    def _say_goodbye(self, link: Link) -> None:
        deadline = time.monotonic() + _GOODBYE_S
        link.goodbye()
        while link.loop(0.05) and time.monotonic() < deadline:
            continue

    def _settle(self, link: Link) -> None:
        """Act upon what the callbacks noted."""
        if not (link.published or link.subscribed or link.unsubscribed or self._pending):
            return
        with self._changed:
            while link.published:
                why = link.published.popleft()
                topic = self._in_flight.popleft()
                self._fruitless = 0
                if why is not None:
                    level = logging.DEBUG if self._refused_messages else logging.WARNING
                    self._refused_messages += 1
                    _log.log(level, "%s refuses to publish on %s: %s", self._connection.address, topic, why)
            self._complain(self._subscriptions.settle(link))
            self._pump()
            self._changed.notify_all()

    def _complain(self, refused: dict[str, str]) -> None:
        """Let ``receive`` tell of subscriptions that the broker refused while no caller waited; the lock is held."""
        if not refused:
            return
        names = ", ".join(f"{pattern!r} ({why})" for pattern, why in refused.items())
        text = f"the broker at {self._connection.address} refuses the subscription {names}: correct its ACL"
        _log.warning("%s", text)
        if not self._complaining:
            self._complaining = True
            self._received.put(TransportError(text))

    def _accepted(self) -> tuple[str, ...]:
        """The broker accepts the connection (in the library's callback); the patterns to renew first."""
        self._acknowledging = self._attempt
        return self._subscriptions.patterns


def _named(patterns: tuple[str, ...]) -> str:
    more = f" and {len(patterns) - _NAMED} more" if len(patterns) > _NAMED else ""
    return ", ".join(map(repr, patterns[:_NAMED])) + more


def _nothing() -> None:
    """QoS 0 has no acknowledgement."""
