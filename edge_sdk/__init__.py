"""The device's side: perturb, run the front, publish activations, take the gradient, train the front. No torch.

The stations in the order in which data passes them: ``batch``, ``bundle`` and ``front``, ``codec`` and ``wire``,
``state``, ``transport`` and ``paho_transport``; ``client`` composes them, ``training`` follows a server's rounds.
"""

from __future__ import annotations

from edge_sdk.bundle import Bundle, load_bundle
from edge_sdk.client import EdgeClient
from edge_sdk.decisions import Decision
from edge_sdk.errors import PsglError
from edge_sdk.paho_transport import PahoTransport
from edge_sdk.steps import TrainStep
from edge_sdk.transport import Connection
from edge_sdk.version import __version__

__all__ = [
    "Bundle",
    "Connection",
    "Decision",
    "EdgeClient",
    "PahoTransport",
    "PsglError",
    "TrainStep",
    "__version__",
    "load_bundle",
]
