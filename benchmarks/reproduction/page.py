"""The page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["render"]


def render(found: Mapping[str, Any]) -> str:
    """Stub."""
    return str(found["figures"])
