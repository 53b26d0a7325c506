"""Does this machine compute what was recorded at export, and how fast? No torch, no onnx: numpy and onnxruntime.

The bundle's parity vectors (``vectors``) are replayed through the very sessions that a device uses.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edge_sdk.bundle import Bundle
from edge_sdk.errors import BundleError, ConfigError
from edge_sdk.interface import Interface
from edge_sdk.sessions import open_session
from edge_sdk.vectors import GIVEN, LAST, ORDER, Run, replay, thinned

__all__ = ["TOLERANCE", "GraphCheck", "Verification", "runner", "verify"]

TOLERANCE = 2e-3
"""Largest difference from what was recorded, relative to the largest recorded element of the same output."""

_LEAST_SIZE = 1e-6  # what is smaller is compared with this
_NO_NUMBER = 1e30  # stands for an output that is not finite: JSON has no infinity
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class GraphCheck:
    """What came of one graph.

    Attributes:
        graph: its name.
        passed: every recorded output is within ``TOLERANCE``.
        worst_error: the largest relative difference, 1e30 for an output that is not finite; None for ``prepare``, whose
            results only ``backward`` takes.
        worst_output: the output that it belongs to.
        batch: samples in the run.
        median_ms, p95_ms: of the repeated runs, one thread.
    """

    graph: str
    passed: bool
    worst_error: float | None
    worst_output: str | None
    batch: int
    median_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Verification:
    """What came of a bundle.

    Attributes:
        bundle: its id.
        onnxruntime: version of the runtime that ran it.
        runs: repetitions behind each latency.
        checks: one for each graph, in the order of a step.
        tolerance: ``TOLERANCE``.
    """

    bundle: str
    onnxruntime: str
    runs: int
    checks: tuple[GraphCheck, ...]
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Every graph passed."""
        return all(check.passed for check in self.checks)


def verify(bundle: Bundle, *, runs: int = 50) -> Verification:
    """Replay the parity vectors of a bundle, then time each graph.

    Args:
        bundle: a checked bundle.
        runs: timed repetitions of each graph, at least 1, after one that is not timed.

    Raises:
        BundleError: this onnxruntime cannot run a graph, or the vectors do not fit the graphs.
        ConfigError: ``runs`` below 1.
    """
    if runs < 1:
        raise ConfigError(f"runs={runs}: each graph is timed at least once")
    given = {name.removeprefix(GIVEN): array for name, array in bundle.parity.items() if name.startswith(GIVEN)}
    run = runner(bundle.graphs, bundle.manifest.interfaces)
    done = replay(tuple(bundle.graphs), run, bundle.initial, given)
    known = {**bundle.initial, **given}
    batch = len(given["x"]) if "x" in given else 0
    checks = []
    for graph, outputs in done.items():
        error, output = _worst(graph, outputs, bundle.parity)
        if graph not in LAST:
            known |= outputs
        times = _times_ms(run, graph, known, runs)
        p95 = float(np.percentile(times, 95))
        fits = error is None or error <= TOLERANCE
        checks.append(GraphCheck(graph, fits, error, output, batch, statistics.median(times), p95))
    return Verification(bundle.id, ort.__version__, runs, tuple(checks))


def runner(graphs: Mapping[str, bytes], interfaces: Mapping[str, Interface]) -> Run:
    """Sessions of one thread, as a function of graph and inputs.

    Raises:
        BundleError: this onnxruntime cannot run a graph; later, from the function: the inputs do not fit it.
    """
    sessions = {name: open_session(name, graphs[name], interfaces.get(name)) for name in ORDER if name in graphs}
    inputs = {name: [one.name for one in session.get_inputs()] for name, session in sessions.items()}
    outputs = {name: [one.name for one in session.get_outputs()] for name, session in sessions.items()}

    def run(graph: str, known: Mapping[str, Array]) -> dict[str, Array]:
        try:
            values = sessions[graph].run(None, {name: known[name] for name in inputs[graph]})
        except KeyError as exc:
            raise BundleError(
                f"the bundle's parity vectors lack {exc}, which its {graph!r} graph takes: export the bundle again"
            ) from exc
        except Exception as exc:  # onnxruntime raises types of its own native module
            reason = " ".join(str(exc).split())[:160]
            raise BundleError(
                f"onnxruntime {ort.__version__} fails in the bundle's {graph!r} graph ({reason}): "
                "upgrade onnxruntime on this machine, or export the bundle again"
            ) from exc
        return {name: np.asarray(value) for name, value in zip(outputs[graph], values, strict=True)}

    return run


def _worst(graph: str, outputs: Mapping[str, Array], recorded: Mapping[str, Array]) -> tuple[float | None, str | None]:
    """The largest relative difference of a graph's outputs, and the output that it belongs to."""
    worst: tuple[float | None, str | None] = (None, None)
    for name, expected in recorded.items():
        if not name.startswith(f"{graph}."):
            continue
        output = name.removeprefix(f"{graph}.")
        found = thinned(outputs[output]) if output in outputs else None
        if found is None or found.shape != expected.shape:
            raise BundleError(f"the bundle's parity vector {name[:80]!r} fits no output: export the bundle again")
        size = max(float(np.abs(expected.astype(np.float64)).max()), _LEAST_SIZE)
        error = float(np.abs(found.astype(np.float64) - expected).max()) / size
        error = error if error < _NO_NUMBER else _NO_NUMBER
        if worst[0] is None or error > worst[0]:
            worst = error, output
    return worst


def _times_ms(run: Run, graph: str, known: Mapping[str, Array], runs: int) -> list[float]:
    run(graph, known)
    times = []
    for _ in range(runs):
        begun = time.perf_counter()
        run(graph, known)
        times.append(1e3 * (time.perf_counter() - begun))
    return times
