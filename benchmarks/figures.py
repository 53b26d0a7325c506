"""What every benchmark prints last: one JSON object with its figures, the command, the machine and the samples."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["options", "print_figures", "ratio", "report"]


def options(module: str, about: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=about)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, at most 60 s on 2 cores")
    return parser


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios of pairs that were measured next to each other."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def print_figures(figures: Mapping[str, float], samples: Mapping[str, Sequence[float]], *, as_json: bool) -> None:
    """Print a line for each figure, and with ``--json`` the whole object."""
    for name, value in figures.items():
        print(f"{name:48} {value:.4g}", file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(report(figures, samples)))


def report(figures: Mapping[str, float], samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The object that every benchmark prints: figures, the command, the date, the machine and the samples."""
    tools = ("numpy", "onnxruntime", "torch", "paho-mqtt", "cbor2")
    machine = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in tools},
    }
    return {
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "command": "python -m " + " ".join(["benchmarks." + _module(), *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "samples": {name: [round(value, 4) for value in values] for name, values in samples.items()},
    }


def _module() -> str:
    return Path(sys.argv[0]).stem
