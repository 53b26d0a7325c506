"""The device's side: perturb, run the front, publish activations, take the gradient, train the front. No torch.

The stations in the order in which data passes them: ``sources``, ``windows`` and ``batch``, ``bundle`` and ``front``,
``codec`` and ``wire``, ``state``, ``transport`` and ``paho_transport``; ``client`` composes them, ``training`` follows
a server's rounds, ``daemon`` keeps both going.
"""

from __future__ import annotations

from edge_sdk import telemetry as _telemetry  # noqa: F401 - before anything that imports onnxruntime
from edge_sdk.backlog import BacklogLimits
from edge_sdk.budget import Budget
from edge_sdk.bundle import Bundle, load_bundle
from edge_sdk.client import EdgeClient
from edge_sdk.decisions import Decision
from edge_sdk.errors import PsglError
from edge_sdk.paho_transport import PahoTransport
from edge_sdk.sources import array_windows, csv_samples, npz_windows, recording_samples
from edge_sdk.steps import TrainStep
from edge_sdk.transport import Connection
from edge_sdk.version import __version__
from edge_sdk.windows import Reading, Windowing

__all__ = [
    "BacklogLimits",
    "Budget",
    "Bundle",
    "Connection",
    "Decision",
    "EdgeClient",
    "PahoTransport",
    "PsglError",
    "Reading",
    "TrainStep",
    "Windowing",
    "__version__",
    "array_windows",
    "csv_samples",
    "load_bundle",
    "npz_windows",
    "recording_samples",
]
