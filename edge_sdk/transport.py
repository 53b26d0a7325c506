"""What carries bytes between a device and the server: MQTT's topics, QoS 1, retained messages and last will.

A transport delivers *at least once* and in order per connection. It stands for one client with a stable id
and reconnects by itself for as long as it is open. Its user acknowledges a message once it is stored; what
was not acknowledged comes again after a reconnect where the broker kept the session. Delivery end to end is
the client's business (it resends until the server replies), so nothing here promises more than MQTT does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from edge_sdk.errors import ConfigError, TransportError

__all__ = [
    "Connection",
    "Received",
    "Transport",
    "Will",
    "check_pattern",
    "check_topic",
    "matches",
]

_MAX_PACKET_BYTES = 268_435_460  # MQTT 5.0 section 2.1.4: 5 bytes of header before at most 268 435 455
_MAX_TEXT_BYTES = 65_535


@dataclass(frozen=True)
class Connection:
    """How to reach a broker.

    Attributes:
        host: name or address; with TLS the name that the broker's certificate carries.
        port: 1 to 65535; TLS is usual on 8883.
        user, password: credentials, or None for an anonymous connection.
        ca_file: PEM file of the authority that signed the broker's certificate; None takes the system's.
        cert_file, key_file: PEM files of this client's certificate and key (mutual TLS); both or neither.
        tls: encrypt; implied by ``ca_file`` and ``cert_file``.
        protocol: "5", "3.1.1", or "auto": 5 first, 3.1.1 when the broker does not speak it.
        keepalive_s: a silent connection is given up after about 1.5 times this, 1 to 65535.
        connect_timeout_s: how long ``open`` tries, and how long ``publish`` and ``subscribe`` wait for a
            broker that is connected but slow.
        max_queued: messages that may wait for the broker's acknowledgement, 1 to 65535.
        max_received: messages that may wait for ``receive``, 1 to 65535 (MQTT 5: Receive Maximum).
        max_packet_bytes: largest MQTT packet sent, and received where the broker speaks MQTT 5.

    Raises:
        ConfigError: a value out of its range, or options that contradict each other.
    """

    host: str
    port: int = 1883
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    tls: bool = False
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    keepalive_s: int = 30
    connect_timeout_s: float = 30.0
    max_queued: int = 100
    max_received: int = 1000
    max_packet_bytes: int = 16 * 1024 * 1024

    def __post_init__(self) -> None:
        if not self.host or any(character.isspace() for character in self.host):
            raise ConfigError(f"host {self.host!r} is no host name: give the broker's name or address")
        if self.protocol not in ("auto", "5", "3.1.1"):
            raise ConfigError(f"protocol {self.protocol!r} is unknown: use auto, 5 or 3.1.1")
        for name, low, high in (
            ("port", 1, 65_535),
            ("keepalive_s", 1, 65_535),
            ("connect_timeout_s", 0.1, 86_400),
            ("max_queued", 1, 65_535),
            ("max_received", 1, 65_535),
            ("max_packet_bytes", 1024, _MAX_PACKET_BYTES),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}: choose a value from {low} to {high}")
        if (self.cert_file is None) != (self.key_file is None):
            raise ConfigError("cert_file and key_file belong together: give both or neither")
        if self.password is not None and self.user is None:
            raise ConfigError("a password without a user: give the user, too")

    @property
    def secure(self) -> bool:
        """Whether the connection is encrypted."""
        return self.tls or self.ca_file is not None or self.cert_file is not None

    @property
    def address(self) -> str:
        """``host:port``, as errors name it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Will:
    """What the broker publishes (QoS 1) when this client vanishes without a goodbye."""

    topic: str
    payload: bytes
    retain: bool = True


@dataclass(frozen=True)
class Received:
    """A message from the broker.

    Attributes:
        topic: as published. A broker may deliver a topic of an older subscription: look at it.
        payload: the bytes, not copied.
        retained: it was published before the subscription and is kept by the broker.
        acknowledge: call it once, from any thread, when the message is stored or refused; after a reconnect
            it does nothing, since the broker delivers the message again.
    """

    topic: str
    payload: bytes
    retained: bool
    acknowledge: Callable[[], None] = field(repr=False)


