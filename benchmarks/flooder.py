"""A device gone wild, for ``benchmarks.flood``: an MQTT client that publishes 64 KiB messages to a topic without end.

In turn: noise, a chunk of a message that is never finished, a message whose checksum is wrong, and a whole, valid
step of another run. It speaks MQTT 3.1.1 (OASIS standard, sections 3.1 and 3.3) over a plain socket, since a client
library would be slower than the broker.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count, cycle
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.wire import Message, encode

__all__ = ["main"]

_PAYLOAD = 65_536
_WINDOW = 20  # unacknowledged messages on the wire, as many as the SDK's own client has
_EACH = 8


def main() -> int:
    """Publish until SIGTERM, then print what was sent as one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flooder")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--qos", type=int, choices=(0, 1), default=1)
    parser.add_argument("--bytes-per-s", type=float, default=0.0, help="0: as fast as the broker takes them")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    packets = cycle([_publish(arguments.topic, payload, arguments.qos) for payload in _payloads()])
    began, sent = time.monotonic(), 0
    try:
        while True:
            with contextlib.suppress(OSError):  # thrown out or not let in: it comes again
                for size in _send(arguments, packets):
                    sent += size
                    if arguments.bytes_per_s:
                        time.sleep(max(0.0, sent / arguments.bytes_per_s - (time.monotonic() - began)))
            time.sleep(0.05)
    except _End:
        print(json.dumps({"bytes": sent, "began_s": round(began, 3), "ended_s": round(time.monotonic(), 3)}))
    return 0


class _End(Exception):
    """SIGTERM came."""


def _end(number: int, frame: object) -> None:
    raise _End


def _payloads() -> list[bytes]:
    generator = np.random.default_rng(0)
    made: list[bytes] = []
    for step in range(_EACH):
        tensors: dict[str, npt.NDArray[Any]] = {
            "activations": generator.standard_normal((16, (_PAYLOAD - 1024) // 64)).astype(np.float32),
            "labels": np.zeros(16, np.int64),
        }
        message = Message("train", "another-run", "flood", step, {"front": 0}, tensors)
        (whole,) = encode(message, chunk_bytes=1 << 20)
        made += [
            generator.bytes(_PAYLOAD),
            encode(message, chunk_bytes=_PAYLOAD // 2)[0],
            whole[:-1000] + bytes(900) + whole[-100:],
            whole,
        ]
    return made


def _publish(topic: str, payload: bytes, qos: int) -> tuple[bytes, bytes]:
    """A PUBLISH packet before and behind its packet identifier, which QoS 0 has not."""
    name = topic.encode()
    length, remaining = b"", 2 + len(name) + 2 * qos + len(payload)
    while remaining:
        remaining, digit = divmod(remaining, 128)
        length += bytes([digit | (128 if remaining else 0)])
    return bytes([0x30 | qos << 1]) + length + len(name).to_bytes(2, "big") + name, payload


def _send(arguments: argparse.Namespace, packets: Iterator[tuple[bytes, bytes]]) -> Iterator[int]:
    """Connect and publish; yields the bytes of each message sent."""
    with socket.create_connection((arguments.host, arguments.port), 5) as broker:
        broker.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = arguments.topic.split("/")[-2].encode()
        broker.sendall(b"\x10" + bytes([12 + len(client)]) + b"\0\4MQTT\4\2\0\0\0" + bytes([len(client)]) + client)
        if broker.recv(4)[:2] != b"\x20\x02":
            raise ConnectionError("no CONNACK")
        window = threading.Semaphore(_WINDOW)
        threading.Thread(target=_count_acknowledgements, args=(broker, window), daemon=True).start()
        for number in count():
            if arguments.qos and not window.acquire(timeout=2.0):
                raise ConnectionError("no acknowledgement")
            head, payload = next(packets)
            broker.sendall(head + (number % 65_535 + 1).to_bytes(2, "big") * arguments.qos)
            broker.sendall(payload)
            yield len(payload)


def _count_acknowledgements(broker: socket.socket, window: threading.Semaphore) -> None:
    rest = 0  # bytes of a PUBACK, four each, that came in part
    with contextlib.suppress(OSError):
        while data := broker.recv(4096):
            acknowledged, rest = divmod(rest + len(data), 4)
            if acknowledged:
                window.release(acknowledged)


if __name__ == "__main__":
    sys.exit(main())
