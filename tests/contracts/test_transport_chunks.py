"""The contract of every transport: messages in chunks, in any order, beside each other, with one lost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edge_sdk.errors import TransportError
from edge_sdk.wire import Assembler, Message, decode_frame, encode

if TYPE_CHECKING:
    from conftest import Backend, Client

KIB = 1024


def activations(step: int, count: int) -> Message:
    """A step with so many float32 of one sample."""
    drawn = np.random.default_rng(step).standard_normal((1, count), np.float32)
    return Message("infer", "run", "session", step, {"front": 0}, {"activations": drawn})


def same(one: Message | None, other: Message) -> bool:
    return (
        one is not None
        and one.step == other.step
        and np.array_equal(one.tensors["activations"], other.tensors["activations"])
    )


def assemble(backend: Backend, client: Client, number: int, assemblers: dict[str, Assembler]) -> dict[str, Message]:
    """Take so many frames; the whole messages by topic."""
    whole = {}
    for received in backend.take(client, number):
        message = assemblers.setdefault(received.topic, Assembler()).add(decode_frame(received.payload))
        if message is not None:
            whole[received.topic] = message
    return whole


def send(client: Client, topic: str, frames: Sequence[bytes]) -> None:
    for frame in frames:
        client.publish(topic, frame)


def test_the_default_chunk_passes_every_broker(backend: Backend) -> None:
    server, device = backend.open("server", "up/+"), backend.open("device")
    message = activations(1, 50_000)
    frames = encode(message)
    assert len(frames) == 4 and 64 * KIB <= max(map(len, frames)) <= 65 * KIB
    send(device, "up/a", frames)
    assert same(assemble(backend, server, 4, {})["up/a"], message)


def test_chunks_of_several_devices_in_any_order(backend: Backend) -> None:
    server = backend.open("server", "up/+")
    order = random.Random(7)
    messages = {f"up/{name}": activations(step, 10_000) for step, name in enumerate("abc", 1)}
    devices = {topic: backend.open(topic[3:]) for topic in messages}
    posts = [(topic, frame) for topic, message in messages.items() for frame in encode(message, chunk_bytes=4 * KIB)]
    order.shuffle(posts)
    for topic, frame in posts:
        devices[topic].publish(topic, frame)
    whole = assemble(backend, server, len(posts), {})
    assert whole.keys() == messages.keys()
    assert all(same(whole[topic], message) for topic, message in messages.items())


def test_a_lost_chunk_is_known_by_its_number_and_sent_alone(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    server, device = backend.open("server", "up/+"), backend.open("device", "down")
    message, lost = activations(1, 10_000), (2, 7)
    frames = encode(message, chunk_bytes=4 * KIB)
    publish = device.publish
    with monkeypatch.context() as network:
        network.setattr(
            device, "publish", lambda topic, frame: decode_frame(frame).index in lost or publish(topic, frame)
        )
        send(device, "up/a", frames)
    assemblers: dict[str, Assembler] = {}
    assert assemble(backend, server, len(frames) - len(lost), assemblers) == {}
    missing = assemblers["up/a"].missing(decode_frame(frames[0]).key)
    assert missing == list(lost)
    server.publish("down", bytes(missing))
    asked = backend.take(device, 1)[0].payload
    send(device, "up/a", [frames[number] for number in asked])
    assert same(assemble(backend, server, len(lost), assemblers)["up/a"], message)
    assert server.receive(backend.nothing_s) is None


def test_ten_megabytes_through_a_broker_of_64_kib(backend: Backend) -> None:
    limit = 64 * KIB
    backend.limit(limit)
    server = backend.open("server", "up/+")
    device = backend.open("device", max_packet_bytes=limit, max_queued=20)
    message = activations(1, 2_500_000)
    with pytest.raises(TransportError, match=f"above the limit of {limit}: send smaller chunks"):
        device.publish("up/a", encode(message)[0])
    frames = encode(message, chunk_bytes=limit - 2 * KIB)
    assert sum(map(len, frames)) > 10_000_000 and len(frames) > 7 * 20
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send, device, "up/a", frames)  # waits for the broker, again and again
        whole = assemble(backend, server, len(frames), {})
        sending.result(10.0)
    assert same(whole["up/a"], message)
    assert device.generation == server.generation == 1
