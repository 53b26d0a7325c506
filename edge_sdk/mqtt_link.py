"""What the MQTT transport needs of a client library, and how it finds the version that a broker speaks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal, Protocol

from edge_sdk.transport import Connection

__all__ = ["ANSWER_S", "Answer", "Ending", "Link", "LinkError", "Plan", "Version", "refusal"]

Version = Literal["5", "3.1.1"]
Ending = Literal["lost", "left", "final", "silent", "unsupported", "understood"]

ANSWER_S = 3.0
"""Seconds for the CONNACK, and again for the SUBACK of the renewed subscriptions."""

_HUSH_S = 0.3  # a broker that is silent for so long may not understand MQTT 5
_REFUSED_FOR_GOOD = frozenset(
    (
        "Bad user name or password",
        "Not authorized",
        "Client identifier not valid",
        "Banned",
        "Bad authentication method",
    )
)


@dataclass(frozen=True)
class Answer:
    """A CONNACK: ``reason`` is None for an accepted connection, else its name in MQTT 5 (table 3-1)."""

    reason: str | None
    max_packet_bytes: int | None = None
    receive_maximum: int | None = None


@dataclass(frozen=True)
class Plan:
    """How to connect.

    Attributes:
        version: of MQTT.
        bare: no properties in CONNECT, only to learn whether the broker knows MQTT 5.
        patience_s: how long to wait for the CONNACK.
        settled: the version was chosen by the user.
    """

    version: Version
    bare: bool = False
    patience_s: float = ANSWER_S
    settled: bool = False

    @classmethod
    def first(cls, connection: Connection) -> Plan:
        """What to try first."""
        if connection.protocol == "auto":
            return cls("5", patience_s=_HUSH_S)
        return cls(connection.protocol, settled=True)

    def after(self, ending: Ending) -> Plan:
        """What to try after a first connection that ended so; this plan if the version is not the cause.

        Some brokers (amqtt) take the properties of an MQTT 5 CONNECT for a client id and wait for ever for
        its rest, but refuse a CONNECT without properties: a silent broker is asked again that way.
        """
        if self.settled or ending in ("lost", "left", "final"):
            return self
        if ending == "understood" or self.version == "3.1.1":
            return Plan("5")
        if ending == "silent" and self.patience_s < ANSWER_S:
            return Plan("5", bare=True)
        return Plan("3.1.1")


class LinkError(Exception):
    """A connection ended or did not come about.

    Attributes:
        kind: "lost": try again; "left": this side ended it to connect anew; "final": that cannot help;
            "silent": no answer; "unsupported": refused, or closed without an answer, as by a broker that does
            not know this version; "understood": it does.
    """

    def __init__(self, cause: str, kind: Ending = "lost") -> None:
        super().__init__(cause)
        self.kind = kind


class Link(Protocol):
    """What is needed of a client library. The attributes are notes that ``loop`` and ``connect`` write."""

    answer: Answer | None
    farewell: str | None
    published: deque[str | None]  # one entry a PUBACK: None, or why the message was refused
    subscribed: dict[int, list[str | None]]  # by packet id, one entry a pattern: None, or why it was refused
    unsubscribed: dict[int, list[str | None]]  # the same; no entries where the broker speaks MQTT 3.1.1
    renewed: tuple[tuple[str, ...], int | None]  # patterns subscribed on connecting, packet id

    def connect(self) -> None:
        """TCP, TLS, send CONNECT; clears the notes.

        Raises:
            LinkError: no such connection.
        """

    def loop(self, timeout_s: float) -> bool:
        """Read and write, at most ``timeout_s``; False when the connection is gone."""

    def publish(self, topic: str, payload: bytes, retain: bool) -> bool:
        """Take a QoS 1 message, to send it after each reconnect until it is acknowledged; False: not now."""

    def subscribe(self, patterns: tuple[str, ...]) -> int | None:
        """Subscribe with QoS 1; the packet id, or None without a connection."""

    def unsubscribe(self, patterns: tuple[str, ...]) -> int | None:
        """Unsubscribe; returns as ``subscribe``."""

    def acknowledge(self, mid: int) -> None:
        """Send a PUBACK."""

    def goodbye(self) -> None:
        """Send DISCONNECT (from any thread); ``loop`` then ends the connection."""

    def cut(self) -> None:
        """End the connection without a DISCONNECT (from any thread)."""


def refusal(reason: str, connection: Connection, client_id: str, plan: Plan) -> LinkError:
    """The error for a CONNACK that refuses; ``reason`` as MQTT 5 (table 3-1) names it."""
    if reason == "Unsupported protocol version":
        if not plan.settled:
            return LinkError(f"it refuses MQTT {plan.version}", "unsupported")
        text = f"the broker at {connection.address} refuses MQTT {plan.version}: set protocol to auto"
        return LinkError(text, "final")
    if reason in _REFUSED_FOR_GOOD:
        who = f"user {connection.user!r}" if connection.user else "a client without user"
        text = f"the broker at {connection.address} refuses {who} with id {client_id!r} ({reason})"
        return LinkError(f"{text}: correct user and password", "final")
    return LinkError(f"it refuses: {reason}")
