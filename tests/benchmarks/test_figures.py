"""What the benchmarks print, and that the wire benchmark's echo service does what a server does. Nothing is timed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.echo_service import EchoService
from benchmarks.figures import print_figures, ratio
from edge_sdk import topics
from edge_sdk.exchange import Exchange
from edge_sdk.memory_transport import MemoryBroker, MemoryTransport
from edge_sdk.state import OutboxStep
from edge_sdk.transport import Received
from edge_sdk.wire import Assembler, Message, decode_frame, encode
from server_sdk.log import Log

STEP = topics.up_step("f", "d")
ACTIVATIONS = np.arange(500, dtype=np.float32).reshape(2, 10, 25)
LABELS = np.array([1, 2])


class Watched(Log):
    """A log that notes how many replies were on their way when it was written."""

    def __init__(self, folder: Path, device: MemoryTransport) -> None:
        super().__init__(folder)
        self.kinds: list[str] = []
        self.early = 0
        self._device = device

    def append(self, kind, fields, body=b""):  # type: ignore[no-untyped-def]
        self.kinds.append(kind)
        self.early += self._device.receive(0.0) is not None
        return super().append(kind, fields, body)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[tuple[EchoService, MemoryTransport, Watched]]:
    broker = MemoryBroker()
    device, server = MemoryTransport(broker, "device"), MemoryTransport(broker, "server")
    device.open()
    device.subscribe(topics.down_step("f", "d"))
    log = Watched(tmp_path / "log", device)
    service = EchoService(server, "f", log, chunk_bytes=1024)
    service.open()
    yield service, device, log
    log.close()
    server.close()
    device.close()


def message(kind: str, step: int = 1) -> Message:
    fields = {"first": 2 * step, "total": 100} if kind == "store" else {"samples": 2}
    return Message(kind, "run", "s", step, {"front": 3, **fields}, {"activations": ACTIVATIONS, "labels": LABELS})


def send(service: EchoService, device: MemoryTransport, sent: Message) -> Message | None:
    """Send it in two chunks; the service's answer."""
    frames = encode(sent, chunk_bytes=2048)
    assert len(frames) == 2
    for frame in frames:
        device.publish(STEP, frame)
        service.serve(0.0)
    assembler = Assembler()
    while (received := device.receive(0.0)) is not None:
        received.acknowledge()
        answer = assembler.add(decode_frame(received.payload))
        if answer is not None:
            return answer
    return None


def test_a_training_step_comes_back_as_its_own_gradient(
    fleet: tuple[EchoService, MemoryTransport, Watched],
) -> None:
    service, device, _ = fleet
    answer = send(service, device, message("train"))
    assert answer is not None
    assert (answer.kind, answer.session, answer.step) == ("gradient", "s", 1)
    assert (answer.fields["front"], answer.fields["round"]) == (3, 1)
    np.testing.assert_array_equal(answer.tensors["gradient"], ACTIVATIONS)


def test_a_step_is_in_the_log_before_its_reply_is_sent(fleet: tuple[EchoService, MemoryTransport, Watched]) -> None:
    service, device, log = fleet
    assert send(service, device, message("train")) is not None
    assert log.kinds == ["step", "round"]
    assert not log.early
    step, _ = log.read()
    assert step[0].fields == {"device": "d", "kind": "train", "session": "s", "step": 1}
    assert len(step[0].body) > ACTIVATIONS.nbytes


def test_stored_samples_are_counted(fleet: tuple[EchoService, MemoryTransport, Watched]) -> None:
    service, device, log = fleet
    answers = [send(service, device, message("store", step)) for step in (1, 2)]
    assert [answer and (answer.kind, answer.fields["samples"]) for answer in answers] == [("stored", 2), ("stored", 4)]
    assert log.kinds == ["step", "step"]
    assert not log.early


@pytest.mark.parametrize("kind", ["train", "store"])
def test_a_repeated_step_is_not_written_again(fleet: tuple[EchoService, MemoryTransport, Watched], kind: str) -> None:
    service, device, log = fleet
    first = send(service, device, message(kind))
    written = list(log.kinds)
    again = send(service, device, message(kind))
    assert log.kinds == written
    assert again == (first if kind == "train" else None)


def test_the_service_answers_a_training_step_and_then_acknowledges_it(
    fleet: tuple[EchoService, MemoryTransport, Watched],
) -> None:
    service, device, _ = fleet
    answered: list[bool] = []  # at each acknowledgement
    receive = service._transport.receive

    def acknowledge() -> None:
        answered.append(device.receive(0.0) is not None)

    def watched(timeout_s: float) -> Received | None:
        received = receive(timeout_s)
        if received is None:
            return None
        return Received(received.topic, received.payload, received.retained, acknowledge)

    service._transport.receive = watched  # type: ignore[method-assign]
    send(service, device, message("train"))
    assert answered == [False, True]


def test_a_device_joins_and_trains(tmp_path: Path) -> None:
    broker = MemoryBroker()
    service = EchoService(MemoryTransport(broker, "server"), "f", None)
    service.open()
    exchange = Exchange(
        MemoryTransport(broker, "device"),
        fleet="f",
        device="d",
        session="s",
        bundle="echo",
        resend_s=5.0,
        give_up_s=5.0,
    )
    assert exchange.open(5.0).run == "run"
    exchange.send(OutboxStep(1, "train", tuple(encode(message("train")))))
    while exchange.waiting:
        service.serve(0.0)
        exchange.listen(0.0)
    reply = exchange.reply(0.0)
    assert reply is not None
    assert (reply.message.kind, reply.step, reply.resent) == ("gradient", 1, 0)
    exchange.close()


def test_a_ratio_is_the_median_of_pairs() -> None:
    assert ratio([2.0, 90.0, 9.0], [1.0, 10.0, 3.0]) == 3.0
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0, 2.0], [1.0])


def test_figures_are_one_json_object_last(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/wire.py", "--json"])
    print_figures({"wire.rtt_1k_ms": 1.23456789}, {"rtt": [1.0, 2.00001]}, as_json=True)
    out = json.loads(capsys.readouterr().out)
    assert out["figures"] == {"wire.rtt_1k_ms": 1.2346}
    assert out["samples"] == {"rtt": [1.0, 2.0]}
    assert out["command"] == "python -m benchmarks.wire --json"
    assert out["machine"]["cores"] >= 1


def test_figures_are_lines_without_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_figures({"wire.rtt_1k_ms": 1.23456789}, {}, as_json=False)
    assert capsys.readouterr().out.split() == ["wire.rtt_1k_ms", "1.235"]
