"""The build machine's side: a torch model becomes a bundle of plain ONNX graphs that train on the device."""

from __future__ import annotations

from edge_sdk import telemetry as _telemetry  # noqa: F401 - before anything that imports onnxruntime

__all__: list[str] = []
