"""What a training run leaves on the device: the front's tensors, and a report of what was done and sent."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from edge_sdk.client import EdgeClient
from edge_sdk.codec import pack_tensors
from edge_sdk.errors import ConfigError
from edge_sdk.ledger import bits_per_sample
from edge_sdk.memory import peak_rss_mb

__all__ = ["write_results"]


def write_results(client: EdgeClient, front: Path | None, report: Path | None) -> dict[str, Any]:
    """Write the front (CBOR) and the report (JSON), where a file is named.

    Returns:
        The report.

    Raises:
        ConfigError: a file cannot be written.
    """
    figures = {
        "name": client.device,
        "steps": client.steps,
        "unperturbed": client.unperturbed,
        "samples_sent": client.samples_sent,
        "bits_per_sample": bits_per_sample(client.bundle.manifest),
        "bits_sent": client.bits_sent,
        "resent": client.traffic.resent,
        "bytes_sent": client.traffic.bytes_sent,
        "bytes_received": client.traffic.bytes_received,
        "rejected": client.traffic.rejected,
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "torch_loaded": "torch" in sys.modules,
    }
    if front is not None:
        _write(front, pack_tensors(client.front.tensors))
    if report is not None:
        _write(report, json.dumps(figures, indent=1).encode())
    return figures


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written: {exc.strerror or exc}") from exc
