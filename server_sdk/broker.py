"""A private broker for demonstrations and tests: its own process, loopback only, gone with its parent.

Mosquitto where the machine has it, else amqtt: pure Python, MQTT 3.1.1 only, slower, and without sessions for
anonymous clients. Production runs a broker that its operator configures.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from server_sdk.child import Child
from server_sdk.errors import BrokerError, ServerError

__all__ = ["EmbeddedBroker", "find_mosquitto", "main"]

Kind = Literal["auto", "mosquitto", "amqtt"]

_HOST = "127.0.0.1"
_CONNECT_311 = b"\x10\x11\x00\x04MQTT\x04\x02\x00\x05\x00\x05probe"  # clean session, keepalive 5 s, id "probe"
_OPEN = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
_TRIES = 5  # for a port that another process takes between choosing and binding

_MOSQUITTO_CONF = """\
listener {port} {host}
allow_anonymous true
persistence false
set_tcp_nodelay true
max_inflight_messages 500
max_queued_messages 100000
max_queued_bytes 134217728
sys_interval 0
connection_messages false
log_type error
log_type warning
log_dest stderr
"""


def find_mosquitto() -> str | None:
    """Path of the mosquitto program, also where the PATH of ordinary users does not look, or None."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin"))
    return shutil.which("mosquitto", path=path)


