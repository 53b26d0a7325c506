"""Where a device's decisions go: one JSON object a line, whole lines only, readable by the device's user alone."""

from __future__ import annotations

import contextlib
import json
import os

from edge_sdk.errors import StateError
from edge_sdk.streaming import WindowDecision

__all__ = ["DecisionFile"]

_STANDARD_OUTPUT = 1


class DecisionFile:
    """Decisions are patient data: what is made anew has mode 600.

    Args:
        path: to append to; ``-`` for the standard output.

    Raises:
        StateError: it cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._own = path != "-"
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o600) if self._own else _STANDARD_OUTPUT
        except OSError as exc:
            raise self._refused(exc) from exc

    def __enter__(self) -> DecisionFile:
        return self

    def __exit__(self, *error: object) -> None:
        if self._own:
            os.close(self._file)

    def write(self, decision: WindowDecision) -> None:
        """Append one decision; it is with the operating system when this returns.

        Raises:
            StateError: the disk refuses; the file ends with the line before.
        """
        line = {
            "window": decision.number,
            "at_s": decision.at_s,
            "class": decision.class_name or None,
            "by": decision.by,
            "why": decision.why,
        }
        rest = (json.dumps(line) + "\n").encode()
        before = os.fstat(self._file).st_size
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except BrokenPipeError:
            raise
        except OSError as exc:
            if self._own:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, before)
            raise self._refused(exc) from exc

    def _refused(self, exc: OSError) -> StateError:
        return StateError(f"{self._path} cannot be written: {exc.strerror or exc}: free space or make it writable")
