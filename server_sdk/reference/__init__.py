"""The method in plain torch: what graphs are exported from and tested against."""

from __future__ import annotations

__all__: list[str] = []
