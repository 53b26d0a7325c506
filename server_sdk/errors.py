"""The error tree of the server's side; its root is the SDK's own ``PsglError``.

PsglError
└── ServerError
    ├── ModelError           a network that cannot be built, split or loaded
    ├── LogError             the write-ahead log cannot be written or read: a full, read-only or damaged disk
    ├── CheckpointError      the same for checkpoints, or one of another run, bundle or model
    ├── TrainingError        an update that must not be made (a loss or gradient that is not finite)
    └── BrokerError          the embedded broker does not start
"""

from __future__ import annotations

from edge_sdk.errors import PsglError

__all__ = ["BrokerError", "CheckpointError", "LogError", "ModelError", "ServerError", "TrainingError"]


class ServerError(PsglError):
    """Base of the server's errors."""


class ModelError(ServerError):
    """A network that cannot be built, split or loaded."""


class LogError(ServerError):
    """The write-ahead log cannot be written or read."""


class CheckpointError(ServerError):
    """A checkpoint cannot be written or read, or is one of another run, bundle or model."""


class TrainingError(ServerError):
    """An update that must not be made; weights, statistics and the round counter stand as before it."""


class BrokerError(ServerError):
    """The embedded broker does not start."""
