"""The device's log: one JSON object a line, and in it nothing of a patient.

What may stand in a record is a list of names, each with a plain kind of value (``FIELDS``). Samples, labels,
activations, probabilities and classes have no name there, so no record can carry them. A record of another library, or
an exception, is reduced to its logger, level and type: whoever wrote its text did not know this rule.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from typing import IO, Any

__all__ = ["FIELDS", "JsonFormatter", "configure", "log", "warn"]

FIELDS = {
    "device": str,
    "fleet": str,
    "bundle": str,
    "run": str,
    "state": str,
    "why": str,
    "mode": str,
    "step": int,
    "round": int,
    "samples": int,
    "windows": int,
    "dropped": int,
    "refused": int,
    "resent": int,
    "bytes_sent": int,
    "bytes_received": int,
    "waiting": int,
    "code": int,
    "fetched": int,
    "total": int,
    "seconds": float,
}
"""What a record may say, and as what."""

_ROOT = "edge_sdk"
_LONGEST = 200
_log = logging.getLogger("edge_sdk.device")


def log(event: str, **fields: str | int | float) -> None:
    """Write one record.

    Args:
        event: what happened, one word.
        fields: what belongs to it, by the names in ``FIELDS``.

    Raises:
        KeyError: a name that no record may carry: an error in the SDK.
    """
    _write(logging.INFO, event, fields)


def warn(event: str, **fields: str | int | float) -> None:
    """Write one record that an operator should see. See ``log``."""
    _write(logging.WARNING, event, fields)


class JsonFormatter(logging.Formatter):
    """One JSON object for each record: ``time`` (UTC), ``level``, ``event``, and the fields of ``log``.

    Records of the SDK's own modules keep their text (addresses and topics, never data) as ``text``.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        at = time.gmtime(record.created)
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', at)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
        }
        fields = getattr(record, "psgl", None)
        if isinstance(fields, dict):
            line |= {"event": record.getMessage(), **fields}
        else:
            line |= {"event": "message", "logger": record.name}
            if record.name.partition(".")[0] == _ROOT:
                line["text"] = record.getMessage()[:_LONGEST]
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
        return json.dumps(line)


def configure(level: str = "info", stream: IO[str] | None = None) -> logging.Handler:
    """From now on the SDK's records go to this stream (default: standard error), one JSON object a line.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        stream: where to.

    Returns:
        The handler, for whoever wants to take it away again.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger(_ROOT)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
    return handler


def _write(level: int, event: str, fields: Mapping[str, str | int | float]) -> None:
    record = {name: _plain(FIELDS[name], value) for name, value in fields.items()}
    _log.log(level, "%s", event, extra={"psgl": record})


def _plain(kind: type, value: str | int | float) -> str | int | float:
    if kind is str:
        return str(value)[:_LONGEST]
    if kind is int:
        return int(value)
    return round(float(value), 6) if math.isfinite(value := float(value)) else 0.0
