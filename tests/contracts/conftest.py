"""The brokers that every transport must agree on: in memory, amqtt (3.1.1), Mosquitto (3.1.1, 5, 5 over TLS)."""

from __future__ import annotations

import abc
import contextlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.memory_transport import MemoryBroker, MemoryTransport
from edge_sdk.paho_transport import PahoTransport
from edge_sdk.transport import Connection, Received, Transport, Will
from server_sdk.broker import EmbeddedBroker, find_mosquitto

WAIT_S = 10.0
NOTHING_S = 0.15
BACKENDS = ("memory", "amqtt", "mosquitto-3.1.1", "mosquitto-5", "mosquitto-tls")
DYNAMIC_SECURITY = "mosquitto_dynamic_security.so"
AMQTT_USERS = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": False}}

Client = MemoryTransport | PahoTransport


class Relay:
    """A network between a client and the broker that can be taken away, or swallow what is sent."""

    def __init__(self, target: int) -> None:
        self.target, self.port = target, 0
        self.flowing = threading.Event()
        self.flowing.set()
        self.start()

    def start(self) -> None:
        self.sockets = [socket.create_server(("127.0.0.1", self.port))]
        self.port = self.sockets[0].getsockname()[1]
        threading.Thread(target=self._accept, args=(self.sockets,), daemon=True).start()

    def stop(self) -> None:
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self, sockets: list[socket.socket]) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = sockets[0].accept()[0]
                far = socket.create_connection(("127.0.0.1", self.target))
                sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.flowing.is_set():
                    sink.sendall(data)
            if self.flowing.is_set():
                sink.shutdown(socket.SHUT_WR)


class Backend(abc.ABC):
    """A broker and the clients of one test.

    Attributes:
        resends: the broker sends again what was not acknowledged to it.
        reports: it says that it refuses a PUBLISH.
        expires: it gives up a client that is silent.
        widest: what a client may subscribe to when something is forbidden.
        networked: there is a connection that can be slow, silent or broken by an error.
        nothing_s: after so long without a message there is none.
    """

    resends = reports = expires = networked = True
    widest = "#"
    nothing_s = NOTHING_S

    def __init__(self) -> None:
        self.clients: list[Client] = []

    @abc.abstractmethod
    def make(self, client_id: str, *, relayed: bool = False, **limits: Any) -> Client: ...

    @abc.abstractmethod
    def stop(self) -> None: ...

    @abc.abstractmethod
    def start(self) -> None:
        """Bring the broker back with an empty memory."""

    @abc.abstractmethod
    def forbid(self, *patterns: str) -> None:
        """Restart the broker so that nobody may subscribe to these patterns or publish on what they match.

        What is not forbidden begins with ``ok/``.
        """

    @abc.abstractmethod
    def limit(self, max_packet_bytes: int) -> None:
        """Restart the broker so that it ends the connection of a client that sends more; before clients exist."""

    @abc.abstractmethod
    def cut(self, client: Client) -> None:
        """Break one connection."""

    @abc.abstractmethod
    def part(self, client: Client) -> None:
        """Keep a relayed client from the broker."""

    @abc.abstractmethod
    def join(self, client: Client) -> None:
        """Let it connect again."""

    def settle(self, client: Client) -> None:
        """Wait until the broker has read what the client sent it."""
        client.publish("settled", b"")
        self.eventually(lambda: not client._in_flight and not client._pending)

    def open(self, client_id: str, *patterns: str, will: Will | None = None, **options: Any) -> Client:
        client = self.make(client_id, **options)
        self.clients.append(client)
        client.open(will)
        for pattern in patterns:
            client.subscribe(pattern)
        return client

    def close(self) -> None:
        for client in self.clients:
            client.close()

    @staticmethod
    def take(client: Transport, number: int, *, acknowledge: bool = True) -> list[Received]:
        """The next messages, as many as told."""
        messages: list[Received] = []
        deadline = time.monotonic() + WAIT_S
        while len(messages) < number and time.monotonic() < deadline:
            message = client.receive(deadline - time.monotonic())
            if message is not None:
                messages.append(message)
                if acknowledge:
                    message.acknowledge()
        assert len(messages) == number
        return messages

    @staticmethod
    def eventually(condition: Callable[[], bool]) -> None:
        deadline, pause = time.monotonic() + WAIT_S, threading.Event()
        while not condition():
            assert time.monotonic() < deadline, "the condition never held"
            pause.wait(0.01)


class Memory(Backend):
    networked = False
    nothing_s = 0.0  # what was published has arrived

    def __init__(self) -> None:
        super().__init__()
        self.broker = MemoryBroker()

    def make(self, client_id: str, *, relayed: bool = False, keepalive_s: int = 1, **limits: Any) -> Client:
        return MemoryTransport(self.broker, client_id, **limits)

    def stop(self) -> None:
        self.broker.stop()

    def start(self) -> None:
        self.broker.start(lose_sessions=True)

    def forbid(self, *patterns: str) -> None:
        self.broker.forbid(*patterns)
        self.stop()
        self.start()

    def settle(self, client: Client) -> None:
        """Everything arrives at once."""

    def limit(self, max_packet_bytes: int) -> None:
        """There is no packet here."""

    def cut(self, client: Client) -> None:
        self.broker.drop(client._client_id)

    def part(self, client: Client) -> None:
        self.broker.stop()

    def join(self, client: Client) -> None:
        self.broker.start()


