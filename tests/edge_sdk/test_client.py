"""The client over an in-memory broker, against a scripted server: every reply, every silence, every lie."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_sdk import topics
from edge_sdk.batch import Samples
from edge_sdk.client import EdgeClient
from edge_sdk.errors import BatchError, ConfigError, RefusedError, TransportError
from edge_sdk.front import Front
from edge_sdk.memory_transport import MemoryBroker, MemoryTransport
from edge_sdk.wire import Assembler, Limits, Message, decode_frame, encode

Draw = Callable[[int, int], Samples]
Answer = Callable[[Message, int], list[Message]]
RUN = "run-1"
LIMITS = Limits()


def announcement(bundle: str, run: str = RUN, status: str = "training") -> bytes:
    fields = {"bundle": bundle, "status": status, "rounds": 4, "evaluate_every": 0, "batch": 6}
    (frame,) = encode(Message("model", run, "", 0, fields, {}))
    return frame


def gradient_for(message: Message, **changes: Any) -> Message:
    fields = {"front": message.fields["front"], "rate": 1.0, "loss": 0.5, "round": 1}
    gradient = np.full_like(message.tensors["activations"], 0.01)
    return Message("gradient", message.run, message.session, message.step, fields | changes, {"gradient": gradient})


def decision_for(message: Message) -> Message:
    count = len(message.tensors["activations"])
    probabilities = np.tile(np.array([0.1, 0.7, 0.2], np.float32), (count, 1))
    tensors = {"probabilities": probabilities, "class.fused": np.ones(count, np.int64)}
    return Message("decision", message.run, message.session, message.step, {}, tensors)


@contextmanager
def scripted_server(
    broker: MemoryBroker, bundle: str, answer: Answer, *, device: str = "d1"
) -> Iterator[list[Message]]:
    """A server that answers the n-th copy of a step as ``answer(message, n)`` says; yields what it saw."""
    transport = MemoryTransport(broker, "server")
    transport.open(None)
    transport.subscribe(topics.every_step("ward"))
    transport.publish(topics.down_model("ward"), announcement(bundle), retain=True)
    seen: list[Message] = []
    stop = threading.Event()

    def serve() -> None:
        assembler = Assembler(LIMITS)
        while not stop.is_set():
            received = transport.receive(0.05)
            if received is None:
                continue
            received.acknowledge()
            message = assembler.add(decode_frame(received.payload, LIMITS))
            if message is None:
                continue
            seen.append(message)
            copies = sum((m.session, m.step) == (message.session, message.step) for m in seen)
            for reply in answer(message, copies):
                for frame in encode(reply):
                    transport.publish(topics.down_step("ward", device), frame)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join(5)
        transport.close()


def make_client(broker: MemoryBroker, built: Any, **options: Any) -> EdgeClient:
    options = {"resend_s": 0.1, "give_up_s": 10.0} | options
    return EdgeClient(built.bundle, MemoryTransport(broker, "d1"), device="d1", fleet="ward", **options)


@pytest.mark.parametrize("profile", ["vanilla", "paper"])
def test_a_step_sends_activations_and_takes_the_gradient(profile: str, built: dict[str, Any], samples: Draw) -> None:
    broker, batch = MemoryBroker(), samples(6, 1)
    with scripted_server(broker, built[profile].bundle.id, lambda m, n: [gradient_for(m)]) as seen:
        with make_client(broker, built[profile], resend_s=30.0) as client:
            before = client.front
            step = client.train_step(batch.x, batch.y)
    assert step is not None and (step.round, step.loss, step.resent) == (1, 0.5, 0)
    assert [m.kind for m in seen] == ["train"] and np.array_equal(seen[0].tensors["labels"], batch.y)
    assert seen[0].tensors["activations"].shape == (6, *built[profile].bundle.manifest.cut_shape)
    assert client.front.version == 1
    assert client.unperturbed == (6 if profile == "vanilla" else 0)
    assert not np.array_equal(client.front.tensors["p.conv1.weight"], before.tensors["p.conv1.weight"])
    assert client.state.outbox == () and client.bytes_per_sample > 0


def test_protocol_2_trains_unperturbed_and_asks_perturbed(built: dict[str, Any], samples: Draw) -> None:
    def answer(m: Message, n: int) -> list[Message]:
        if m.kind == "train":
            return [gradient_for(m)]
        return [decision_for(m)]

    paper, batch = built["paper"], samples(6, 1)
    x = batch.x.astype(np.float32) / 255
    fronts = []
    for train_epsilon in (None, 0.0):
        broker = MemoryBroker()
        with scripted_server(broker, paper.bundle.id, answer) as seen:
            with make_client(broker, paper, train_epsilon=train_epsilon) as client:
                before = client.front
                client.train_step(batch.x, batch.y)
                client.infer(batch.x)
                after = client.front
        own = Front(paper.bundle)
        trained = own.forward(before, x, None, training=True, epsilon=train_epsilon)
        assert np.array_equal(seen[0].tensors["activations"], trained.activations)
        asked = own.forward(after, x, None, training=False)
        assert np.array_equal(seen[1].tensors["activations"], asked.activations), "the bundle's budget at test"
        fronts.append(after)
    assert not np.array_equal(fronts[0].tensors["p.conv1.weight"], fronts[1].tensors["p.conv1.weight"])


def test_sensor_units_are_mapped_by_the_bundles_range(built: dict[str, Any]) -> None:
    plain = built["vanilla"]
    ranged = SimpleNamespace(
        bundle=replace(plain.bundle, manifest=replace(plain.bundle.manifest, input_range=(-100, 100)))
    )
    x = np.random.default_rng(0).integers(-150, 150, (6, 1, 8, 8), dtype=np.int16)
    broker = MemoryBroker()
    with scripted_server(broker, plain.bundle.id, lambda m, n: [decision_for(m)]) as seen:
        with make_client(broker, ranged) as client:
            client.infer(x)
            client.infer(np.clip((x / np.float32(200)) + np.float32(0.5), 0, 1))
    assert np.allclose(seen[0].tensors["activations"], seen[1].tensors["activations"], atol=1e-5)


def test_the_same_bytes_go_out_until_the_reply_comes(built: dict[str, Any], samples: Draw) -> None:
    broker, batch = MemoryBroker(), samples(6, 1)
    with (
        scripted_server(broker, built["paper"].bundle.id, lambda m, n: [gradient_for(m)] if n == 3 else []) as seen,
        make_client(broker, built["paper"]) as client,
    ):
        step = client.train_step(batch.x, batch.y)
    assert step is not None and step.resent >= 2
    assert all(message == seen[0] for message in seen[1:3])
    assert client.front.version == 1, "three copies, one update"


def test_replies_of_other_steps_sessions_and_kinds_are_ignored(built: dict[str, Any], samples: Draw) -> None:
    def answer(m: Message, n: int) -> list[Message]:
        stranger = Message("gradient", m.run, "0" * 16, m.step, gradient_for(m).fields, gradient_for(m).tensors)
        older = Message("gradient", m.run, m.session, m.step + 9, gradient_for(m).fields, gradient_for(m).tensors)
        return [stranger, older, gradient_for(m)]

    broker, batch = MemoryBroker(), samples(6, 1)
    with (
        scripted_server(broker, built["vanilla"].bundle.id, answer),
        make_client(broker, built["vanilla"]) as client,
    ):
        assert client.train_step(batch.x, batch.y) is not None
        assert client.front.version == 1


@pytest.mark.parametrize("reason", ["shape", "run"])
def test_a_refusal_names_its_reason_and_leaves_the_front(reason: str, built: dict[str, Any], samples: Draw) -> None:
    def answer(m: Message, n: int) -> list[Message]:
        return [Message("refused", m.run, m.session, m.step, {"reason": reason, "detail": "do this"}, {})]

    broker, batch = MemoryBroker(), samples(6, 1)
    with (
        scripted_server(broker, built["vanilla"].bundle.id, answer),
        make_client(broker, built["vanilla"]) as client,
    ):
        with pytest.raises(RefusedError, match="do this") as caught:
            client.train_step(batch.x, batch.y)
        assert caught.value.reason == reason
        assert client.front.version == 0 and client.state.outbox == ()


def test_a_frozen_front_stores_packs_and_counts(built: dict[str, Any], samples: Draw) -> None:
    def answer(m: Message, n: int) -> list[Message]:
        if m.kind == "store":
            return [Message("stored", m.run, m.session, m.step, {"samples": 6}, {})]
        count = len(m.tensors["activations"])
        tensors = {"probabilities": np.full((count, 3), 1 / 3, np.float32), "class.attacked": np.zeros(count, np.int64)}
        return [Message("decision", m.run, m.session, m.step, {}, tensors)]

    broker, batch, made = MemoryBroker(), samples(6, 1), built["hardened"]
    with scripted_server(broker, made.bundle.id, answer) as seen, make_client(broker, made) as client:
        assert (client.samples_sent, client.bits_sent) == (0, 0.0)
        client.store(batch.x, batch.y, first=0, total=6)
        client.flush()
        client.infer(batch.x[:4])
        client.infer(batch.x[:4])
        with pytest.raises(ConfigError, match="--fronts frozen"):
            client.train_step(batch.x, batch.y)
        assert client.samples_sent == 14, "each send counts, also of what was sent before"
        assert client.bits_sent == pytest.approx(14 * 16.0)
    stored, first, second = (message.tensors["activations"] for message in seen)
    assert np.array_equal(first, second) and np.array_equal(stored[:4], first), "the same bytes again"
    assert len(np.unique(stored)) <= 16 and stored.min() >= -3 and stored.max() <= 3


def test_without_a_bound_no_bits_are_claimed(built: dict[str, Any], samples: Draw) -> None:
    broker, batch = MemoryBroker(), samples(6, 1)
    with scripted_server(broker, built["vanilla"].bundle.id, lambda m, n: [gradient_for(m)]):
        with make_client(broker, built["vanilla"]) as client:
            client.train_step(batch.x, batch.y)
            assert client.samples_sent == 6 and client.bits_sent is None


def test_quantised_activations_are_trained_straight_through(built: dict[str, Any], samples: Draw) -> None:
    broker, batch, made = MemoryBroker(), samples(6, 1), built["quantised"]
    with scripted_server(broker, made.bundle.id, lambda m, n: [gradient_for(m)]) as seen:
        with make_client(broker, made) as client:
            before = client.front
            assert client.train_step(batch.x, batch.y) is not None
            values = int(np.prod(made.bundle.manifest.cut_shape))
            assert client.bits_sent == 6 * (4 * values + 64)
    assert len(np.unique(seen[0].tensors["activations"])) <= 16
    front = Front(made.bundle)
    x = batch.x.astype(np.float32) / 255
    forward = front.forward(before, x, None, training=True)
    gradient = np.full_like(forward.activations, 0.01)
    after = front.backward(before, front.prepare(before, forward), gradient, rate=made.bundle.manifest.learning_rate)
    assert all(np.array_equal(value, client.front.tensors[name]) for name, value in after.tensors.items())


def test_a_run_that_has_all_its_rounds_is_no_error(built: dict[str, Any], samples: Draw) -> None:
    def answer(m: Message, n: int) -> list[Message]:
        return [Message("refused", m.run, m.session, m.step, {"reason": "finished", "detail": "thanks"}, {})]

    broker, batch = MemoryBroker(), samples(6, 1)
    with (
        scripted_server(broker, built["vanilla"].bundle.id, answer),
        make_client(broker, built["vanilla"]) as client,
    ):
        assert client.train_step(batch.x, batch.y) is None


def test_a_gradient_of_another_shape_is_refused(built: dict[str, Any], samples: Draw) -> None:
    def answer(m: Message, n: int) -> list[Message]:
        reply = gradient_for(m)
        return [
            Message(
                "gradient",
                m.run,
                m.session,
                m.step,
                reply.fields,
                {"gradient": reply.tensors["gradient"][:2]},
            )
        ]

    broker, batch = MemoryBroker(), samples(6, 1)
    with (
        scripted_server(broker, built["vanilla"].bundle.id, answer),
        make_client(broker, built["vanilla"]) as client,
    ):
        with pytest.raises(RefusedError, match="does not fit"):
            client.train_step(batch.x, batch.y)
        assert client.front.version == 0


def test_hostile_bytes_on_both_topics_are_counted_and_nothing_stops(built: dict[str, Any], samples: Draw) -> None:
    broker, batch = MemoryBroker(), samples(6, 1)
    foe = MemoryTransport(broker, "foe")
    foe.open(None)
    with scripted_server(broker, built["vanilla"].bundle.id, lambda m, n: [gradient_for(m)]):
        with make_client(broker, built["vanilla"]) as client:
            for topic in (topics.down_step("ward", "d1"), topics.down_model("ward")):
                for payload in (b"", b"\xff" * 40, b"\x9f" * 1000, b"\xd8\x23\x61("):
                    foe.publish(topic, payload)
            assert client.train_step(batch.x, batch.y) is not None
            assert sum(client.traffic.rejected.values()) >= 8
    foe.close()


def test_silence_ends_with_a_clear_error(built: dict[str, Any], samples: Draw) -> None:
    broker, batch = MemoryBroker(), samples(6, 1)
    with scripted_server(broker, built["vanilla"].bundle.id, lambda m, n: []):
        with make_client(broker, built["vanilla"], give_up_s=0.3) as client:
            with pytest.raises(TransportError, match="is the server up"):
                client.train_step(batch.x, batch.y)
            assert client.state.outbox != (), "the step is kept"


def test_no_server_and_another_bundle(built: dict[str, Any]) -> None:
    with pytest.raises(TransportError, match="psgl-server train"):
        make_client(MemoryBroker(), built["vanilla"]).start(wait_s=0.1)
    broker = MemoryBroker()
    with scripted_server(broker, built["paper"].bundle.id, lambda m, n: []):
        with pytest.raises(RefusedError, match="copy the server's bundle"):
            make_client(broker, built["vanilla"]).start(wait_s=5)


def test_a_server_that_starts_another_run_ends_the_device(built: dict[str, Any], samples: Draw) -> None:
    broker, batch = MemoryBroker(), samples(6, 1)
    with scripted_server(broker, built["vanilla"].bundle.id, lambda m, n: []):
        other = MemoryTransport(broker, "other")
        other.open(None)
        with make_client(broker, built["vanilla"]) as client:
            other.publish(topics.down_model("ward"), announcement(built["vanilla"].bundle.id, "run-2"), retain=True)
            with pytest.raises(RefusedError, match="trains run run-2 now"):
                client.train_step(batch.x, batch.y)
        other.close()


def test_a_device_that_has_trained_nothing_joins_the_next_run(built: dict[str, Any], samples: Draw) -> None:
    broker, batch = MemoryBroker(), samples(6, 1)
    server = MemoryTransport(broker, "server")
    server.open(None)
    server.publish(topics.down_model("ward"), announcement(built["vanilla"].bundle.id), retain=True)
    with make_client(broker, built["vanilla"], give_up_s=0.2) as client, pytest.raises(TransportError):
        client.train_step(batch.x, batch.y)
    assert client.state.run == RUN and len(client.state.outbox) == 1
    server.publish(topics.down_model("ward"), announcement(built["vanilla"].bundle.id, "run-2"), retain=True)
    transport = MemoryTransport(broker, "d2")  # another name, so that nothing is kept for it
    again = EdgeClient(built["vanilla"].bundle, transport, device="d1", fleet="ward", state=client.state)
    with again:
        assert again.state.run == "run-2" and again.state.outbox == ()
    server.close()


def test_a_wrong_batch_never_leaves_the_device(built: dict[str, Any]) -> None:
    broker = MemoryBroker()
    with scripted_server(broker, built["vanilla"].bundle.id, lambda m, n: []) as seen:
        with make_client(broker, built["vanilla"]) as client:
            with pytest.raises(BatchError, match="Nx1x8x8"):
                client.train_step(np.zeros((6, 1, 9, 9)), np.zeros(6, int))
            with pytest.raises(BatchError, match="NaN"):
                client.infer(np.full((6, 1, 8, 8), np.nan))
    assert seen == []


def test_a_decision_has_streams_and_the_guides_own_word(built: dict[str, Any], samples: Draw) -> None:
    broker, batch = MemoryBroker(), samples(6, 1)
    with scripted_server(broker, built["paper"].bundle.id, lambda m, n: [decision_for(m)]) as seen:
        with make_client(broker, built["paper"]) as client:
            decision = client.infer(batch.x)
    assert decision.classes.tolist() == [1] * 6 and set(decision.streams) == {"fused"}
    assert decision.guide is not None and decision.guide.shape == (6,)
    assert "labels" not in seen[0].tensors, "labels of test samples never leave the device"
