"""The contract of every transport: messages, order, bounds, the end."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from edge_sdk.errors import TransportError

if TYPE_CHECKING:
    from conftest import Backend


def test_a_message_arrives_once_with_its_topic_and_bytes(backend: Backend) -> None:
    server, device = backend.open("server", "up/+"), backend.open("device")
    device.publish("up/a", b"\x00\xff bytes")
    (message,) = backend.take(server, 1)
    assert (message.topic, message.payload, message.retained) == ("up/a", b"\x00\xff bytes", False)
    assert type(message.payload) is bytes
    assert server.receive(backend.nothing_s) is None
    assert device.receive(0) is None


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
    assert [m.topic for m in backend.take(one, 2)] == ["f/up/a/step", "f/up/z/step"]
    assert [m.topic for m in backend.take(rest, 2)] == ["f/down/a/step", "f/down"]
    assert one.receive(backend.nothing_s) is None
    assert rest.receive(0) is None


def test_the_order_of_a_burst_is_kept(backend: Backend) -> None:
    server, device = backend.open("server", "up"), backend.open("device")
    number = 300  # above every window and queue: the sender is slowed down, nothing is refused
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(lambda: [device.publish("up", str(i).encode()) for i in range(number)])
        assert [int(m.payload) for m in backend.take(server, number)] == list(range(number))
        sending.result(10.0)


def test_many_threads_may_publish(backend: Backend) -> None:
    server, device = backend.open("server", "up/#"), backend.open("device")

    def send(thread: int) -> None:
        for i in range(40):
            device.publish(f"up/{thread}", str(i).encode())

    with ThreadPoolExecutor(4) as pool:
        sending = [pool.submit(send, thread) for thread in range(4)]
        messages = backend.take(server, 160)
        for future in sending:
            future.result(10.0)
    for thread in range(4):
        assert [int(m.payload) for m in messages if m.topic == f"up/{thread}"] == list(range(40))


def test_the_queue_of_a_disconnected_client_is_bounded_and_sent_in_order(backend: Backend) -> None:
    server = backend.open("server", "up")
    device = backend.open("device", max_queued=30, relayed=True)
    backend.part(device)
    backend.eventually(lambda: not device.connected)
    for i in range(30):
        device.publish("up", str(i).encode())
    with pytest.raises(TransportError, match=r"30 messages wait .* not connected: .* raise max_queued"):
        device.publish("up", b"too many")
    backend.join(device)
    backend.eventually(lambda: device.connected)
    assert [int(m.payload) for m in backend.take(server, 30)] == list(range(30))
    assert server.receive(backend.nothing_s) is None


def test_a_message_of_two_megabytes(backend: Backend) -> None:
    server, device = backend.open("server", "up"), backend.open("device")
    payload = bytes(range(256)) * 8192
    device.publish("up", payload)
    assert backend.take(server, 1)[0].payload == payload


def test_a_packet_above_the_limit_is_refused_and_harms_nothing(backend: Backend) -> None:
    server, device = backend.open("server", "up"), backend.open("device", max_packet_bytes=4096)
    assert device.max_packet_bytes == 4096
    with pytest.raises(TransportError, match="above the limit of 4096: send smaller chunks"):
        device.publish("up", bytes(4096))
    device.publish("up", bytes(4096 - 66))
    assert len(backend.take(server, 1)[0].payload) == 4096 - 66
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
    assert len(backend.take(server, 50)) == 50


def test_close_may_be_called_again_and_ends_everything(backend: Backend) -> None:
    client = backend.open("device")
    assert client.connected
    client.close()
    client.close()
    assert not client.connected
    for use in (lambda: client.publish("up", b""), lambda: client.subscribe("up"), lambda: client.receive(1)):
        with pytest.raises(TransportError, match="not open"):
            use()
    with pytest.raises(TransportError, match="make a new one"):
        client.open()


def test_a_transport_that_was_not_opened_says_so_and_may_be_closed(backend: Backend) -> None:
    client = backend.make("device")
    assert not client.connected
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
        backend.eventually(lambda: waiting.running())
        started = time.monotonic()
        client.close()
        with contextlib.suppress(TransportError):  # it had not begun to wait
            assert waiting.result(10.0) is None
    assert time.monotonic() - started < 2


def test_receive_waits_as_long_as_it_is_told(backend: Backend) -> None:
    client = backend.open("device", "up")
    started = time.monotonic()
    assert client.receive(0.2) is None
    assert 0.19 < time.monotonic() - started < 1