class Transport(Protocol):
    """One client of a broker. Every method may be called from any thread; one thread receives."""

    @property
    def generation(self) -> int:
        """Connections established so far; a change means: reconnected, subscriptions are renewed, resend."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection to the broker now, as far as this end knows."""

    @property
    def max_packet_bytes(self) -> int:
        """Largest packet (topic, payload, 64 bytes more) that ``publish`` takes; may shrink in ``open``."""

    @property
    def refused_messages(self) -> int:
        """Messages that the broker refused to pass on (MQTT 5: PUBACK with a reason, by its ACL or a quota).

        They are not sent again, and the first is logged with its topic. A broker that speaks MQTT 3.1.1 drops
        such a message in silence, and this stays 0.
        """

    @property
    def refused_patterns(self) -> tuple[str, ...]:
        """Subscriptions that were made and that the broker does not grant now; ``receive`` raises for them."""

    def open(self, will: Will | None = None) -> None:
        """Connect, and keep connected until ``close``.

        The broker's session is taken up where it still has one: what it kept for this client id since an
        earlier connection, of an earlier process too, arrives before anything is subscribed.

        Raises:
            TransportError: no broker within ``connect_timeout_s``, or one that refuses for good.
        """

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand a message over for delivery at least once (QoS 1); returns before it is delivered.

        A full queue (``max_queued``) is waited for while the broker is connected. A packet that is too large
        is refused here: a broker would end the connection at each attempt to send it.

        Raises:
            TransportError: a packet above ``max_packet_bytes``, a topic that is none, not open; a full queue
                without a connection, or with a broker that takes nothing for ``connect_timeout_s``.
        """

    def subscribe(self, *patterns: str) -> None:
        """Receive what is published on these topic patterns (``+``, ``#``) from now on, and after every reconnect.

        All are asked for in one packet. Without a connection it returns at once, and ``receive`` tells what the
        broker says later. A broker may also grant what its ACL forbids and then send nothing, as Mosquitto does
        with an ``acl_file`` (its dynamic security plugin refuses).

        Raises:
            TransportError: a pattern is none, then nothing is subscribed to; or the broker refuses some, which the
                error names: the others hold.
        """

    def unsubscribe(self, *patterns: str) -> None:
        """Receive no more of what is published on these patterns, now and after reconnects; one packet for all.

        What the broker or this transport held before may still come, and so does what another pattern receives.
        A pattern that was not subscribed to is no error. Without a connection the next one ends the subscription.

        Raises:
            TransportError: the transport is not open; or the broker does not confirm, or refuses.
        """

    def receive(self, timeout_s: float) -> Received | None:
        """The next message, or None when none came within ``timeout_s``.

        Not to receive for long is harmless to the connection. But a broker sends only so many messages that are
        not acknowledged, and whoever holds back that many acknowledgements waits in vain for the next message:
        ``max_received`` under MQTT 5, the broker's own limit under 3.1.1 (Mosquitto: ``max_inflight_messages``,
        20 unless configured).

        Raises:
            TransportError: the transport is not open; or the broker refuses a subscription that it had granted,
                or that was made without a connection. That is raised once each time the broker was asked: at
                every reconnect, and while connected about every 30 s. Other messages can still be received.
        """

    def close(self) -> None:
        """Say goodbye (no last will) and stop; gives messages under way one second. May be called again."""


def check_topic(topic: str) -> None:
    """Refuse what cannot be published on.

    Raises:
        TransportError: empty, too long, a wildcard or a NUL in it.
    """
    if not 1 <= len(topic.encode(errors="surrogatepass")) <= _MAX_TEXT_BYTES:
        raise TransportError(f"a topic has 1 to {_MAX_TEXT_BYTES} bytes, this one has {len(topic)} characters")
    if any(character in topic for character in "+#\0"):
        raise TransportError(f"topic {topic!r} has a wildcard or NUL: publish on a plain topic")


def check_pattern(pattern: str) -> None:
    """Refuse what cannot be subscribed to (MQTT 3.1.1 section 4.7).

    Raises:
        TransportError: empty, too long, ``#`` before the end, a wildcard beside other characters.
    """
    levels = pattern.split("/")
    if (
        not 1 <= len(pattern.encode(errors="surrogatepass")) <= _MAX_TEXT_BYTES
        or "\0" in pattern
        or any(len(level) > 1 and ("+" in level or "#" in level) for level in levels)
        or "#" in levels[:-1]
    ):
        raise TransportError(f"pattern {pattern[:80]!r} is none: '+' stands for a whole level, '#' for the whole rest")


def matches(pattern: str, topic: str) -> bool:
    """Whether a subscription to ``pattern`` receives ``topic`` (MQTT 3.1.1 section 4.7)."""
    wanted, given = pattern.split("/"), topic.split("/")
    if given[0].startswith("$") and wanted[0] in ("+", "#"):
        return False
    if wanted[-1] == "#":
        wanted = wanted[:-1]
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(want in ("+", level) for want, level in zip(wanted, given, strict=True))
