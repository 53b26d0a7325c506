"""What the wire costs: round trip and throughput of steps through the whole stack, against bare paho on one broker.

A training step goes the way of a real one (device: outbox in SQLite, envelope, transport; server: inbox, log, reply,
which is kept; device: decode, SQLite), but nothing is trained: the server's gradient is the step's activations. Bare
paho sends as many bytes as the activations have, QoS 1 and TCP_NODELAY, and its echo is a process of its own as the
server is. All are measured in turns; without_log, without_state, codec_only (neither of them) and transport (our
transport alone) tell where the time goes. Chunks of the throughput are 256 KiB, with ``.chunked_64k`` 64 KiB.
"""

from __future__ import annotations

import argparse
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from benchmarks.echo_service import BUNDLE, CHUNK_BYTES, CUT, EchoService
from benchmarks.figures import options, print_figures, ratio
from edge_sdk.errors import OutboxFullError
from edge_sdk.exchange import Exchange
from edge_sdk.front import FrontState
from edge_sdk.memory import keep_freed_memory
from edge_sdk.paho_transport import PahoTransport
from edge_sdk.sqlite_state import SqliteState
from edge_sdk.state import MemoryState, OutboxLimits, OutboxStep, State
from edge_sdk.transport import Connection
from edge_sdk.wire import Message, encode
from server_sdk.broker import EmbeddedBroker
from server_sdk.child import Child
from server_sdk.log import Log

__all__ = ["main"]

_INPUT = (1, 256)
_IN_FLIGHT = 20
_TIMEOUT_S = 30.0
_HOST = "127.0.0.1"
_ECHO, _COUNT = "up/echo", "up/count"
_T = TypeVar("_T")


