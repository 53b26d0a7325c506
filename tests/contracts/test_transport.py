"""One contract, every transport: in memory, and paho over amqtt (3.1.1) and Mosquitto (3.1.1 and 5)."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from edge_sdk.errors import TransportError
from edge_sdk.memory_transport import MemoryBroker, MemoryTransport
from edge_sdk.paho_transport import PahoTransport
from edge_sdk.transport import Connection, Received, Transport, Will
from server_sdk.broker import EmbeddedBroker, find_mosquitto

WAIT_S = 10.0
NOTHING_S = 0.15

Client = MemoryTransport | PahoTransport


class Relay:
    """A network between a client and the broker that can be taken away."""

    def __init__(self, target: int) -> None:
        self.target, self.port = target, 0
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

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


class Backend:
    """A broker and the clients of one test."""

    keeps_sessions = True

    def __init__(self) -> None:
        self.clients: list[Client] = []

    def make(self, client_id: str, *, relayed: bool = False, **limits: int) -> Client:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Bring the broker back with an empty memory."""
        raise NotImplementedError

    def cut(self, client: Client) -> None:
        """Break one connection."""
        raise NotImplementedError

    def part(self, client: Client) -> None:
        """Keep a relayed client from the broker."""
        raise NotImplementedError

    def join(self, client: Client) -> None:
        """Let it connect again."""
        raise NotImplementedError

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


class Memory(Backend):
    def __init__(self) -> None:
        super().__init__()
        self.broker = MemoryBroker()

    def make(self, client_id: str, *, relayed: bool = False, **limits: int) -> Client:
        return MemoryTransport(self.broker, client_id, **limits)

    def stop(self) -> None:
        self.broker.stop()

    def start(self) -> None:
        self.broker.start(lose_sessions=True)

    def cut(self, client: Client) -> None:
        self.broker.drop(client._client_id)

    def part(self, client: Client) -> None:
        self.broker.stop()

    def join(self, client: Client) -> None:
        self.broker.start()


class Real(Backend):
    def __init__(self, kind: str, protocol: str) -> None:
        super().__init__()
        if kind == "mosquitto" and find_mosquitto() is None:
            pytest.skip("mosquitto is not installed")
        self.protocol = protocol
        self.keeps_sessions = kind == "mosquitto"
        self.broker = EmbeddedBroker(kind).start()
        self.relay = Relay(self.broker.port)

    def make(self, client_id: str, *, relayed: bool = False, **limits: int) -> Client:
        port = self.relay.port if relayed else self.broker.port
        return PahoTransport(Connection(self.broker.host, port, protocol=self.protocol, **limits), client_id)

    def stop(self) -> None:
        self.broker.kill()

    def start(self) -> None:
        self.broker.restart()

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
            self.broker.stop()


