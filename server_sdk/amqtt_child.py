"""The program that runs amqtt for ``EmbeddedBroker``; it loads nothing else of the SDK and so starts sooner."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["main"]


async def _serve(address: str, plugins: dict[str, Any]) -> None:
    from amqtt.broker import Broker

    broker = Broker({"listeners": {"default": {"type": "tcp", "bind": address}}, "plugins": plugins})
    await broker.start()
    await asyncio.Event().wait()  # it keeps nothing, a signal may simply end it


def main(arguments: Sequence[str]) -> int:
    """Serve until a signal.

    Args:
        arguments: ``host:port``, and amqtt's plugins with their options, as JSON.

    Returns:
        1 after one line on stderr that says why it cannot serve.
    """
    address, plugins = arguments
    logging.basicConfig(level=logging.CRITICAL)
    try:
        asyncio.run(_serve(address, json.loads(plugins)))
    except ImportError as exc:
        print(f"amqtt is not installed ({exc}): pip install 'psgl[server]'", file=sys.stderr)
    except Exception as exc:  # whatever it is, the parent reports this line
        cause: BaseException = exc
        while cause.__cause__ is not None:
            cause = cause.__cause__
        print(f"{type(cause).__name__}: {cause}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