class EmbeddedBroker:
    """A broker for as long as a ``with`` block (or from ``start`` to ``stop``).

    Args:
        kind: "mosquitto", "amqtt", or "auto": Mosquitto if it is installed, else amqtt.
        port: TCP port on 127.0.0.1; 0 chooses a free one.
        options: further lines for mosquitto.conf (a second listener, a password file, a limit).
        plugins: amqtt's plugins (users, ACL): their options by the name of the class; None lets everybody in.
        timeout_s: how long it may take to answer its first client.

    Raises:
        BrokerError: (start, restart) the port is in use, the program is missing or does not start.
    """

    def __init__(
        self,
        kind: Kind = "auto",
        port: int = 0,
        *,
        options: Sequence[str] = (),
        plugins: Mapping[str, Mapping[str, Any]] | None = None,
        timeout_s: float = 15.0,
    ) -> None:
        if kind not in ("auto", "mosquitto", "amqtt"):
            raise BrokerError(f"broker {kind!r} is unknown: use auto, mosquitto or amqtt")
        if not 0 <= port <= 65_535:
            raise BrokerError(f"port {port} is none: choose 0 (a free one) or 1 to 65535")
        self._mosquitto = find_mosquitto() if kind in ("auto", "mosquitto") else None
        if kind == "mosquitto" and self._mosquitto is None:
            raise BrokerError("mosquitto is not installed: apt install mosquitto, or use kind='amqtt'")
        if options and self._mosquitto is None:
            raise BrokerError("options are lines of mosquitto.conf, and mosquitto is not used: install it or omit them")
        if plugins is not None and self._mosquitto is not None:
            raise BrokerError("plugins are amqtt's, and mosquitto is used: choose kind='amqtt' or omit them")
        self.kind: Literal["mosquitto", "amqtt"] = "mosquitto" if self._mosquitto else "amqtt"
        self.host = _HOST
        self.port = port
        self._any_port = port == 0
        self._options = tuple(options)
        self._plugins = _OPEN if plugins is None else plugins
        self._timeout_s = timeout_s
        self._directory: Path | None = None
        self._child: Child | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The broker's process.

        Raises:
            BrokerError: it was not started.
        """
        if self._child is None:
            raise BrokerError("the broker is not started: use it as a context manager or call start()")
        return self._child.process

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._child is not None and self._child.alive

    def start(self) -> Self:
        """Start and wait until it answers a client."""
        if self.alive:
            raise BrokerError(f"the broker runs already on {self.host}:{self.port}")
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="psgl-broker-"))
        try:
            for remaining in reversed(range(_TRIES if self._any_port else 1)):
                if self._any_port:
                    self.port = _free_port()
                _require_free(self.port)
                self._launch()
                if self._answers(last=remaining == 0):
                    break
        except BaseException:
            self.stop()
            raise
        return self

    def restart(self) -> Self:
        """Stop (if it runs) and start again on the same port, with no memory of what was before."""
        self._end(signal.SIGTERM)
        self._any_port = False
        return self.start()

    def kill(self) -> None:
        """SIGKILL: end it as a crash would. ``restart`` brings it back."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it and remove its files. May be called again."""
        self._end(signal.SIGTERM)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _launch(self) -> None:
        directory = self._directory
        if directory is None:
            raise BrokerError("the broker has no directory: call start()")
        if self._mosquitto:
            conf = directory / "mosquitto.conf"
            lines = _MOSQUITTO_CONF.format(port=self.port, host=self.host)
            if os.geteuid() == 0:
                lines += "user root\n"  # a change of user would undo that the broker dies with its parent
            conf.write_text(lines + "".join(f"{line}\n" for line in self._options))
            command = [self._mosquitto, "-c", str(conf)]
        else:
            plugins = json.dumps({name: dict(chosen) for name, chosen in self._plugins.items()})
            program = Path(__file__).with_name("amqtt_child.py")  # -P: its folder hides no module from amqtt
            command = [sys.executable, "-P", str(program), f"{self.host}:{self.port}", plugins]
        try:
            with (directory / "log").open("wb") as log:
                self._child = Child(command, stdout=log, stderr=subprocess.STDOUT)
        except ServerError as exc:
            raise BrokerError(str(exc)) from exc

    def _answers(self, *, last: bool) -> bool:
        """Wait for its CONNACK. False: it lost its port to somebody else, choose another one."""
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                text = self._last_words()
                self._end(signal.SIGKILL)
                if self._any_port and not last and "in use" in text:
                    return False
                raise BrokerError(f"{self.kind} ends at once on {self.host}:{self.port}: {text}")
            if _connack(self.host, self.port, 0.5):
                return True
            self._pause(0.01)
        where = f"{self.host}:{self.port} within {self._timeout_s:g} s"
        raise BrokerError(f"{self.kind} does not answer on {where}: {self._last_words()}")

    def _pause(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def _last_words(self) -> str:
        if self._directory is None:
            return "no output"
        lines = (self._directory / "log").read_text(errors="replace").strip().splitlines()
        return "; ".join(lines[-2:]) if lines else "no output"

    def _end(self, how: signal.Signals) -> None:
        if self._child is not None:
            self._child.end(how)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((_HOST, 0))
        port: int = sock.getsockname()[1]
        return port


def _require_free(port: int) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((_HOST, port))
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                text = f"port {port} of {_HOST} is in use: end the program that listens there"
                raise BrokerError(f"{text} or choose another port (0 takes a free one)") from exc
            raise BrokerError(f"port {port} of {_HOST} cannot be used ({exc.strerror}): choose another one") from exc


def _connack(host: str, port: int, timeout_s: float) -> bool:
    """Whether somebody answers a CONNECT there, accepting or not."""
    try:
        with socket.create_connection((host, port), timeout_s) as sock:
            sock.sendall(_CONNECT_311)
            answer = sock.recv(4)
            if answer[:2] != b"\x20\x02":
                return False
            sock.sendall(b"\xe0\x00")
            return True
    except OSError:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a broker in the foreground until a signal: ``python -m server_sdk.broker --port 1883``."""
    parser = argparse.ArgumentParser(prog="python -m server_sdk.broker", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kind", choices=("auto", "mosquitto", "amqtt"), default="auto", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=1883, help="on 127.0.0.1, 0 for a free one; default: %(default)s")
    options = parser.parse_args(arguments)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        with EmbeddedBroker(options.kind, options.port) as broker:
            print(f"{broker.kind} listens on {broker.host}:{broker.port}; Ctrl-C ends it", flush=True)
            while broker.alive and not ended.wait(0.2):
                continue
            if not ended.is_set():
                print(f"{broker.kind} ended with code {broker.process.returncode}", file=sys.stderr)
                return 1
    except BrokerError as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