def main() -> int:
    """Measure and print."""
    parser = options("wire", __doc__.split("\n")[0])
    parser.add_argument("--peer", choices=tuple(_PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.peer is not None:
        return _be_peer(arguments)
    pairs, trips, streams, steps = (12, 40, 5, 80) if arguments.quick else (40, 100, 15, 200)
    samples: dict[str, list[float]] = {}
    with _links() as links:
        for name, count in (("64k", 64), ("1k", 1)):
            measure = {which: partial(link.trips, count, trips) for which, link in links.items()}
            for which, blocks in _in_turns(measure, pairs).items():
                samples[f"rtt_{name}_ms.{which}"] = [1000 * median(block) for block in blocks]
                samples[f"rtt_{name}_mean_ms.{which}"] = [1000 * fmean(block) for block in blocks]
        speeds = {which: partial(link.stream, 256, steps) for which, link in links.items()}
        speeds["chunked_64k"] = partial(links["whole"].stream, 256, steps, CHUNK_BYTES)
        for which, rates in _in_turns(speeds, streams).items():
            samples[f"throughput_256k_mb_s.{which}"] = rates
    figures = {
        "wire.rtt_64k_vs_paho": ratio(samples["rtt_64k_ms.whole"], samples["rtt_64k_ms.paho"]),
        "wire.rtt_1k_ms": median(samples["rtt_1k_ms.whole"]),
        "wire.throughput_256k_vs_paho": ratio(
            samples["throughput_256k_mb_s.whole"], samples["throughput_256k_mb_s.paho"]
        ),
        "wire.throughput_256k_vs_paho.chunked_64k": ratio(
            samples["throughput_256k_mb_s.chunked_64k"], samples["throughput_256k_mb_s.paho"]
        ),
    }
    for name, values in samples.items():
        what, _, which = name.partition(".")
        unit = "_mb_s" if what.endswith("_mb_s") else "_ms"
        figure = what.removesuffix(unit) + ("" if which == "whole" else f"_{which}")
        if which not in ("paho", "chunked_64k"):
            figures.setdefault(f"wire.{figure}_vs_paho", ratio(values, samples[f"{what}.paho"]))
        figures.setdefault(f"wire.{figure}{unit}", median(values))
    print_figures(figures, samples, as_json=arguments.json)
    return 0


class _Link(ABC):
    """One way to the other side."""

    def trips(self, samples: int, repeats: int) -> list[float]:
        """Seconds of each of so many round trips, one after the other."""
        trip, times = self._trip(samples), []
        for _ in range(repeats):
            began = time.perf_counter()
            trip()
            times.append(time.perf_counter() - began)
        return times

    def stream(self, samples: int, repeats: int, chunk_bytes: int = 4 * CHUNK_BYTES) -> float:
        """MB/s (10^6) of messages of so many samples, 20 in flight, until the other side has them all."""
        tensors = _tensors(samples)
        began = time.perf_counter()
        self._stream(tensors, repeats, chunk_bytes)
        return repeats * tensors["activations"].nbytes / (time.perf_counter() - began) / 1e6

    @abstractmethod
    def _trip(self, samples: int) -> Callable[[], None]:
        """One round trip."""

    @abstractmethod
    def _stream(self, tensors: Mapping[str, npt.NDArray[Any]], repeats: int, chunk_bytes: int) -> None:
        """Send so many times and wait until the other side has them all."""

    @abstractmethod
    def close(self) -> None:
        """Disconnect."""


class _Bytes(_Link):
    """Plain bytes, as many as the activations have."""

    def _trip(self, samples: int) -> Callable[[], None]:
        payload = _tensors(samples)["activations"].tobytes()

        def trip() -> None:
            self._publish(_ECHO, payload)
            if self._answer() != payload:
                raise RuntimeError("the echo is another")

        return trip

    def _stream(self, tensors: Mapping[str, npt.NDArray[Any]], repeats: int, chunk_bytes: int) -> None:
        payload = tensors["activations"].tobytes()
        for _ in range(repeats):
            self._publish(_COUNT, payload)
        self._publish(_COUNT, b"")
        arrived = int(self._answer())
        if arrived != repeats:
            raise RuntimeError(f"{arrived} of {repeats} messages arrived")

    @abstractmethod
    def _publish(self, topic: str, payload: bytes) -> None:
        """Send; waits while 20 are in flight."""

    @abstractmethod
    def _answer(self) -> bytes:
        """Wait for the next message."""


class _OurTransport(_Bytes):
    """Through our transport."""

    def __init__(self, broker: EmbeddedBroker) -> None:
        self._transport = PahoTransport(Connection(broker.host, broker.port), "transport")
        self._transport.open()
        self._transport.subscribe("transport/down")

    def close(self) -> None:
        self._transport.close()

    def _publish(self, topic: str, payload: bytes) -> None:
        self._transport.publish("transport/" + topic, payload)

    def _answer(self) -> bytes:
        received = self._transport.receive(_TIMEOUT_S)
        if received is None:
            raise RuntimeError("no answer")
        received.acknowledge()
        return received.payload


class _BarePaho(_Bytes):
    """Through paho as it comes."""

    def __init__(self, broker: EmbeddedBroker) -> None:
        self._arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._window = threading.Semaphore(_IN_FLIGHT)
        self._client = _paho(broker.port, lambda _client, message: self._arrived.put(bytes(message.payload)))
        self._client.on_publish = lambda *_: self._window.release()
        self._client.subscribe("paho/down", 1)
        self._client.loop_start()

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _publish(self, topic: str, payload: bytes) -> None:
        self._window.acquire(timeout=_TIMEOUT_S)
        self._client.publish("paho/" + topic, payload, qos=1)

    def _answer(self) -> bytes:
        return self._arrived.get(timeout=_TIMEOUT_S)


class _Device(_Link):
    """What ``EdgeClient`` does around a step, without the front's graphs; its transport is open."""

    def __init__(self, broker: EmbeddedBroker, fleet: str, name: str, state: State) -> None:
        self._state = state
        connection = Connection(broker.host, broker.port)
        self._exchange = Exchange(
            PahoTransport(connection, f"psgl-{fleet}-{name}"),
            fleet=fleet,
            device=name,
            session=state.session,
            bundle=BUNDLE,
            resend_s=5.0,
            give_up_s=_TIMEOUT_S,
        )
        self._run = self._exchange.open(_TIMEOUT_S).run
        state.begin_run(self._run, state.front)
        self._steps = 0
        self._stored = 0

    def _trip(self, samples: int) -> Callable[[], None]:
        tensors, x = _tensors(samples), np.random.default_rng(1).random((samples, *_INPUT), np.float32)
        return partial(self._train, tensors, x)

    def _stream(self, tensors: Mapping[str, npt.NDArray[Any]], repeats: int, chunk_bytes: int) -> None:
        for _ in range(repeats):
            fields = {"front": self._state.front.version, "first": self._stored, "total": 1 << 32}
            outbox = self._outbox("store", fields, tensors, chunk_bytes)
            self._stored += len(tensors["labels"])
            while True:
                try:
                    self._state.begin(outbox, {"sent": self._stored})
                    break
                except OutboxFullError:
                    self._collect(1.0)
            self._exchange.send(outbox)
            self._collect(0.0)
        while self._state.outbox:
            self._collect(1.0)

    def close(self) -> None:
        self._exchange.close()
        self._state.close()
        if self._exchange.traffic.resent or self._exchange.traffic.rejected:
            raise RuntimeError(f"steps were sent again or rejected: {self._exchange.traffic}")

    def _train(self, tensors: Mapping[str, npt.NDArray[Any]], x: npt.NDArray[np.float32]) -> None:
        before = self._state.front
        outbox = self._outbox("train", {"front": before.version, "samples": len(x)}, tensors, CHUNK_BYTES, x)
        self._state.begin(outbox, {"batches": self._steps + 1})
        message = self._exchange.ask(outbox).message
        if message.tensors["gradient"].shape != tensors["activations"].shape:
            raise RuntimeError("the echo is of another shape")
        self._steps += 1
        counters = {"trained": self._steps, "round": int(message.fields["round"]), "samples": self._steps * len(x)}
        self._state.finish(outbox.step, FrontState(before.version + 1, before.tensors), counters)

    def _outbox(
        self,
        kind: str,
        fields: Mapping[str, Any],
        tensors: Mapping[str, npt.NDArray[Any]],
        chunk_bytes: int,
        x: npt.NDArray[np.float32] | None = None,
    ) -> OutboxStep:
        message = Message(kind, self._run, self._state.session, self._state.next_step(), fields, tensors)
        return OutboxStep(message.step, kind, tuple(encode(message, chunk_bytes=chunk_bytes)), x)

    def _collect(self, timeout_s: float) -> None:
        reply = self._exchange.reply(timeout_s)
        while reply is not None:
            if reply.message.kind != "stored":
                raise RuntimeError(f"the server says {reply.message!r}")
            self._state.finish(reply.step)
            reply = self._exchange.reply(0.0)


@contextmanager
def _links() -> Iterator[dict[str, _Link]]:
    """Broker, peers and every way to them, by name."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        broker = stack.enter_context(EmbeddedBroker("mosquitto"))
        for peer in _PEERS:
            stack.enter_context(_peer(peer, broker, folder))
        links: dict[str, _Link] = {"paho": _BarePaho(broker), "transport": _OurTransport(broker)}
        for name, fleet, kept in (
            ("codec_only", "unlogged", False),
            ("without_state", "logged", False),
            ("without_log", "unlogged", True),
            ("whole", "logged", True),
        ):
            links[name] = _Device(broker, fleet, name, _state(folder, fleet, name, kept=kept))
        try:
            yield links
        finally:
            for link in links.values():
                link.close()


def _state(folder: Path, fleet: str, name: str, *, kept: bool) -> State:
    """A device's state with the front of ``benchmarks.step``, 19 kB."""
    shapes = {"0.weight": (16, 1, 3, 3), "0.bias": (16,), "3.weight": (32, 16, 3, 3), "3.bias": (32,)}
    front = FrontState(0, {layer: np.zeros(shape, np.float32) for layer, shape in shapes.items()})
    limits = OutboxLimits(max_steps=_IN_FLIGHT)
    if not kept:
        return MemoryState(front, limits)
    path = folder / f"{name}.sqlite"
    return SqliteState(path, front, bundle=BUNDLE, fleet=fleet, device=name, limits=limits, on_note=print)


def _tensors(samples: int) -> dict[str, npt.NDArray[Any]]:
    generator = np.random.default_rng(samples)
    activations = generator.standard_normal((samples, *CUT)).astype(np.float32)
    return {"activations": activations, "labels": generator.integers(0, 10, samples)}


def _in_turns(measures: Mapping[str, Callable[[], _T]], turns: int) -> dict[str, list[_T]]:
    """Take all measures in each turn, one after the other; the first turn, which warms up, does not count."""
    measured = [{name: measure() for name, measure in measures.items()} for _ in range(turns + 1)]
    return {name: [turn[name] for turn in measured[1:]] for name in measures}


def _paho(port: int, take: Callable[[Client, MQTTMessage], None]) -> Client:
    """A connected client of paho alone whose messages go to ``take``."""
    client = Client(CallbackAPIVersion.VERSION2)
    client.max_inflight_messages_set(_IN_FLIGHT)
    client.on_socket_open = _no_delay
    client.on_message = lambda client, _data, message: take(client, message)
    client.connect(_HOST, port)
    return client


def _no_delay(_client: Client, _data: Any, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


@contextmanager
def _peer(name: str, broker: EmbeddedBroker, folder: Path) -> Iterator[None]:
    """The other side, a process of its own, for the block."""
    arguments = ["--peer", name, "--port", str(broker.port), "--folder", str(folder)]
    child = Child([sys.executable, "-m", "benchmarks.wire", *arguments], stdout=subprocess.PIPE, stderr=2)
    try:
        if child.process.stdout is None or not child.process.stdout.readline():
            raise RuntimeError(f"the peer {name} does not start")
        yield
    finally:
        child.end()


def _be_peer(arguments: argparse.Namespace) -> int:
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    _PEERS[arguments.peer](arguments.port, arguments.folder, stopped)
    return 0


def _serve(fleet: str, port: int, folder: Path, stopped: threading.Event) -> None:
    log = Log(folder / "log") if fleet == "logged" else None
    transport = PahoTransport(Connection(_HOST, port), f"psgl-{fleet}-server")
    service = EchoService(transport, fleet, log)
    service.open()
    print("ready", flush=True)
    while not stopped.is_set():
        service.serve(0.25)
    transport.close()


class _Echo:
    """Answers each message on ``echo`` with itself, and an empty one on ``count`` with how many came before it."""

    def __init__(self) -> None:
        self._arrived = 0

    def answer(self, topic: str, payload: bytes) -> bytes | None:
        """What goes down, or None for nothing."""
        if topic.endswith(_ECHO):
            return payload
        if payload:
            self._arrived += 1
            return None
        arrived, self._arrived = self._arrived, 0
        return b"%d" % arrived


def _echo_transport(port: int, folder: Path, stopped: threading.Event) -> None:
    transport, echo = PahoTransport(Connection(_HOST, port), "transport-echo"), _Echo()
    transport.open()
    transport.subscribe("transport/up/+")
    print("ready", flush=True)
    while not stopped.is_set():
        received = transport.receive(0.25)
        if received is not None:
            answer = echo.answer(received.topic, received.payload)
            if answer is not None:
                transport.publish("transport/down", answer)
            received.acknowledge()
    transport.close()


def _echo_paho(port: int, folder: Path, stopped: threading.Event) -> None:
    echo = _Echo()

    def take(client: Client, message: MQTTMessage) -> None:
        answer = echo.answer(message.topic, bytes(message.payload))
        if answer is not None:
            client.publish("paho/down", answer, qos=1)

    client = _paho(port, take)
    client.on_subscribe = lambda *_: print("ready", flush=True)
    client.subscribe("paho/up/+", 1)
    while not stopped.is_set():
        client.loop(0.25)


_PEERS: dict[str, Callable[[int, Path, threading.Event], None]] = {
    "logged": partial(_serve, "logged"),
    "unlogged": partial(_serve, "unlogged"),
    "transport": _echo_transport,
    "paho": _echo_paho,
}


if __name__ == "__main__":
    raise SystemExit(main())
