"""The contract of every transport: a broker that refuses is heard."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from edge_sdk.errors import TransportError

if TYPE_CHECKING:
    from conftest import Backend


def test_a_refused_subscription_is_an_error_and_not_asked_for_again(backend: Backend) -> None:
    backend.forbid("no/+")
    device, server = backend.open("device", "ok/a"), backend.open("server")
    with pytest.raises(TransportError, match=r"refuses the subscription 'no/\+': correct its ACL"):
        device.subscribe("no/+")
    assert device.refused_patterns == ()
    backend.cut(device)
    backend.eventually(lambda: device.generation == 2)
    server.publish("ok/a", b"1")
    assert backend.take(device, 1)[0].payload == b"1"


def test_of_many_patterns_the_refused_are_named_and_the_others_hold(backend: Backend) -> None:
    backend.forbid("no/a", "no/b")
    device, server = backend.open("device"), backend.open("server")
    with pytest.raises(TransportError, match="refuses the subscription 'no/a', 'no/b': correct its ACL"):
        device.subscribe("ok/a", "no/a", "ok/b", "no/b")
    for topic in ("ok/a", "ok/b"):
        server.publish(topic, b"1")
    assert [m.topic for m in backend.take(device, 2)] == ["ok/a", "ok/b"]
    with pytest.raises(TransportError, match="'#/no' is none"):
        device.subscribe("ok/c", "#/no")
    server.publish("ok/c", b"2")
    assert device.receive(backend.nothing_s) is None


def test_a_refused_renewal_that_is_unsubscribed_is_not_asked_for_again(backend: Backend) -> None:
    device = backend.open("device", "no/+")
    backend.forbid("no/+")
    backend.eventually(lambda: device.generation == 2)
    with pytest.raises(TransportError, match="refuses"):
        device.receive(10.0)
    device.unsubscribe("no/+")
    assert device.refused_patterns == ()
    backend.cut(device)
    backend.eventually(lambda: device.generation == 3)
    assert device.receive(backend.nothing_s) is None


def test_a_subscription_that_is_refused_on_renewal_is_told_until_it_is_granted(backend: Backend) -> None:
    device, server = backend.open("device", "ok/a", "no/+"), backend.open("server")
    backend.forbid("no/+")
    with pytest.raises(TransportError, match=r"refuses the subscription 'no/\+'.*: correct its ACL"):
        device.receive(10.0)
    assert device.refused_patterns == ("no/+",)
    backend.eventually(lambda: server.generation == 2)
    server.publish("ok/a", b"1")  # the rest is served
    assert backend.take(device, 1)[0].payload == b"1"
    assert device.receive(backend.nothing_s) is None
    backend.forbid()
    backend.eventually(lambda: device.generation == 3 and server.generation == 3)
    assert device.refused_patterns == ()
    server.publish("no/x", b"2")
    assert backend.take(device, 1)[0].payload == b"2"


def test_a_refused_renewal_is_told_again_after_the_next_reconnect(backend: Backend) -> None:
    device = backend.open("device", "no/+")
    backend.forbid("no/+")
    for generation in (2, 3):
        backend.eventually(lambda wanted=generation: device.generation == wanted)
        with pytest.raises(TransportError, match="refuses"):
            device.receive(10.0)
        assert device.receive(0) is None
        backend.cut(device)


def test_refusals_that_nobody_hears_are_told_once(backend: Backend) -> None:
    device = backend.open("device", "no/+")
    backend.forbid("no/+")
    backend.eventually(lambda: device.generation == 2)
    backend.cut(device)
    backend.eventually(lambda: device.generation == 3)
    with pytest.raises(TransportError, match="refuses"):
        device.receive(10.0)
    device.subscribe("ok/a")
    device.publish("ok/a", b"2")
    assert backend.take(device, 1)[0].payload == b"2"


def test_a_subscription_made_without_a_connection_is_told_when_it_is_refused(backend: Backend) -> None:
    device = backend.open("device")
    backend.stop()
    backend.eventually(lambda: not device._connected)
    device.subscribe("no/+")
    backend.forbid("no/+")
    with pytest.raises(TransportError, match=r"refuses the subscription 'no/\+'"):
        device.receive(10.0)
    with pytest.raises(TransportError, match=r"refuses the subscription 'no/\+'"):
        device.subscribe("no/+")  # the answer is that of a first subscription: not wanted any more
    assert device.refused_patterns == ()


def test_a_refused_message_is_counted_where_the_broker_says_so(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.forbid("no/+")
    server, device = backend.open("server", backend.widest), backend.open("device")
    device.publish("ok/a", b"1")
    for _ in range(2):
        device.publish("no/a", b"forbidden")
    for payload in (b"2", b"3"):
        device.publish("ok/a", payload)
    assert [m.payload for m in backend.take(server, 3)] == [b"1", b"2", b"3"]
    if backend.reports:
        backend.eventually(lambda: device.refused_messages == 2)
        warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        assert len([text for text in warnings if "refuses to publish on no/a" in text]) == 1
    else:
        assert device.refused_messages == 0
    assert device.generation == 1
