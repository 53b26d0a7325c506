"""What only a network has: versions, refusals, TLS, brokers that are absent, mute, stopped or mad."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from paho.mqtt.client import Client

from edge_sdk.errors import ConfigError, TransportError
from edge_sdk.paho_transport import PahoTransport
from edge_sdk.transport import Connection, Received
from server_sdk.broker import EmbeddedBroker, find_mosquitto

WAIT_S = 10.0
ACCEPTED_5, ACCEPTED_311 = b"\x20\x03\x00\x00\x00", b"\x20\x02\x00\x00"

needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def eventually(condition: Callable[[], bool]) -> None:
    deadline, pause = time.monotonic() + WAIT_S, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        pause.wait(0.01)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def opened(transport: PahoTransport) -> Iterator[PahoTransport]:
    try:
        transport.open()
        yield transport
    finally:
        transport.close()


def read_packet(conn: socket.socket) -> tuple[int, bytes]:
    """One MQTT packet of less than 128 bytes: its first byte and its body."""
    head = conn.recv(2, socket.MSG_WAITALL)
    if len(head) < 2:
        raise ConnectionError
    return head[0], conn.recv(head[1], socket.MSG_WAITALL) if head[1] else b""


def publish_packet(topic: bytes, payload: bytes, mid: int) -> bytes:
    body = struct.pack("!H", len(topic)) + topic + struct.pack("!H", mid) + payload
    return b"\x32" + bytes([len(body)]) + body


class ScriptedBroker:
    """Runs ``script(socket, number of the connection from 1, CONNECT body)`` for each connection."""

    def __init__(self, script: Callable[[socket.socket, int, bytes], None]) -> None:
        self.script = script
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.connects: list[bytes] = []
        self.open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> ScriptedBroker:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self.listener, *self.open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                conn = self.listener.accept()[0]
                self.open.append(conn)
                threading.Thread(target=self._serve, args=(conn,), daemon=True).start()

    def _serve(self, conn: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self.connects.append(read_packet(conn)[1])
            self.script(conn, len(self.connects), self.connects[-1])

    def connection(self, **options: object) -> Connection:
        return Connection("127.0.0.1", self.port, **{"protocol": "3.1.1", "connect_timeout_s": 5.0, **options})


def drain(conn: socket.socket) -> None:
    while conn.recv(4096):
        continue


# ---------------------------------------------------------------- versions


@needs_mosquitto
def test_auto_speaks_mqtt_5_with_mosquitto() -> None:
    with (
        EmbeddedBroker("mosquitto") as broker,
        opened(PahoTransport(Connection(broker.host, broker.port), "a")) as transport,
    ):
        assert transport.protocol == "5"


def test_auto_finds_quickly_that_amqtt_speaks_only_3_1_1() -> None:
    with EmbeddedBroker("amqtt") as broker:
        started = time.monotonic()
        with opened(PahoTransport(Connection(broker.host, broker.port), "a")) as transport:
            assert time.monotonic() - started < 1.5
            assert transport.protocol == "3.1.1"
            transport.subscribe("t")
            transport.publish("t", b"1")
            assert transport.receive(WAIT_S).payload == b"1"


def version_of(connect: bytes) -> int:
    return connect[6]


def bare(connect: bytes) -> bool:
    return connect[10] == 0


def test_auto_falls_back_when_the_broker_closes_without_an_answer() -> None:
    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        if version_of(connect) == 5:
            conn.shutdown(socket.SHUT_RDWR)
            return
        conn.sendall(ACCEPTED_311)
        drain(conn)

    with ScriptedBroker(script) as broker:
        with opened(PahoTransport(broker.connection(protocol="auto"), "a")) as transport:
            assert transport.protocol == "3.1.1"
        assert [version_of(connect) for connect in broker.connects] == [5, 4]


def test_auto_falls_back_when_the_version_is_refused() -> None:
    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        conn.sendall(ACCEPTED_311 if version_of(connect) == 4 else b"\x20\x02\x00\x01")
        drain(conn)

    with ScriptedBroker(script) as broker:
        with opened(PahoTransport(broker.connection(protocol="auto"), "a")) as transport:
            assert transport.protocol == "3.1.1"
        assert len(broker.connects) == 2


def test_a_slow_mqtt_5_broker_is_not_mistaken_for_an_old_one() -> None:
    slow = threading.Event()

    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        slow.wait(0.6)  # longer than the first patience, shorter than the next
        conn.sendall(ACCEPTED_5)
        drain(conn)

    with ScriptedBroker(script) as broker:
        with opened(PahoTransport(broker.connection(protocol="auto"), "a")) as transport:
            assert transport.protocol == "5"
        assert [(version_of(c), bare(c)) for c in broker.connects] == [(5, False), (5, True), (5, False)]


def test_a_chosen_version_that_the_broker_refuses_is_named() -> None:
    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        conn.sendall(b"\x20\x02\x00\x01")

    with ScriptedBroker(script) as broker:
        started = time.monotonic()
        with pytest.raises(TransportError, match="refuses MQTT 5: set protocol to auto"):
            PahoTransport(broker.connection(protocol="5", connect_timeout_s=30), "a").open()
        assert time.monotonic() - started < 5


def test_a_broker_that_refuses_3_1_1_is_not_asked_for_3_1() -> None:
    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        conn.sendall(b"\x20\x02\x00\x01")
        drain(conn)

    with ScriptedBroker(script) as broker:
        with pytest.raises(TransportError, match="Protocol error"):
            PahoTransport(broker.connection(connect_timeout_s=0.5), "a").open()
        assert {(connect[2:6], connect[6]) for connect in broker.connects} == {(b"MQTT", 4)}


# ---------------------------------------------------------------- absent, mute and refusing brokers


def test_a_broker_that_is_not_there_is_named_within_the_timeout() -> None:
    port = free_port()
    transport = PahoTransport(Connection("127.0.0.1", port, connect_timeout_s=0.6), "a")
    started = time.monotonic()
    with pytest.raises(TransportError, match=rf"127\.0\.0\.1:{port} within 0\.6 s \(Connection refused\): start"):
        transport.open()
    assert 0.5 < time.monotonic() - started < 2


def test_a_host_that_does_not_exist_is_an_ordinary_error() -> None:
    for host in ("no-such-host.invalid", "a..b", "x" * 80 + ".invalid"):
        with pytest.raises(TransportError, match="no MQTT broker at"):
            PahoTransport(Connection(host, 1883, connect_timeout_s=0.5), "a").open()


def test_a_mute_server_is_given_up_in_time() -> None:
    with ScriptedBroker(lambda conn, number, connect: drain(conn)) as broker:
        started = time.monotonic()
        with pytest.raises(TransportError, match="does not answer CONNECT"):
            PahoTransport(broker.connection(protocol="auto", connect_timeout_s=1.0), "a").open()
        assert time.monotonic() - started < 2


def test_open_waits_for_a_broker_that_starts_later() -> None:
    port = free_port()
    transport = PahoTransport(Connection("127.0.0.1", port, connect_timeout_s=20), "a")
    with EmbeddedBroker(port=port) as broker:
        broker.kill()
        opening = threading.Thread(target=transport.open)
        opening.start()
        eventually(lambda: transport._cause == "Connection refused")
        broker.restart()
        opening.join(WAIT_S)
        assert transport.generation == 1
        transport.close()


@needs_mosquitto
@pytest.mark.parametrize("protocol", ["5", "3.1.1", "auto"])
def test_user_and_password(tmp_path: Path, protocol: str) -> None:
    if shutil.which("mosquitto_passwd") is None:
        pytest.skip("mosquitto_passwd is not installed")
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-c", "-b", str(passwords), "ward", "secret"], check=True)
    for path in (passwords, *list(passwords.parents)[:2]):
        path.chmod(0o755)  # the broker reads it as another user
    options = ("allow_anonymous false", f"password_file {passwords}")
    with EmbeddedBroker("mosquitto", options=options) as broker:
        right = Connection(broker.host, broker.port, user="ward", password="secret", protocol=protocol)
        with opened(PahoTransport(right, "a")) as transport:
            transport.publish("t", b"1")
        wrong = Connection(broker.host, broker.port, user="ward", password="guess", protocol=protocol)
        started = time.monotonic()
        with pytest.raises(TransportError, match=r"refuses user 'ward' .*: correct user and password") as caught:
            PahoTransport(wrong, "a").open()
        assert time.monotonic() - started < 5
        assert "guess" not in str(caught.value)
        with pytest.raises(TransportError, match="refuses a client without user"):
            PahoTransport(Connection(broker.host, broker.port, protocol=protocol), "a").open()


def test_a_refused_subscription_is_reported_and_not_renewed() -> None:
    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        conn.sendall(ACCEPTED_311)
        while True:
            kind, body = read_packet(conn)
            if kind == 0x82:
                conn.sendall(b"\x90\x03" + body[:2] + (b"\x80" if b"forbidden" in body else b"\x01"))

    with ScriptedBroker(script) as broker, opened(PahoTransport(broker.connection(), "a")) as transport:
        with pytest.raises(TransportError, match="refuses the subscription 'forbidden': correct its ACL"):
            transport.subscribe("forbidden")
        transport.subscribe("allowed")
        assert transport._subscriptions.patterns == ("allowed",)


def test_a_refused_renewal_is_asked_for_again_while_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_sdk.mqtt_subscriptions.ASK_AGAIN_S", 0.2)
    asked: list[bytes] = []
    answers = [b"\x01\x80", b"\x80", b"\x01"]

    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        conn.sendall(ACCEPTED_311)
        while True:
            kind, body = read_packet(conn)
            if kind & 0xF0 == 0x30:
                if number == 1:
                    conn.shutdown(socket.SHUT_RDWR)
                conn.sendall(b"\x40\x02" + body[3:5])
            elif kind == 0x82 and number == 1:
                conn.sendall(b"\x90\x03" + body[:2] + b"\x01")
            elif kind == 0x82:
                answer = answers[len(asked)]
                asked.append(body[2:])
                conn.sendall(b"\x90" + bytes([2 + len(answer)]) + body[:2] + answer)

    with ScriptedBroker(script) as broker, opened(PahoTransport(broker.connection(), "a")) as transport:
        transport.subscribe("one")
        transport.subscribe("two")
        transport.publish("t", b"end this connection")
        for _ in range(2):
            with pytest.raises(TransportError, match=r"refuses the subscription 'two' .*: correct its ACL"):
                transport.receive(WAIT_S)
            assert transport.refused_patterns == ("two",)
        eventually(lambda: transport.refused_patterns == ())
        assert asked == [b"\x00\x03one\x01\x00\x03two\x01", b"\x00\x03two\x01", b"\x00\x03two\x01"]
        assert transport._subscriptions.patterns == ("one", "two")
        assert transport.receive(0) is None


def test_an_unsubscription_that_was_not_confirmed_is_sent_again_on_the_next_connection() -> None:
    ended: list[tuple[int, bytes]] = []

    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        conn.sendall(ACCEPTED_311)
        while True:
            kind, body = read_packet(conn)
            if kind == 0x82:
                conn.sendall(b"\x90" + bytes([2 + body.count(b"\x01")]) + body[:2] + b"\x01" * body.count(b"\x01"))
            elif kind == 0xA2:
                ended.append((number, body[2:]))
                if number == 1:
                    conn.shutdown(socket.SHUT_RDWR)
                else:
                    conn.sendall(b"\xb0\x02" + body[:2])

    with ScriptedBroker(script) as broker, opened(PahoTransport(broker.connection(), "a")) as transport:
        transport.subscribe("one")
        transport.subscribe("two", "three")
        transport.unsubscribe("two", "three")
        eventually(lambda: not transport._subscriptions.unwanted)
        assert ended == [(number, b"\x00\x03two\x00\x05three") for number in (1, 2)]
        transport._link.cut()
        eventually(lambda: transport.generation == 3)
        transport.subscribe("four")
        assert len(ended) == 2
        assert transport._subscriptions.patterns == ("one", "four")


def test_a_broker_that_does_not_confirm_is_named() -> None:
    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        conn.sendall(ACCEPTED_311)
        drain(conn)

    with (
        ScriptedBroker(script) as broker,
        opened(PahoTransport(broker.connection(connect_timeout_s=0.3), "a")) as transport,
    ):
        with pytest.raises(TransportError, match="does not confirm 'a', 'b', 'c' and 2 more: is it overloaded"):
            transport.unsubscribe(*"abcde")
        with pytest.raises(TransportError, match="does not confirm 'a', 'b', 'c': is it overloaded"):
            transport.subscribe(*"abc")


def test_a_refused_unsubscription_is_an_error_and_not_sent_again() -> None:
    ended: list[bytes] = []

    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        conn.sendall(ACCEPTED_5)
        while True:
            kind, body = read_packet(conn)
            if kind == 0xA2:
                ended.append(body[3:])
                conn.sendall(b"\xb0\x05" + body[:2] + b"\x00\x11\x87")  # no such subscription; not authorized

    with ScriptedBroker(script) as broker, opened(PahoTransport(broker.connection(protocol="5"), "a")) as transport:
        with pytest.raises(TransportError, match="refuses to end 'one', 'two': correct its ACL"):
            transport.unsubscribe("one", "two")
        transport._link.cut()
        eventually(lambda: transport.generation == 2)
        with pytest.raises(TransportError):
            transport.unsubscribe("six", "ten")
        assert ended == [b"\x00\x03one\x00\x03two", b"\x00\x03six\x00\x03ten"]


# ---------------------------------------------------------------- limits


@needs_mosquitto
def test_the_limit_of_an_mqtt_5_broker_is_taken_over() -> None:
    with (
        EmbeddedBroker("mosquitto", options=("max_packet_size 5000",)) as broker,
        opened(PahoTransport(Connection(broker.host, broker.port), "a")) as transport,
    ):
        transport.subscribe("t")
        assert transport.max_packet_bytes == 5000
        with pytest.raises(TransportError, match="above the limit of 5000"):
            transport.publish("t", bytes(5000))
        transport.publish("t", bytes(5000 - 65))
        assert len(transport.receive(WAIT_S).payload) == 5000 - 65
        assert transport.generation == 1


@needs_mosquitto
def test_a_packet_above_a_hidden_limit_is_explained(caplog: pytest.LogCaptureFixture) -> None:
    with EmbeddedBroker("mosquitto", options=("max_packet_size 5000",)) as broker:
        connection = Connection(broker.host, broker.port, protocol="3.1.1")
        transport = PahoTransport(connection, "a")
        transport.open()
        transport.publish("t", bytes(9000))
        eventually(lambda: "a packet may be above its limit" in caplog.text)
        transport.close()


@needs_mosquitto
def test_a_stopped_broker_slows_the_sender_and_then_refuses() -> None:
    with EmbeddedBroker("mosquitto") as broker:
        connection = Connection(broker.host, broker.port, max_queued=5, connect_timeout_s=0.5)
        transport = PahoTransport(connection, "a")
        transport.open()
        broker.process.send_signal(signal.SIGSTOP)
        for _ in range(5):
            transport.publish("t", b"1")
        started = time.monotonic()
        with pytest.raises(TransportError, match=r"5 messages wait .* too slow: send less"):
            transport.publish("t", b"1")
        assert 0.4 < time.monotonic() - started < 2
        started = time.monotonic()
        transport.close()
        assert time.monotonic() - started < 2
        assert not transport._thread.is_alive()
        broker.process.send_signal(signal.SIGCONT)


@needs_mosquitto
def test_a_stopped_broker_with_a_full_socket_does_not_hold_up_close() -> None:
    with EmbeddedBroker("mosquitto") as broker:
        transport = PahoTransport(Connection(broker.host, broker.port), "a")
        transport.open()
        broker.process.send_signal(signal.SIGSTOP)
        transport.publish("t", bytes(15_000_000))
        started = time.monotonic()
        transport.close()
        assert time.monotonic() - started < 2
        broker.process.send_signal(signal.SIGCONT)


@needs_mosquitto
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_messages_beyond_the_receive_queue_stay_with_the_broker(protocol: str) -> None:
    number = 150
    with EmbeddedBroker("mosquitto") as broker:
        small = Connection(broker.host, broker.port, protocol=protocol, max_received=5)
        with (
            opened(PahoTransport(small, "small")) as reader,
            opened(PahoTransport(Connection(broker.host, broker.port), "writer")) as writer,
        ):
            reader.subscribe("t")
            for i in range(number):
                writer.publish("t", bytes([i]))
            eventually(lambda: not writer._in_flight and not writer._pending)
            seen: set[int] = set()
            deadline = time.monotonic() + WAIT_S
            while len(seen) < number and time.monotonic() < deadline:
                assert reader._received.qsize() <= 10
                message = reader.receive(1.0)
                if message is not None:
                    seen.add(message.payload[0])
                    message.acknowledge()
            assert len(seen) == number


def test_messages_left_with_the_broker_are_fetched_without_pause() -> None:
    number = 30
    acknowledged: set[int] = set()

    def script(conn: socket.socket, count: int, connect: bytes) -> None:
        left = sorted(set(range(1, number + 1)) - acknowledged)
        conn.sendall(ACCEPTED_311 + b"".join(publish_packet(b"t", bytes([mid]), mid) for mid in left))
        while True:
            kind, body = read_packet(conn)
            if kind == 0x40:
                acknowledged.add(int.from_bytes(body, "big"))

    with ScriptedBroker(script) as broker, opened(PahoTransport(broker.connection(max_received=1), "a")) as transport:
        started = time.monotonic()
        while len(acknowledged) < number:  # two arrive on each connection, the rest is left
            eventually(lambda: not transport._received.empty() or len(acknowledged) == number)
            eventually(lambda: transport._overflowed or number - len(acknowledged) <= 2)
            while (message := transport.receive(0)) is not None:
                message.acknowledge()
        assert transport.generation >= number / 4
        assert time.monotonic() - started < WAIT_S


def test_a_receiver_that_acknowledges_nothing_does_not_connect_without_pause() -> None:
    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        conn.sendall(ACCEPTED_311 + b"".join(publish_packet(b"t", b"1", mid) for mid in range(1, 7)))
        while read_packet(conn)[0] != 0xE0:
            continue
        conn.shutdown(socket.SHUT_RDWR)

    with (
        ScriptedBroker(script) as broker,
        opened(PahoTransport(broker.connection(max_received=1), "a")) as transport,
    ):
        eventually(lambda: transport._overflowed)
        receive(transport).acknowledge()
        deadline, pause = time.monotonic() + 1.0, threading.Event()
        while time.monotonic() < deadline:
            if transport._overflowed:
                while transport.receive(0) is not None:
                    continue
            pause.wait(0.005)
        assert 1 < len(broker.connects) < 8


def test_what_was_left_on_a_lost_connection_ends_no_other() -> None:
    go = threading.Event()

    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        conn.sendall(ACCEPTED_311)
        if number == 1:
            conn.sendall(b"".join(publish_packet(b"t", b"1", mid) for mid in range(1, 7)))
            go.wait(WAIT_S)
            conn.shutdown(socket.SHUT_RDWR)
        drain(conn)

    with ScriptedBroker(script) as broker, opened(PahoTransport(broker.connection(max_received=1), "a")) as transport:
        eventually(lambda: transport._overflowed)
        go.set()
        eventually(lambda: transport.generation == 2)
        assert [receive(transport).payload for _ in range(2)] == [b"1", b"1"]
        assert transport.receive(1.2) is None
        assert transport.generation == 2


@needs_mosquitto
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_what_is_held_back_fills_the_window_of_mosquitto(protocol: str) -> None:
    with EmbeddedBroker("mosquitto", options=("max_inflight_messages 20",)) as broker:
        connection = Connection(broker.host, broker.port, protocol=protocol)
        with opened(PahoTransport(connection, "reader")) as reader, opened(PahoTransport(connection, "b")) as writer:
            reader.subscribe("t")
            for i in range(25):
                writer.publish("t", bytes([i]))
            held = [receive(reader) for _ in range(20)]
            if protocol == "3.1.1":
                assert reader.receive(0.3) is None
                held[0].acknowledge()
            assert receive(reader).payload == bytes([20])  # under MQTT 5 our Receive Maximum is the window
            assert reader.generation == 1


# ---------------------------------------------------------------- a network thread that nothing ends


def receive(transport: PahoTransport) -> Received:
    message = transport.receive(WAIT_S)
    assert message is not None
    return message


def test_a_topic_that_is_no_utf8_is_refused_acknowledged_and_harmless() -> None:
    acknowledged: list[bytes] = []

    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        conn.sendall(ACCEPTED_311 + publish_packet(b"\xff\xfe", b"bad", 7) + publish_packet(b"good", b"1", 8))
        while True:
            kind, body = read_packet(conn)
            if kind == 0x40:
                acknowledged.append(body)

    with ScriptedBroker(script) as broker, opened(PahoTransport(broker.connection(), "a")) as transport:
        message = receive(transport)
        assert (message.topic, message.payload) == ("good", b"1")
        assert transport.rejected == 1
        eventually(lambda: acknowledged == [b"\x00\x07"])
        message.acknowledge()
        eventually(lambda: acknowledged == [b"\x00\x07", b"\x00\x08"])
        assert transport.generation == 1


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x32\x03\xff\xff\x00",  # a PUBLISH whose topic is longer than the packet
        b"\x32\x00",  # an empty one
        b"\x90\x00",  # an empty SUBACK
        b"\x40\x00",  # an empty PUBACK
        b"\xf0\xff\xff\xff\xff\xff",  # no packet at all
        b"\x20\x02\x00\x00" * 2,  # CONNACK again
        b"\x62\x02\x00\x01",  # PUBREL out of the blue
    ],
)
def test_garbage_from_the_broker_leads_to_a_new_connection(garbage: bytes) -> None:
    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        conn.sendall(ACCEPTED_311)
        if number == 1:
            conn.sendall(garbage)
            conn.sendall(b"\xf0\x00")
        else:
            conn.sendall(publish_packet(b"t", b"alive", 1))
        drain(conn)

    with ScriptedBroker(script) as broker, opened(PahoTransport(broker.connection(), "a")) as transport:
        assert receive(transport).payload == b"alive"
        assert transport.generation == 2


def test_a_defect_in_the_library_leads_to_a_new_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        EmbeddedBroker("amqtt") as broker,
        opened(PahoTransport(Connection(broker.host, broker.port, protocol="3.1.1"), "a")) as transport,
    ):
        transport.subscribe("t")
        healthy = transport._link.loop

        def defect(timeout_s: float) -> bool:
            monkeypatch.setattr(transport._link, "loop", healthy)
            raise RuntimeError("a defect")

        monkeypatch.setattr(transport._link, "loop", defect)
        eventually(lambda: transport.generation == 2)
        transport.publish("t", b"1")
        assert receive(transport).payload == b"1"


def test_messages_under_way_are_sent_again_before_later_ones() -> None:
    got: list[tuple[int, bytes]] = []

    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        conn.sendall(ACCEPTED_311)
        while True:
            kind, body = read_packet(conn)
            if kind & 0xF0 == 0x30:
                got.append((number, body[-1:]))
                if number == 1:
                    if len(got) == 2:
                        conn.shutdown(socket.SHUT_RDWR)
                        return
                else:
                    conn.sendall(b"\x40\x02" + body[3:5])

    with ScriptedBroker(script) as broker, opened(PahoTransport(broker.connection(), "a")) as transport:
        transport.publish("t", b"1")
        transport.publish("t", b"2")
        eventually(lambda: not transport._connected)
        transport.publish("t", b"3")
        eventually(lambda: len(got) == 5)
        assert got == [(1, b"1"), (1, b"2"), (2, b"1"), (2, b"2"), (2, b"3")]
        eventually(lambda: not transport._in_flight)


def test_subscriptions_are_renewed_before_messages_under_way_are_sent_again() -> None:
    kinds: list[int] = []

    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        conn.sendall(ACCEPTED_311)
        while True:
            kind, body = read_packet(conn)
            if number == 2:
                kinds.append(kind & 0xF0)
            if kind == 0x82:
                conn.sendall(b"\x90\x03" + body[:2] + b"\x01")
            elif number == 1:
                conn.shutdown(socket.SHUT_RDWR)
            else:
                conn.sendall(b"\x40\x02" + body[3:5])

    with ScriptedBroker(script) as broker, opened(PahoTransport(broker.connection(), "a")) as transport:
        transport.subscribe("down")
        transport.publish("t", b"1")
        eventually(lambda: transport.generation == 2 and not transport._in_flight)
        assert kinds == [0x80, 0x30]


def test_a_subscription_made_while_the_others_are_renewed_is_not_forgotten() -> None:
    asked, answer, late = threading.Event(), threading.Event(), threading.Event()

    def script(conn: socket.socket, number: int, connect: bytes) -> None:
        conn.sendall(ACCEPTED_311)
        while True:
            kind, body = read_packet(conn)
            if kind == 0x82:
                if number == 2 and b"first" in body:
                    asked.set()
                    answer.wait(WAIT_S)
                if number == 2 and b"second" in body:
                    late.set()
                conn.sendall(b"\x90\x03" + body[:2] + b"\x01")
            elif kind & 0xF0 == 0x30 and number == 1:
                conn.shutdown(socket.SHUT_RDWR)

    with ScriptedBroker(script) as broker, opened(PahoTransport(broker.connection(), "a")) as transport:
        transport.subscribe("first")
        transport.publish("t", b"1")
        assert asked.wait(WAIT_S)
        transport.subscribe("second")
        answer.set()
        assert late.wait(WAIT_S)
        assert transport.generation == 2


def test_only_the_network_thread_writes_to_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    writers: set[str] = set()
    write = Client.loop_write

    def watched(client: Client) -> object:
        writers.add(threading.current_thread().name)
        return write(client)

    monkeypatch.setattr(Client, "loop_write", watched)
    with (
        EmbeddedBroker("amqtt") as broker,
        opened(PahoTransport(Connection(broker.host, broker.port, protocol="3.1.1"), "a")) as transport,
    ):
        transport.subscribe("t")
        transport.publish("t", b"1")
        receive(transport).acknowledge()
    assert writers == {"mqtt-a"}


# ---------------------------------------------------------------- TLS


@pytest.fixture
def tls_port(authority: Path) -> Iterator[int]:
    port = free_port()
    options = (
        f"listener {port} 127.0.0.1",
        f"cafile {authority}/ca.pem",
        f"certfile {authority}/broker.pem",
        f"keyfile {authority}/broker.key",
        "require_certificate true",
    )
    with EmbeddedBroker("mosquitto", options=options):
        yield port


@needs_mosquitto
@needs_openssl
class TestTls:
    def files(self, authority: Path, **changes: str | None) -> dict[str, str | None]:
        names = {"ca_file": "ca.pem", "cert_file": "client.pem", "key_file": "client.key", **changes}
        return {key: name and str(authority / name) for key, name in names.items()}

    @pytest.mark.parametrize("protocol", ["5", "3.1.1"])
    def test_mutual_tls_carries_messages(self, authority: Path, tls_port: int, protocol: str) -> None:
        connection = Connection("127.0.0.1", tls_port, protocol=protocol, **self.files(authority))
        with opened(PahoTransport(connection, "a")) as transport:
            transport.subscribe("t")
            transport.publish("t", bytes(300_000))
            assert len(receive(transport).payload) == 300_000

    def test_a_broker_of_another_authority_is_refused_at_once(self, authority: Path, tls_port: int) -> None:
        connection = Connection("127.0.0.1", tls_port, **self.files(authority, ca_file="stranger.pem"))
        started = time.monotonic()
        with pytest.raises(TransportError, match=rf"127\.0\.0\.1:{tls_port} is not trusted .* set ca_file"):
            PahoTransport(connection, "a").open()
        assert time.monotonic() - started < 5

    def test_a_client_without_certificate_is_refused(self, authority: Path, tls_port: int) -> None:
        files = self.files(authority, cert_file=None, key_file=None)
        connection = Connection("127.0.0.1", tls_port, connect_timeout_s=1.0, **files)
        with pytest.raises(TransportError, match=str(tls_port)):
            PahoTransport(connection, "a").open()

    def test_a_plain_client_at_a_tls_port_gets_the_hint(self, authority: Path, tls_port: int) -> None:
        connection = Connection("127.0.0.1", tls_port, connect_timeout_s=1.0)
        with pytest.raises(TransportError, match="is it a TLS port"):
            PahoTransport(connection, "a").open()


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    connection = Connection("127.0.0.1", 1, ca_file=str(tmp_path / "absent.pem"))
    transport = PahoTransport(connection, "a")
    with pytest.raises(TransportError, match=r"absent\.pem"):
        transport.open()
    transport.close()


# ---------------------------------------------------------------- Connection


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": ""},
        {"host": "two words"},
        {"port": 0},
        {"port": 70_000},
        {"protocol": "4"},
        {"keepalive_s": 0},
        {"connect_timeout_s": 0.0},
        {"max_queued": 0},
        {"max_received": 70_000},
        {"max_packet_bytes": 10},
        {"cert_file": "a.pem"},
        {"password": "secret"},
    ],
)
def test_a_connection_refuses_impossible_options(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Connection(**{"host": "broker", **wrong})


def test_a_connection_does_not_show_its_password() -> None:
    connection = Connection("broker", user="ward", password="secret")
    assert "secret" not in repr(connection)
    assert not connection.secure
    assert Connection("::1", 1883).address == "[::1]:1883"


def test_the_socket_does_not_wait_for_more_to_send() -> None:
    with (
        EmbeddedBroker("amqtt") as broker,
        opened(PahoTransport(Connection(broker.host, broker.port, protocol="3.1.1"), "a")) as transport,
    ):
        sock = transport._link._client.socket()
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