@pytest.fixture(params=["memory", "amqtt", "mosquitto-3.1.1", "mosquitto-5"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    kind, _, protocol = request.param.partition("-")
    backend = Memory() if kind == "memory" else Real(kind, protocol or "3.1.1")
    yield backend
    backend.close()


def take(client: Transport, number: int, *, acknowledge: bool = True) -> list[Received]:
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


def eventually(condition: Callable[[], bool]) -> None:
    deadline, pause = time.monotonic() + WAIT_S, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        pause.wait(0.01)


def test_a_message_arrives_once_with_its_topic_and_bytes(backend: Backend) -> None:
    server, device = backend.open("server", "up/+"), backend.open("device")
    device.publish("up/a", b"\x00\xff bytes")
    (message,) = take(server, 1)
    assert (message.topic, message.payload, message.retained) == ("up/a", b"\x00\xff bytes", False)
    assert type(message.payload) is bytes
    assert server.receive(NOTHING_S) is None
    assert device.receive(0) is None


def test_the_generation_counts_connections(backend: Backend) -> None:
    client = backend.make("device")
    assert client.generation == 0
    backend.clients.append(client)
    client.open()
    assert client.generation == 1


def test_a_retained_message_meets_later_subscribers_until_it_is_cleared(backend: Backend) -> None:
    server, early = backend.open("server"), backend.open("early", "model")
    server.publish("model", b"1", retain=True)
    server.publish("model", b"2", retain=True)
    assert [(m.payload, m.retained) for m in take(early, 2)] == [(b"1", False), (b"2", False)]
    late = backend.open("late", "model")
    assert [(m.payload, m.retained) for m in take(late, 1)] == [(b"2", True)]
    server.publish("model", b"", retain=True)
    take(early, 1)
    latest = backend.open("latest", "model")
    assert latest.receive(NOTHING_S) is None


def test_the_last_will_is_published_after_a_crash_and_retained(backend: Backend) -> None:
    server = backend.open("server", "up/a/state")
    device = backend.open("device", will=Will("up/a/state", b"offline"))
    device.kill()
    assert take(server, 1)[0].payload == b"offline"
    late = backend.open("late", "up/a/state")
    (message,) = take(late, 1)
    assert (message.payload, message.retained) == (b"offline", True)


def test_a_goodbye_leaves_no_will(backend: Backend) -> None:
    server = backend.open("server", "#")
    device = backend.open("device", will=Will("up/a/state", b"offline"))
    device.publish("up/a/state", b"gone", retain=True)
    device.close()
    assert take(server, 1)[0].payload == b"gone"
    assert server.receive(NOTHING_S) is None


def test_wildcards(backend: Backend) -> None:
    one = backend.open("one", "f/up/+/step")
    rest = backend.open("rest", "f/down/#")
    sender = backend.open("sender")
    for topic in (
        "f/up/a/step",
        "f/up/a/state",
        "f/up/a/b/step",
        "f/up/step",
        "f/down/a/step",
        "f/down",
        "f",
    ):
        sender.publish(topic, topic.encode())
    sender.publish("f/up/z/step", b"last")
    assert [m.topic for m in take(one, 2)] == ["f/up/a/step", "f/up/z/step"]
    assert [m.topic for m in take(rest, 2)] == ["f/down/a/step", "f/down"]
    assert one.receive(NOTHING_S) is None
    assert rest.receive(0) is None


def test_the_order_of_a_burst_is_kept(backend: Backend) -> None:
    server, device = backend.open("server", "up"), backend.open("device")
    number = 300  # above every window and queue: the sender is slowed down, nothing is refused
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(lambda: [device.publish("up", str(i).encode()) for i in range(number)])
        assert [int(m.payload) for m in take(server, number)] == list(range(number))
        sending.result(WAIT_S)


def test_many_threads_may_publish(backend: Backend) -> None:
    server, device = backend.open("server", "up/#"), backend.open("device")

    def send(thread: int) -> None:
        for i in range(40):
            device.publish(f"up/{thread}", str(i).encode())

    with ThreadPoolExecutor(4) as pool:
        sending = [pool.submit(send, thread) for thread in range(4)]
        messages = take(server, 160)
        for future in sending:
            future.result(WAIT_S)
    for thread in range(4):
        assert [int(m.payload) for m in messages if m.topic == f"up/{thread}"] == list(range(40))


def test_what_is_not_acknowledged_comes_again_after_a_reconnect(backend: Backend) -> None:
    if not backend.keeps_sessions:
        pytest.skip("amqtt keeps nothing for anonymous clients")
    server, device = backend.open("server", "up"), backend.open("device")
    for i in range(4):
        device.publish("up", str(i).encode())
    first = take(server, 4, acknowledge=False)
    first[0].acknowledge()
    first[2].acknowledge()
    server.publish("up", b"mark")  # once it is back the broker has read the acknowledgements before it
    take(server, 1, acknowledge=False)
    backend.cut(server)
    eventually(lambda: server.generation == 2)
    assert [m.payload for m in take(server, 3)] == [b"1", b"3", b"mark"]
    assert server.receive(NOTHING_S) is None


def test_an_acknowledgement_of_the_previous_connection_does_nothing(backend: Backend) -> None:
    if not backend.keeps_sessions:
        pytest.skip("amqtt keeps nothing for anonymous clients")
    server, device = backend.open("server", "up"), backend.open("device")
    device.publish("up", b"1")
    (stale,) = take(server, 1, acknowledge=False)
    backend.cut(server)
    eventually(lambda: server.generation == 2)
    take(server, 1, acknowledge=False)
    stale.acknowledge()
    server.publish("up", b"mark")  # once it is back the broker has read what was sent before it
    take(server, 1, acknowledge=False)
    backend.cut(server)
    eventually(lambda: server.generation == 3)
    assert [m.payload for m in take(server, 2)] == [b"1", b"mark"]


def test_a_restart_of_the_broker_renews_connection_and_subscriptions(backend: Backend) -> None:
    server, device = backend.open("server", "up/+", "other"), backend.open("device")
    backend.stop()
    backend.start()
    eventually(lambda: server.generation == 2 and device.generation == 2)
    device.publish("up/a", b"1")
    device.publish("other", b"2")
    assert [m.payload for m in take(server, 2)] == [b"1", b"2"]


def test_a_subscription_made_while_disconnected_holds_after_the_reconnect(backend: Backend) -> None:
    server, device = backend.open("server"), backend.open("device")
    backend.stop()
    eventually(lambda: not server._connected and not device._connected)
    server.subscribe("up")
    backend.start()
    eventually(lambda: server.generation == 2 and device.generation == 2)
    device.publish("up", b"1")
    assert take(server, 1)[0].payload == b"1"


def test_the_queue_of_a_disconnected_client_is_bounded_and_sent_in_order(backend: Backend) -> None:
    server = backend.open("server", "up")
    device = backend.open("device", max_queued=30, relayed=True)
    backend.part(device)
    eventually(lambda: not device._connected)
    for i in range(30):
        device.publish("up", str(i).encode())
    with pytest.raises(TransportError, match=r"30 messages wait .* not connected: .* raise max_queued"):
        device.publish("up", b"too many")
    backend.join(device)
    assert [int(m.payload) for m in take(server, 30)] == list(range(30))
    assert server.receive(NOTHING_S) is None


def test_a_message_of_two_megabytes(backend: Backend) -> None:
    server, device = backend.open("server", "up"), backend.open("device")
    payload = bytes(range(256)) * 8192
    device.publish("up", payload)
    assert take(server, 1)[0].payload == payload


def test_a_packet_above_the_limit_is_refused_and_harms_nothing(backend: Backend) -> None:
    server, device = backend.open("server", "up"), backend.open("device", max_packet_bytes=4096)
    assert device.max_packet_bytes == 4096
    with pytest.raises(TransportError, match="above the limit of 4096: send smaller chunks"):
        device.publish("up", bytes(4096))
    device.publish("up", bytes(4096 - 66))
    assert len(take(server, 1)[0].payload) == 4096 - 66
    assert device.generation == 1


def test_topics_and_patterns_that_are_none_are_refused(backend: Backend) -> None:
    device = backend.open("device")
    for topic in ("", "a/+", "a/#", "a\0b", "x" * 70_000):
        with pytest.raises(TransportError, match="topic"):
            device.publish(topic, b"1")
    for pattern in ("", "a/b#", "a/#/c", "a+/b", "a\0"):
        with pytest.raises(TransportError, match="pattern"):
            device.subscribe(pattern)


def test_close_delivers_what_is_under_way(backend: Backend) -> None:
    server, device = backend.open("server", "up"), backend.open("device")
    for i in range(50):
        device.publish("up", str(i).encode())
    device.close()
    assert len(take(server, 50)) == 50


def test_close_may_be_called_again_and_ends_everything(backend: Backend) -> None:
    client = backend.open("device")
    client.close()
    client.close()
    for use in (lambda: client.publish("up", b""), lambda: client.subscribe("up"), lambda: client.receive(1)):
        with pytest.raises(TransportError, match="not open"):
            use()
    with pytest.raises(TransportError, match="make a new one"):
        client.open()


def test_a_transport_that_was_not_opened_says_so_and_may_be_closed(backend: Backend) -> None:
    client = backend.make("device")
    with pytest.raises(TransportError, match="not open"):
        client.publish("up", b"")
    with pytest.raises(TransportError, match="not open"):
        client.receive(0)
    client.close()


def test_close_is_fast_when_the_broker_is_dead(backend: Backend) -> None:
    device = backend.open("device")
    backend.stop()
    device.publish("up", b"1")
    started = time.monotonic()
    device.close()
    assert time.monotonic() - started < 2


def test_close_wakes_the_receiver(backend: Backend) -> None:
    client = backend.open("device", "up")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.receive, 60.0)
        eventually(lambda: waiting.running())
        started = time.monotonic()
        client.close()
        with contextlib.suppress(TransportError):  # it had not begun to wait
            assert waiting.result(WAIT_S) is None
    assert time.monotonic() - started < 2


def test_receive_waits_as_long_as_it_is_told(backend: Backend) -> None:
    client = backend.open("device", "up")
    started = time.monotonic()
    assert client.receive(0.2) is None
    assert 0.19 < time.monotonic() - started < 1
