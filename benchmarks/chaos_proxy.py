"""A TCP proxy before an MQTT broker that cuts, stalls, splits and repeats, as its seed says.

It reads the framing of MQTT (3.1.1 section 2.2) only to know where a packet ends, so that a PUBLISH can be delivered
twice. On SIGTERM it prints what it did as one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Faults", "main", "take_packet"]

_PUBLISH = 3
_MAX_PACKET = 1 << 28


@dataclass(frozen=True)
class Faults:
    """How often what happens, as probabilities for each packet.

    Attributes:
        cut: both ends of the connection are reset.
        stall: nothing passes for up to half a second.
        split: the packet goes out in pieces.
        repeat: a PUBLISH goes out twice.
    """

    cut: float = 0.0006
    stall: float = 0.002
    split: float = 0.05
    repeat: float = 0.01


def take_packet(buffer: bytearray) -> bytes | None:
    """Take the first whole packet from the front of a buffer, or None while it is incomplete.

    Raises:
        ValueError: no MQTT.
    """
    length = shift = 0
    for index in range(1, 5):
        if index >= len(buffer):
            return None
        length |= (buffer[index] & 0x7F) << shift
        shift += 7
        if not buffer[index] & 0x80:
            if length > _MAX_PACKET:
                raise ValueError("a packet beyond every limit")
            if len(buffer) < index + 1 + length:
                return None
            packet = bytes(buffer[: index + 1 + length])
            del buffer[: index + 1 + length]
            return packet
    raise ValueError("no MQTT packet")


class _Proxy:
    def __init__(self, port: int, seed: int, faults: Faults) -> None:
        self._port = port
        self._random = random.Random(seed)
        self._faults = faults
        self.done = Counter[str]()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 22)
        except OSError:
            writer.transport.abort()
            return
        self.done["connections"] += 1

        def cut() -> None:
            writer.transport.abort()
            there_writer.transport.abort()

        await asyncio.gather(self._pump(reader, there_writer, cut), self._pump(there_reader, writer, cut))
        cut()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: Callable[[], None]) -> None:
        buffer = bytearray()
        with contextlib.suppress(OSError, ValueError):
            while data := await reader.read(1 << 20):
                buffer += data
                while (packet := take_packet(buffer)) is not None:
                    await self._forward(packet, writer, cut)
        cut()

    async def _forward(self, packet: bytes, writer: asyncio.StreamWriter, cut: Callable[[], None]) -> None:
        draw, faults = self._random.random, self._faults
        if draw() < faults.cut:
            self.done["cut"] += 1
            writer.write(packet[: self._random.randrange(len(packet))])
            await writer.drain()
            cut()
            raise ConnectionResetError
        if draw() < faults.stall:
            self.done["stall"] += 1
            await asyncio.sleep(self._random.uniform(0.0, 0.5))
        if draw() < faults.split and len(packet) > 2:
            self.done["split"] += 1
            at = self._random.randrange(1, len(packet))
            writer.write(packet[:at])
            await writer.drain()
            await asyncio.sleep(0.001)
            writer.write(packet[at:])
        else:
            writer.write(packet)
        if packet[0] >> 4 == _PUBLISH and draw() < faults.repeat:
            self.done["repeat"] += 1
            writer.write(packet)
        await writer.drain()


async def _run(port: int, seed: int, faults: Faults) -> None:
    proxy = _Proxy(port, seed, faults)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=1 << 22)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await stop.wait()
    server.close()
    print(json.dumps(proxy.done), flush=True)


def main() -> int:
    """Run until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos_proxy", description=__doc__.split("\n")[0])
    parser.add_argument("--to", type=int, required=True, metavar="PORT", help="port of the broker on this machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="pass everything on as it is")
    arguments = parser.parse_args()
    faults = Faults(0.0, 0.0, 0.0, 0.0) if arguments.quiet else Faults()
    asyncio.run(_run(arguments.to, arguments.seed, faults))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