class Real(Backend):
    """Paho and a broker of its own process; ``credentials`` and ``port`` are those of the clients' connections."""

    def __init__(self, broker: EmbeddedBroker, protocol: str, port: int = 0, **credentials: Any) -> None:
        super().__init__()
        self.protocol = protocol
        self.credentials = credentials
        self.broker = broker.start()
        self.port = port or broker.port
        self.relay = Relay(self.port)

    def make(self, client_id: str, *, relayed: bool = False, **limits: Any) -> Client:
        port = self.relay.port if relayed else self.port
        options = {**self.credentials, **limits}
        return PahoTransport(Connection(self.broker.host, port, protocol=self.protocol, **options), client_id)

    def stop(self) -> None:
        self.broker.kill()

    def start(self) -> None:
        self.broker.restart()

    def replace(self, **options: Any) -> None:
        """Another broker in the same place."""
        self.broker.kill()
        self.broker.stop()
        self.broker = EmbeddedBroker(self.broker.kind, self.broker.port, **options).start()

    def cut(self, client: Client) -> None:
        client._link.cut()

    def part(self, client: Client) -> None:
        self.relay.stop()

    def join(self, client: Client) -> None:
        self.relay.start()

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.relay.stop()
            self.broker.kill()
            self.broker.stop()


class Amqtt(Real):
    """Its clients have a name: for those without one it keeps no sessions."""

    resends = reports = expires = False
    widest = "ok/#"

    def __init__(self) -> None:
        super().__init__(EmbeddedBroker("amqtt", plugins=AMQTT_USERS), "3.1.1", user="ward")

    def limit(self, max_packet_bytes: int) -> None:
        """It has no such limit."""

    def forbid(self, *patterns: str) -> None:
        if not patterns:
            self.replace(plugins=AMQTT_USERS)
            return
        rights = {"acl": {"ward": ["ok/#"]}, "publish_acl": {"ward": ["ok/#"]}}
        self.replace(plugins={**AMQTT_USERS, "amqtt.plugins.topic_checking.TopicAccessControlListPlugin": rights})


class Mosquitto(Real):
    def __init__(self, folder: Path, protocol: str, authority: Path | None = None) -> None:
        self.folder = folder
        self.reports = protocol == "5"
        self.options: tuple[str, ...] = ()
        port, credentials = 0, {}
        if authority is not None:
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                port = sock.getsockname()[1]
            files = {"cafile": "ca.pem", "certfile": "broker.pem", "keyfile": "broker.key"}
            lines = (f"{option} {authority / name}" for option, name in files.items())
            self.options = (f"listener {port} 127.0.0.1", *lines, "require_certificate true")
            names = {"ca_file": "ca.pem", "cert_file": "client.pem", "key_file": "client.key"}
            credentials = {option: str(authority / name) for option, name in names.items()}
        super().__init__(EmbeddedBroker("mosquitto", options=self.options), protocol, port, **credentials)

    def limit(self, max_packet_bytes: int) -> None:
        self.replace(options=(f"max_packet_size {max_packet_bytes}", *self.options))

    def forbid(self, *patterns: str) -> None:
        if not patterns:
            self.replace(options=self.options)
            return
        plugin = next(Path("/usr/lib").rglob(DYNAMIC_SECURITY), None)  # an acl_file refuses nothing
        if plugin is None:
            pytest.skip(f"{DYNAMIC_SECURITY} is not installed")
        rules = self.folder / "rules.json"
        rules.write_text(json.dumps(_rules(patterns)))
        self.replace(options=(f"plugin {plugin}", f"plugin_opt_config_file {rules}", *self.options))


def _rules(forbidden: Sequence[str]) -> dict[str, Any]:
    """The configuration of Mosquitto's dynamic security plugin that forbids patterns to clients without user."""
    kinds = ("subscribeLiteral", "publishClientSend")
    rules = [{"acltype": kind, "topic": topic, "priority": 1, "allow": False} for topic in forbidden for kind in kinds]
    return {
        "defaultACLAccess": dict.fromkeys(
            ("publishClientSend", "publishClientReceive", "subscribe", "unsubscribe"), True
        ),
        "anonymousGroup": "everybody",
        "groups": [{"groupname": "everybody", "roles": [{"rolename": "ward"}]}],
        "roles": [{"rolename": "ward", "acls": rules}],
        "clients": [],
    }


def _backend(name: str, request: pytest.FixtureRequest, folder: Path) -> Backend:
    kind, _, variant = name.partition("-")
    if kind == "memory":
        return Memory()
    if kind == "amqtt":
        return Amqtt()
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    if variant != "tls":
        return Mosquitto(folder, variant)
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    return Mosquitto(folder, "5", request.getfixturevalue("authority"))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    with contextlib.closing(_backend(request.param, request, tmp_path)) as backend:
        yield backend


@pytest.fixture
def networked(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Backend]]:
    """All that have a network at once, for what takes long."""
    with contextlib.ExitStack() as stack:
        names = [name for name in BACKENDS if name != "memory"]
        yield [stack.enter_context(contextlib.closing(_backend(name, request, tmp_path))) for name in names]
