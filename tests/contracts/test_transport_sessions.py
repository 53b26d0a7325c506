"""The contract of every transport: connections that break, what the broker keeps, wills, silence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from edge_sdk.errors import TransportError
from edge_sdk.transport import Will

if TYPE_CHECKING:
    from conftest import Backend


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
    assert [(m.payload, m.retained) for m in backend.take(early, 2)] == [(b"1", False), (b"2", False)]
    late = backend.open("late", "model")
    assert [(m.payload, m.retained) for m in backend.take(late, 1)] == [(b"2", True)]
    server.publish("model", b"", retain=True)
    backend.take(early, 1)
    latest = backend.open("latest", "model")
    assert latest.receive(backend.nothing_s) is None


def test_the_last_will_is_published_after_a_crash_and_retained(backend: Backend) -> None:
    server = backend.open("server", "up/a/state")
    device = backend.open("device", will=Will("up/a/state", b"offline"))
    device.kill()
    assert backend.take(server, 1)[0].payload == b"offline"
    late = backend.open("late", "up/a/state")
    (message,) = backend.take(late, 1)
    assert (message.payload, message.retained) == (b"offline", True)


def test_a_goodbye_leaves_no_will(backend: Backend) -> None:
    server = backend.open("server", "#")
    device = backend.open("device", will=Will("up/a/state", b"offline"))
    device.publish("up/a/state", b"gone", retain=True)
    device.close()
    assert backend.take(server, 1)[0].payload == b"gone"
    assert server.receive(backend.nothing_s) is None


def test_what_is_not_acknowledged_comes_again_after_a_reconnect(backend: Backend) -> None:
    if not backend.resends:
        pytest.skip("amqtt never sends again what was not acknowledged")
    server, device = backend.open("server", "up"), backend.open("device")
    for i in range(4):
        device.publish("up", str(i).encode())
    first = backend.take(server, 4, acknowledge=False)
    first[0].acknowledge()
    first[2].acknowledge()
    backend.settle(server)
    backend.cut(server)
    backend.eventually(lambda: server.generation == 2)
    assert [m.payload for m in backend.take(server, 2)] == [b"1", b"3"]
    assert server.receive(backend.nothing_s) is None


def test_an_acknowledgement_of_the_previous_connection_does_nothing(backend: Backend) -> None:
    if not backend.resends:
        pytest.skip("amqtt never sends again what was not acknowledged")
    server, device = backend.open("server", "up"), backend.open("device")
    device.publish("up", b"1")
    (stale,) = backend.take(server, 1, acknowledge=False)
    backend.cut(server)
    backend.eventually(lambda: server.generation == 2)
    backend.take(server, 1, acknowledge=False)
    stale.acknowledge()
    backend.settle(server)
    backend.cut(server)
    backend.eventually(lambda: server.generation == 3)
    assert [m.payload for m in backend.take(server, 1)] == [b"1"]


def test_a_restart_of_the_broker_renews_connection_and_subscriptions(backend: Backend) -> None:
    server, device = backend.open("server", "up/+", "other"), backend.open("device")
    backend.stop()
    backend.start()
    backend.eventually(lambda: server.generation == 2 and device.generation == 2)
    device.publish("up/a", b"1")
    device.publish("other", b"2")
    assert [m.payload for m in backend.take(server, 2)] == [b"1", b"2"]


def test_a_subscription_made_while_disconnected_holds_after_the_reconnect(backend: Backend) -> None:
    server, device = backend.open("server"), backend.open("device")
    backend.stop()
    backend.eventually(lambda: not server._connected and not device._connected)
    server.subscribe("up")
    backend.start()
    backend.eventually(lambda: server.generation == 2 and device.generation == 2)
    device.publish("up", b"1")
    assert backend.take(server, 1)[0].payload == b"1"


def test_after_unsubscribe_nothing_new_arrives_and_the_other_patterns_go_on(backend: Backend) -> None:
    server, device = backend.open("server", "up/+/step", "up/+/state"), backend.open("device")
    server.subscribe("up/b/step", "up/c/step")
    server.unsubscribe("up/+/step", "up/c/step")
    for topic in ("up/a/step", "up/c/step", "up/b/step", "up/a/state"):
        device.publish(topic, b"1")
    assert [m.topic for m in backend.take(server, 2)] == ["up/b/step", "up/a/state"]
    assert server.receive(backend.nothing_s) is None


@pytest.mark.parametrize("forgetful", [False, True])
def test_an_unsubscription_outlives_connections(backend: Backend, forgetful: bool) -> None:
    server, device = backend.open("server", "up/a", "up/b"), backend.open("device")
    server.unsubscribe("up/a")
    if forgetful:
        backend.stop()
        backend.start()
        backend.eventually(lambda: device.generation == 2)
    else:
        backend.cut(server)
    backend.eventually(lambda: server.generation == 2)
    device.publish("up/a", b"1")
    device.publish("up/b", b"2")
    assert [m.topic for m in backend.take(server, 1)] == ["up/b"]
    assert server.receive(backend.nothing_s) is None


def test_an_unsubscription_without_a_connection_holds_in_the_session_that_the_broker_kept(backend: Backend) -> None:
    server, device = backend.open("server", "up/a", "up/b", relayed=True), backend.open("device")
    backend.part(server)
    backend.eventually(lambda: not server._connected)
    server.unsubscribe("up/a")
    backend.join(server)
    backend.eventually(lambda: server.generation == 2)
    backend.settle(server)
    device.publish("up/a", b"1")
    device.publish("up/b", b"2")
    assert [m.topic for m in backend.take(server, 1)] == ["up/b"]
    assert server.receive(backend.nothing_s) is None


def test_what_was_unsubscribed_can_be_subscribed_again_and_brings_what_is_retained(backend: Backend) -> None:
    server, device = backend.open("server", "up/+"), backend.open("device")
    server.unsubscribe("up/+")
    device.publish("up/a", b"1", retain=True)
    backend.settle(device)
    server.subscribe("up/+")
    (message,) = backend.take(server, 1)
    assert (message.payload, message.retained) == (b"1", True)
    backend.cut(server)
    backend.eventually(lambda: server.generation == 2)
    device.publish("up/b", b"2")
    while backend.take(server, 1)[0].topic != "up/b":
        continue


def test_what_is_subscribed_again_before_the_reconnect_is_kept(backend: Backend) -> None:
    server, device = backend.open("server", "up/a"), backend.open("device")
    backend.stop()
    backend.eventually(lambda: not server._connected)
    server.unsubscribe("up/a")
    server.subscribe("up/a")
    backend.start()
    backend.eventually(lambda: server.generation == 2 and device.generation == 2)
    backend.settle(server)
    device.publish("up/a", b"1")
    assert backend.take(server, 1)[0].payload == b"1"


def test_to_unsubscribe_from_what_was_not_subscribed_is_no_error(backend: Backend) -> None:
    server, device = backend.open("server", "up/a"), backend.open("device")
    server.unsubscribe("never", "up/+")
    server.unsubscribe()
    device.publish("up/a", b"1")
    assert backend.take(server, 1)[0].payload == b"1"
    server.close()
    with pytest.raises(TransportError, match="not open"):
        server.unsubscribe("up/a")


def test_what_comes_for_an_absent_client_meets_its_next_life(backend: Backend) -> None:
    device = backend.open("device", "gone")
    first = backend.open("server", "up", will=Will("gone", b"", retain=False))
    first.kill()
    backend.take(device, 1)
    for i in range(3):
        device.publish("up", str(i).encode())
    second = backend.open("server")
    assert second.generation == 1
    device.publish("up", b"3")  # the subscription is of the session
    arrived: list[bytes] = []
    while len(set(arrived)) < 4:
        arrived.append(backend.take(second, 1)[0].payload)
    # At least once, and in order (MQTT 3.1.1, 4.3.2 and 4.6): amqtt may send the first again, or behind the second.
    first_times = list(dict.fromkeys(arrived))
    assert (first_times if backend.resends else sorted(first_times)) == [b"0", b"1", b"2", b"3"]


def test_what_was_not_acknowledged_meets_the_next_life(backend: Backend) -> None:
    if not backend.resends:
        pytest.skip("amqtt never sends again what was not acknowledged")
    first, device = backend.open("server", "up"), backend.open("device")
    device.publish("up", b"1")
    backend.take(first, 1, acknowledge=False)
    first.kill()
    second = backend.open("server")
    assert backend.take(second, 1)[0].payload == b"1"


def test_a_broker_without_the_session_has_nothing_and_serves_again(backend: Backend) -> None:
    server, device = backend.open("server", "up"), backend.open("device")
    device.publish("up", b"lost")
    backend.take(server, 1, acknowledge=False)
    device.publish("other", b"retained", retain=True)
    backend.settle(device)
    backend.stop()
    backend.start()
    backend.eventually(lambda: server.generation == 2 and device.generation == 2)
    server.subscribe("other")
    device.publish("up", b"new")
    assert [m.payload for m in backend.take(server, 1)] == [b"new"]
    assert server.receive(backend.nothing_s) is None


def test_a_renewed_subscription_brings_the_retained_message_again(backend: Backend) -> None:
    server, device = backend.open("server"), backend.open("device", "model")
    server.publish("model", b"1", retain=True)
    backend.take(device, 1)
    backend.settle(device)
    backend.cut(device)
    backend.eventually(lambda: device.generation == 2)
    (message,) = backend.take(device, 1)
    assert (message.payload, message.retained) == (b"1", True)


def test_the_last_will_is_published_when_the_connection_breaks_and_can_be_taken_back(backend: Backend) -> None:
    server = backend.open("server", "up/a/state")
    device = backend.open("device", will=Will("up/a/state", b"offline"))
    device.publish("up/a/state", b"online", retain=True)
    backend.take(server, 1)
    backend.cut(device)
    backend.eventually(lambda: device.generation == 2)
    assert backend.take(server, 1)[0].payload == b"offline"
    device.publish("up/a/state", b"online", retain=True)
    assert backend.take(server, 1)[0].payload == b"online"
    late = backend.open("late", "up/a/state")
    assert backend.take(late, 1)[0].payload == b"online"


def test_a_blocked_consumer_keeps_its_connection_and_a_silent_network_is_noticed(networked: list[Backend]) -> None:
    opened = []
    for backend in networked:
        server = backend.open("server", "state")
        blocked = backend.open("blocked", "down", keepalive_s=1)
        silent = backend.open("silent", keepalive_s=1, relayed=True, will=Will("state", b"offline"))
        for i in range(15):
            server.publish("down", str(i).encode())
        backend.relay.flowing.clear()
        opened.append((backend, server, blocked, silent))
    for backend, server, _, silent in opened:
        if backend.expires:  # with the keepalive of the client that does not receive
            assert backend.take(server, 1)[0].payload == b"offline"
        backend.eventually(lambda client=silent: not client._connected)
        backend.relay.flowing.set()
    for backend, _, blocked, silent in opened:
        backend.eventually(lambda client=silent: client.generation == 2)
        assert [int(m.payload) for m in backend.take(blocked, 15)] == list(range(15))
        assert blocked.generation == 1


def test_an_error_in_a_callback_does_not_end_the_network_thread(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not backend.networked:
        pytest.skip("in memory nothing calls back")
    client, device = backend.make("server"), backend.open("device")
    backend.clients.append(client)
    healthy, failures = client._take, []

    def defect(*arguments: object) -> None:
        if not failures:
            failures.append(arguments)
            raise RuntimeError("a defect")
        healthy(*arguments)

    monkeypatch.setattr(client, "_take", defect)
    client.open()
    client.subscribe("up")
    device.publish("up", b"1")
    backend.eventually(lambda: client.generation == 2)
    device.publish("up", b"2")
    expected = [b"1", b"2"] if backend.resends else [b"2"]
    assert [m.payload for m in backend.take(client, len(expected))] == expected
    assert len(failures) == 1
