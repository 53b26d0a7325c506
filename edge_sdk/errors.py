"""The error tree of the device's side.

PsglError                    every error that the SDK raises on purpose; its text is one line that names the remedy
└── EdgeError
    ├── BatchError           sensor arrays of the wrong shape, type or range
    ├── BundleError          a bundle that is damaged, incomplete or of another version
    ├── ConfigError          options that contradict each other or name nothing
    ├── WireError            bytes that are not a message of this protocol (``reason`` is a short code)
    ├── StateError           the device's state cannot be kept: a full, read-only or damaged disk, a missing key
    │   └── OutboxFullError  too many steps wait for the server
    ├── TransportError       a broker that cannot be reached, refuses, or takes no packet of this size
    └── RefusedError         the server refused a step (``reason`` is its code)
"""

from __future__ import annotations

__all__ = [
    "BatchError",
    "BundleError",
    "ConfigError",
    "EdgeError",
    "OutboxFullError",
    "PsglError",
    "RefusedError",
    "StateError",
    "TransportError",
    "WireError",
]


class PsglError(Exception):
    """Base of every error that the SDK raises on purpose."""


class EdgeError(PsglError):
    """Base of the device's errors."""


class BatchError(EdgeError):
    """Sensor arrays that the front cannot take."""


class BundleError(EdgeError):
    """A bundle that must not be used."""


class ConfigError(EdgeError):
    """Options that contradict each other or name nothing."""


class StateError(EdgeError):
    """The device's state cannot be kept or read: a full, read-only or damaged disk, a missing key."""


class OutboxFullError(StateError):
    """Too many steps wait for the server."""


class TransportError(EdgeError):
    """The broker cannot be reached, refuses, or takes no packet of this size."""


class _ReasonError(EdgeError):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class WireError(_ReasonError):
    """Bytes that are not a message of this protocol.

    Attributes:
        reason: short code, the label under which rejections are counted (``crc``, ``limit``, ``tag``, ...).
    """


class RefusedError(_ReasonError):
    """The server refused a step.

    Attributes:
        reason: the code that the server sent (``run``, ``shape``, ``bundle``, ...).
    """
