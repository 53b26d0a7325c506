"""The error tree of the build machine; its root is the SDK's own ``PsglError``."""

from __future__ import annotations

from edge_sdk.errors import PsglError

__all__ = ["ExportError"]


class ExportError(PsglError):
    """A model that cannot be exported, or a graph that does not compute what torch computes."""
