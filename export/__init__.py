"""The build machine's side: a torch model becomes a bundle of plain ONNX graphs that train on the device."""

from __future__ import annotations

__all__: list[str] = []
