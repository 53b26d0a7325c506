"""Results of cells become rows, one value for each seed, and the figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from statistics import mean, stdev
from typing import Any

from benchmarks.reproduction.plan import HEADLINE, Cell, Settings, cells_of

__all__ = ["Row", "Rows", "collect", "figures_of", "find", "spread"]

Row = dict[str, Any]
Rows = list[Row]
Results = Mapping[Cell, Mapping[str, Any]]
_DIGITS = 4


def collect(data: str, seeds: Sequence[int], settings: Settings, results: Results) -> Row:
    """Everything that was measured on one data set, JSON values.

    Args:
        data: its name.
        seeds: in the order of the values.
        results: of the cells of `cells_of`; a cell that is not done for every seed is left out. ``networks`` must be
            there.

    Returns:
        ``sizes`` of the parts, ``settings``, ``machines`` (how many cells each has worked on), ``clean`` accuracies
        of the networks without defence, ``rows`` (one for each network and attack), ``sweep`` (one for each mu and
        number of iterations), ``foes``. Each row has
        ``values``: name -> one number for each seed, None where there is none.
    """
    merged: dict[Cell, list[Mapping[str, Any]]] = {}
    for cell in cells_of(data, seeds[:1], settings):
        alike = [replace(cell, seed=seed) for seed in seeds]
        if all(other in results for other in alike):
            merged[cell] = [results[other] for other in alike]
    rows: Rows = []
    sweep: Rows = []
    foes: Rows = []
    for cell, found in merged.items():
        trained = cell.attack.name if cell.kind == "perturbed" and cell.attack is not None else None
        head: Row = {"protocol": cell.protocol, "kind": cell.kind, "trained": trained}
        if cell.kind == "foes":
            values = _values([{name: part for name, part in result.items() if name != "machine"} for result in found])
            attack = None if cell.attack is None else asdict(cell.attack)
            foes.append({"protocol": cell.protocol, "kind": cell.of, **_attack(attack), "values": values})
        for position in range(len(found[0].get("rows", ()))):
            each = [result["rows"][position] for result in found]
            values = _values([{name: part for name, part in row.items() if name != "attack"} for row in each])
            rows.append({**head, **_attack(each[0]["attack"]), "values": values})
        for position in range(len(found[0].get("sweep", ()))):
            each = [result["sweep"][position] for result in found]
            sweep.append({"step": each[0]["step"], "iterations": each[0]["iterations"], "values": _values(each)})
    networks = merged[Cell(data, seeds[0], "networks")]
    return {
        "sizes": networks[0]["sizes"],
        "settings": asdict(settings),
        "machines": dict(Counter(str(result["machine"]) for each in merged.values() for result in each)),
        "clean": _values([result["clean"] for result in networks]),
        "rows": rows,
        "sweep": sweep,
        "foes": foes,
    }


def find(rows: Rows, **wanted: Any) -> Row | None:
    """The row with these fields, for instance ``protocol="P2", guide="victim"``; None: no such row."""
    for row in rows:
        if all(row.get(name) == value for name, value in wanted.items()):
            return row
    return None


def spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and sample standard deviation (0 of a single value); None where a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return mean(known), stdev(known) if len(known) > 1 else 0.0


def figures_of(data: str, found: Row) -> dict[str, list[float]]:
    """Figure -> value of each seed: P2, the headline's attack, predicted labels; points of accuracy."""
    headline = asdict(HEADLINE)
    row = find(found["rows"], protocol="P2", kind="residual", **headline)
    foes = find(found["foes"], protocol="P2", kind="residual", **headline)
    named: dict[str, tuple[list[float], list[float]]] = {}
    if row is not None:
        scores = {name: row["values"][f"scores.{name}.accuracy"] for name in ("undefended", "twin", "paper", "fitted")}
        for plain in ("undefended", "twin"):
            named[f"fused_minus_{plain}_paper_weights"] = (scores["paper"], scores[plain])
            named[f"fused_minus_{plain}_fitted"] = (scores["fitted"], scores[plain])
    if foes is not None:
        for who, (reader, suffix) in product(("naive", "adaptive"), (("victim", ""), ("judge", "_own_classifier"))):
            read = foes["values"][f"{who}.{reader}"]
            named[f"fused_minus_reconstructed_{who}{suffix}"] = (foes["values"]["fused"], read)
    return {
        f"reproduce.{data}.{name}": [a - b for a, b in zip(ours, theirs, strict=True)]
        for name, (ours, theirs) in named.items()
    }


def _attack(attack: Mapping[str, Any] | None) -> Row:
    return dict(attack) if attack is not None else {"guide": None, "normalisation": None, "epsilon": 0.0}


def _values(found: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Nested numbers of each seed to dotted name -> values; what is no number is left out."""
    flat = [dict(_flat(result, "")) for result in found]
    names = list(dict.fromkeys(name for each in flat for name in each))
    return {name: [each.get(name) for each in flat] for name in names if name not in ("step", "iterations")}


def _flat(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float | None]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{name}.")
        elif inner is None:
            yield prefix + name, None
        else:
            yield prefix + name, _rounded(float(inner))


def _rounded(value: float) -> float:
    return round(value, _DIGITS) if abs(value) >= 0.001 else float(f"{value:.3g}")
