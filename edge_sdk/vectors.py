"""Parity vectors: what the graphs of a bundle were given at export, and what they gave. Replayed on the target.

A file ``parity.cbor`` maps names to typed arrays (RFC 8746), as ``initial.cbor`` does:

- ``given.<input>``: what a graph takes that neither the bundle's initial tensors nor an earlier graph of the same step
  gives: ``x``, ``label``, ``epsilon``, ``noise``, ``gradient``, ``rate``; and ``s.*`` in place of the initial ones.
- ``<graph>.<output>``: what it gave. Of an output with more than ``MOST_VALUES`` elements these are the elements at the
  places floor(i x size / MOST_VALUES) in row-major order, as one flat array.

The graphs run in the order of ``ORDER``, each with what those before it gave (``prepare`` and ``backward`` go on with
what ``train`` hands on; nothing goes on from ``infer`` and ``guide``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.codec import pack_tensors, unpack_tensors
from edge_sdk.errors import WireError
from edge_sdk.interface import INNER
from edge_sdk.limits import DEFAULT_LIMITS

__all__ = [
    "GIVEN",
    "LAST",
    "MOST_VALUES",
    "ORDER",
    "Run",
    "pack_vectors",
    "record",
    "replay",
    "thinned",
    "unpack_vectors",
]

Array = npt.NDArray[Any]
Run = Callable[[str, Mapping[str, Array]], dict[str, Array]]
"""Runs the graph of a name on what is there by name, of which it takes what it needs."""

GIVEN = "given."
MOST_VALUES = 256
LAST = ("infer", "guide")
"""Graphs from which no other goes on."""

ORDER = (*LAST, "train", "prepare", "backward")

_LIMITS = replace(DEFAULT_LIMITS, max_tensors=8192, max_items=1 << 17)  # four for each tensor of a front


def pack_vectors(vectors: Mapping[str, Array]) -> bytes:
    """Encode; equal vectors, equal bytes.

    Raises:
        WireError: as ``codec.pack_tensors``.
    """
    return pack_tensors(dict(vectors), _LIMITS)


def unpack_vectors(data: bytes) -> dict[str, Array]:
    """Decode what ``pack_vectors`` encoded.

    Raises:
        WireError: no such file, a name that means nothing, a number that is not finite, or nothing to compare.
    """
    vectors = unpack_tensors(data, _LIMITS)
    for name, array in vectors.items():
        graph, dot, rest = name.partition(".")
        if graph not in ("given", *ORDER) or not dot or not rest:
            raise WireError("schema", f"{name[:80]!r} is no parity vector")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise WireError("nonfinite", f"{name[:80]!r} is not finite")
    if not any(name.startswith("infer.") for name in vectors):
        raise WireError("schema", "there is nothing that a graph gave")
    return vectors


def thinned(array: Array) -> Array:
    """What is kept of an output: all of it, or ``MOST_VALUES`` of its elements in a flat array."""
    if array.size <= MOST_VALUES:
        return array
    places = np.arange(MOST_VALUES) * array.size // MOST_VALUES
    kept: Array = array.reshape(-1)[places]
    return kept


def replay(
    graphs: Sequence[str], run: Run, initial: Mapping[str, Array], given: Mapping[str, Array]
) -> dict[str, dict[str, Array]]:
    """Run each graph as in one step.

    Args:
        graphs: names of those that there are.
        run: runs one.
        initial: the front's tensors.
        given: what else they take, by the input's name.

    Returns:
        Outputs by graph and name, in the order in which the graphs ran.
    """
    known = {**initial, **given}
    done = {}
    for graph in (name for name in ORDER if name in graphs):
        done[graph] = run(graph, known)
        if graph not in LAST:
            known |= done[graph]
    return done


def record(given: Mapping[str, Array], done: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    """The vectors of one replay: what was given, and what came of it."""
    kept = {
        f"{graph}.{name}": np.array(thinned(array), order="C")
        for graph, outputs in done.items()
        for name, array in outputs.items()
        if not name.startswith(INNER)
    }
    return {**{f"{GIVEN}{name}": array for name, array in given.items()}, **kept}
