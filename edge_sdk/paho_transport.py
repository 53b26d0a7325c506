"""MQTT through paho: the only file that imports it.

paho's own thread is not used: it ends with the first unexpected error, waits in ``sleep`` and keeps no
bounds. ``mqtt_transport`` holds the rules and calls ``Client.loop``.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_sdk.errors import TransportError
from edge_sdk.mqtt_link import Answer, Link, LinkError, Plan
from edge_sdk.mqtt_transport import MqttTransport
from edge_sdk.transport import Connection, Will

__all__ = ["PahoTransport"]

_log = logging.getLogger(__name__)

_SESSION_EXPIRY_S = 3600
_CONNECT_S = 5.0  # TCP and TLS
_VERSIONS = {"5": MQTTProtocolVersion.MQTTv5, "3.1.1": MQTTProtocolVersion.MQTTv311}


class PahoTransport(MqttTransport):
    """A :class:`~edge_sdk.transport.Transport` over MQTT 5, or 3.1.1 where the broker does not know it.

    Args:
        connection: where the broker is, and the limits.
        client_id: stable per device: the broker keeps the session under it. Of two clients with one id each
            throws the other out.
        content_type: told with each message under MQTT 5, or None.
    """

    def __init__(
        self, connection: Connection, client_id: str, *, content_type: str | None = "application/cbor"
    ) -> None:
        super().__init__(connection, client_id)
        self._content_type = content_type

    def _new_link(self, plan: Plan) -> Link:
        return _PahoLink(
            self._connection,
            self._client_id,
            self._will,
            plan,
            content_type=self._content_type,
            accepted=self._accepted,
            take=self._take,
        )


class _PahoLink:
    """A paho client that only notes what happens. Its callbacks lock nothing and raise nothing."""

    def __init__(
        self,
        connection: Connection,
        client_id: str,
        will: Will | None,
        plan: Plan,
        *,
        content_type: str | None,
        accepted: Callable[[], tuple[str, ...]],
        take: Callable[[str | None, bytes, int, bool, int], None],
    ) -> None:
        self.answer: Answer | None = None
        self.farewell: str | None = None
        self.published: deque[str | None] = deque()
        self.subscribed: dict[int, list[str | None]] = {}
        self.unsubscribed: dict[int, list[str | None]] = {}
        self.renewed: tuple[tuple[str, ...], int | None] = ((), None)
        self._address = connection.address
        self._accepted = accepted
        self._take = take
        five = plan.version == "5"
        self._properties: Properties | None = None
        if five and content_type is not None:
            self._properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            self._properties.ContentType = content_type

        self._client = client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=None if five else False,
            protocol=_VERSIONS[plan.version],
            reconnect_on_failure=False,  # or it would go on to MQTT 3.1
            manual_ack=True,
        )
        client.connect_timeout = min(_CONNECT_S, connection.connect_timeout_s)
        client.username_pw_set(connection.user, connection.password)
        if connection.secure:
            try:
                client.tls_set(connection.ca_file, connection.cert_file, connection.key_file)
            except (OSError, ValueError) as exc:
                given = (connection.ca_file, connection.cert_file, connection.key_file)
                files = ", ".join(name for name in given if name is not None)
                raise TransportError(f"TLS files cannot be loaded ({files or 'of the system'}): {exc}") from exc
        if will is not None and not plan.bare:
            client.will_set(will.topic, will.payload, qos=1, retain=will.retain)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        client.on_unsubscribe = self._on_unsubscribe
        client.on_socket_open = _no_delay
        client.on_socket_register_write = _nothing  # else paho writes in the publisher's thread, too
        properties = None
        if five and not plan.bare:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = _SESSION_EXPIRY_S
            properties.ReceiveMaximum = connection.max_received
            properties.MaximumPacketSize = connection.max_packet_bytes
        client.connect_async(
            connection.host,
            connection.port,
            keepalive=connection.keepalive_s,
            clean_start=False,
            properties=properties,
        )

    def connect(self) -> None:
        self.answer, self.farewell, self.renewed = None, None, ((), None)
        self.subscribed.clear()
        self.unsubscribed.clear()
        try:
            self._client.reconnect()
        except ssl.SSLCertVerificationError as exc:
            raise LinkError(
                f"the certificate of {self._address} is not trusted ({exc.verify_message}): set ca_file to "
                "its authority's certificate and host to a name in it",
                "final",
            ) from exc
        except ssl.SSLError as exc:
            raise LinkError(f"TLS fails: {exc.reason or exc}") from exc
        except OSError as exc:
            raise LinkError(exc.strerror or str(exc)) from exc
        except ValueError as exc:
            raise LinkError(str(exc)) from exc

    def loop(self, timeout_s: float) -> bool:
        return self._client.loop(timeout_s) == MQTTErrorCode.MQTT_ERR_SUCCESS

    def publish(self, topic: str, payload: bytes, retain: bool) -> bool:
        while True:
            info = self._client.publish(topic, payload, 1, retain, self._properties)
            # Without a connection (NO_CONN) paho keeps it for the next. QUEUE_SIZE: this packet id waits for
            # its PUBACK since a full turn of the ids, the next call takes another.
            if info.rc != MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
                return True

    def subscribe(self, patterns: tuple[str, ...]) -> int | None:
        return self._client.subscribe([(pattern, 1) for pattern in patterns])[1]

    def unsubscribe(self, patterns: tuple[str, ...]) -> int | None:
        return self._client.unsubscribe(list(patterns))[1]

    def acknowledge(self, mid: int) -> None:
        self._client.ack(mid, 1)

    def goodbye(self) -> None:
        self._client.disconnect()

    def cut(self) -> None:
        sock: Any = self._client.socket()
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError as exc:
                _log.debug("the socket was closed before: %s", exc)

    def _on_connect(
        self, _client: Client, _data: Any, _flags: Any, code: ReasonCode, properties: Properties | None
    ) -> None:
        if not code.is_failure:
            patterns = self._accepted()
            if patterns:
                # Before paho resends what was under way: in a new session replies find a subscription.
                self.renewed = (patterns, self.subscribe(patterns))
        self.answer = Answer(
            code.getName() if code.is_failure else None,
            getattr(properties, "MaximumPacketSize", None),
            getattr(properties, "ReceiveMaximum", None),
        )

    def _on_disconnect(self, _client: Client, _data: Any, flags: Any, code: ReasonCode, _props: Any) -> None:
        if flags.is_disconnect_packet_from_server:
            self.farewell = f"the broker says {code}"
        elif code.getName() != "Unspecified error":
            self.farewell = str(code)

    def _on_publish(self, _client: Client, _data: Any, _mid: int, code: ReasonCode, _props: Any) -> None:
        self.published.append(code.getName() if code.is_failure else None)

    def _on_subscribe(self, _client: Client, _data: Any, mid: int, codes: list[ReasonCode], _props: Any) -> None:
        self.subscribed[mid] = [code.getName() if code.is_failure else None for code in codes]

    def _on_unsubscribe(self, _client: Client, _data: Any, mid: int, codes: list[ReasonCode], _props: Any) -> None:
        self.unsubscribed[mid] = [code.getName() if code.is_failure else None for code in codes]

    def _on_message(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        topic: str | None
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = None
        self._take(topic, bytes(message.payload), message.qos, bool(message.retain), message.mid)


def _no_delay(_client: Client, _data: Any, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _nothing(*_arguments: Any) -> None:
    """Only that it is set matters."""
