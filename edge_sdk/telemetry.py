"""A device reports to its operator alone: the telemetry of onnxruntime's wheels is switched off before their import.

From version 1.29 on they keep a device's identity and events of its processes in a folder of the user's, to be sent to
their makers. The variable is read when onnxruntime is imported, so this module is imported before it. A value that is
set already stays; a program that imports onnxruntime before edge_sdk must set it itself.
"""

from __future__ import annotations

import os

__all__ = ["SWITCH"]

SWITCH = "ORT_DISABLE_TELEMETRY"
"""Environment variable of onnxruntime: 1 switches it off."""

os.environ.setdefault(SWITCH, "1")
