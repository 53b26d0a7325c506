"""What the three command lines share: options of broker and public key, one-line errors, exit codes.

Exit codes: 0 done, 2 cannot go on (one line says why and what to do), 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from edge_sdk.errors import ConfigError, PsglError
from edge_sdk.signing import PUBLIC_KEY_VARIABLE, PublicKey, public_key_from
from edge_sdk.transport import Connection
from edge_sdk.version import __version__

__all__ = [
    "add_broker_options",
    "add_debug",
    "add_public_key",
    "connection_from",
    "new_parser",
    "public_key_of",
    "require",
    "run",
    "stop_on_signals",
]


def new_parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser with ``--version`` and ``--debug`` that shows examples under its options."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"psgl {__version__}")
    add_debug(parser)
    return parser


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Add ``--debug``, before and after a subcommand."""
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show Python's traceback on an error"
    )


def add_public_key(parser: argparse.ArgumentParser) -> None:
    """Add ``--public-key``."""
    parser.add_argument(
        "--public-key",
        type=Path,
        metavar="FILE",
        help="use bundles only that are signed with this key (PEM; needs psgl[secure]); else the file that "
        f"{PUBLIC_KEY_VARIABLE} names, if it is set",
    )


def public_key_of(arguments: argparse.Namespace) -> PublicKey | None:
    """The public key of ``add_public_key``'s option, or of the environment; None where none is configured.

    Raises:
        ConfigError: as `PublicKey`.
    """
    return public_key_from(arguments.public_key, os.environ)


def add_broker_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a broker; the password comes from a file or PSGL_PASSWORD, never from the line."""
    group = parser.add_argument_group("broker")
    group.add_argument("--host", default="127.0.0.1", help="broker's name or address (default %(default)s)")
    group.add_argument("--port", type=int, help="broker's port (default 1883, with TLS 8883)")
    group.add_argument("--fleet", default="default", help="name of the fleet (default %(default)s)")
    group.add_argument("--user", help="user name; the password comes from --password-file or PSGL_PASSWORD")
    group.add_argument("--password-file", type=Path, metavar="FILE", help="file whose first line is the password")
    group.add_argument("--tls", action="store_true", help="encrypt, trusting the system's certificate authorities")
    group.add_argument("--ca", type=Path, metavar="FILE", help="encrypt, trusting this certificate authority (PEM)")
    group.add_argument("--cert", type=Path, metavar="FILE", help="certificate of this client (PEM)")
    group.add_argument("--key", type=Path, metavar="FILE", help="private key of this client (PEM)")
    group.add_argument(
        "--protocol",
        choices=("auto", "5", "3.1.1"),
        default="auto",
        help="MQTT version (default: 5, else 3.1.1)",
    )
    group.add_argument(
        "--connect-timeout-s",
        type=float,
        default=30.0,
        metavar="S",
        help="give up the first connection after (default %(default)s)",
    )


def connection_from(arguments: argparse.Namespace) -> Connection:
    """The broker that the options name.

    Raises:
        ConfigError: a file is missing or the options contradict each other.
    """
    for option in ("password_file", "ca", "cert", "key"):
        path = getattr(arguments, option)
        if path is not None and not path.is_file():
            raise ConfigError(f"--{option.replace('_', '-')}: there is no file at {path}")
    password = os.environ.get("PSGL_PASSWORD")
    if arguments.password_file is not None:
        password = (arguments.password_file.read_text().splitlines() or [""])[0]
    if password and not arguments.user:
        raise ConfigError("a password needs a user name: add --user")
    if bool(arguments.cert) != bool(arguments.key):
        raise ConfigError("a client certificate needs both --cert and --key")
    tls = bool(arguments.tls or arguments.ca or arguments.cert)
    return Connection(
        host=arguments.host,
        port=arguments.port or (8883 if tls else 1883),
        user=arguments.user,
        password=password,
        ca_file=arguments.ca,
        cert_file=arguments.cert,
        key_file=arguments.key,
        tls=tls,
        protocol=arguments.protocol,
        connect_timeout_s=arguments.connect_timeout_s,
    )


def require(extra: str, *modules: str) -> None:
    """Check that the modules of an extra are installed.

    Raises:
        ConfigError: one is not; the text names the extra.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{module} is not installed: pip install 'psgl[{extra}]'")


def stop_on_signals(stop: Callable[[], None]) -> None:
    """From now on Ctrl-C and SIGTERM ask for a tidy end; a second one does not wait for it."""

    def ask(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, _interrupt)
        stop()

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, ask)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run(command: Callable[[], int], *, debug: bool) -> int:
    """Run a command so that every way out is a clear line and an exit code.

    SIGTERM ends it as Ctrl-C does, so that ``finally`` blocks run.
    """

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return command()
    except PsglError as exc:
        if debug:
            raise
        print(f"error: {exc}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        # A second Ctrl-C must not interrupt the way out.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("stopped", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 130
    except Exception as exc:  # the last boundary: a user must never be left with Python's internals
        if debug:
            raise
        print(
            f"error: unexpected {type(exc).__name__}: {' '.join(str(exc).split())[:200]} "
            "(run again with --debug and report it)",
            file=sys.stderr,
            flush=True,
        )
        return 2
