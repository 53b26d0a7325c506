"""The page: docs/reproduction.md from docs/figures/reproduce.json, and from nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.reproduction import prose
from benchmarks.reproduction.plan import HEADLINE
from benchmarks.reproduction.tables import Row, find, spread

__all__ = ["render"]

_GUIDES = {
    "victim": "Guide: the undefended classifier itself",
    "transferred": "Guide: transferred (small, cross-fitted)",
    "own": "Guide: the defended network's own attacked stream",
}
_KINDS = {"residual": "R, each sample", "trace": "M, each sample", "batch": "R, whole batch"}
_SCORES = {
    "undefended": "undefended",
    "twin": "its twin",
    "attacked": "a",
    "recovered": "r",
    "fused": "f",
    "paper": "fused",
    "fitted": "fused, fitted",
}
_NOTHING = "-"


def render(found: Mapping[str, Any]) -> str:
    """The page of one run.

    Args:
        found: the object that ``benchmarks.reproduce`` writes.

    Returns:
        Markdown, ends with a newline.
    """
    seeds = len(found["seeds"])
    lines = [
        "# The paper, reproduced",
        "",
        f"Written by `make reproduce` from [figures/reproduce.json](figures/reproduce.json): change that, not this. "
        f"`{found['command']}`, {found['date']}, cells measured on {_machines(found['data'])}; "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}, mean ± sample standard deviation; accuracies in percent of the "
        "test samples, differences in points.",
        "",
        *(f"Note: {note}." for note in found["notes"]),
        *([""] if found["notes"] else []),
        *(["**A quick run: its figures say nothing.**", ""] if found["quick"] else []),
        "## In short",
        "",
    ]
    for name, data in found["data"].items():
        lines += [*prose.short(name, data, found["samples"]), ""]
    lines += [prose.METHOD, "", *_sizes(found["data"]), ""]
    for name, data in found["data"].items():
        lines += [*_protocol(name, data, "P2"), *_protocol(name, data, "P1")]
        lines += [*_kinds(name, data), *_foes(name, data), *_weights(name, data), *_unequal(name, data)]
        lines += _sweep(name, data)
    lines += [prose.LIMITS, ""]
    return "\n".join(lines)


def _protocol(name: str, data: Row, protocol: str) -> Iterator[str]:
    yield f"## {name}, {protocol}: {prose.PROTOCOLS[protocol]}"
    yield ""
    kind = "residual" if protocol == "P2" else "perturbed"
    if find(data["rows"], kind=kind) is None:
        yield from ("Not measured in this run.", "")
        return
    heads = [*_SCORES.values(), "fused, clean", "fitted, clean", "guide", "agrees", "follows when wrong"]
    for guide, title in _GUIDES.items():
        rows = [row for row in data["rows"] if row["kind"] == kind and row["guide"] == guide]
        if not rows:
            continue
        body = []
        for row in rows:
            trained = "-".join((guide, row["normalisation"], f"{row['epsilon']:g}")) if protocol == "P1" else None
            clean = find(data["rows"], kind=kind, guide=None, trained=trained)
            body.append(
                [
                    *(row["normalisation"], f"{row['epsilon']:g}"),
                    *(_of(row, f"scores.{score}.accuracy") for score in _SCORES),
                    _of(clean, "scores.paper.accuracy"),
                    _of(row, "scores.fitted_clean.accuracy"),
                    *(_of(row, f"follow.paper.{part}") for part in ("guide", "agreement", "follow_when_wrong")),
                ]
            )
        yield from (f"{title}:", "", *_table(["", "eps", *heads], body), "")
    if protocol == "P2":
        clean = find(data["rows"], kind="residual", guide=None)
        parts = ", ".join(
            f"{label} {_of(clean, f'scores.{score}.accuracy')}" for score, label in _SCORES.items() if score != "fitted"
        )
        yield f"Clean test samples: {parts}; foe's own classifier {_of(data['clean'], 'judge.accuracy')}."
        yield ""


def _kinds(name: str, data: Row) -> Iterator[str]:
    yield f"## {name}: what is taken as recovered (P2, eps {HEADLINE.epsilon:g})"
    yield ""
    body = []
    for guide in _GUIDES:
        for normalisation in ("sign", "max"):
            for kind, label in _KINDS.items():
                wanted = {"guide": guide, "normalisation": normalisation, "epsilon": HEADLINE.epsilon}
                row = find(data["rows"], kind=kind, **wanted)
                if row is not None:
                    scores = [
                        _of(row, f"scores.{score}.accuracy") for score in ("recovered", "fused", "paper", "fitted")
                    ]
                    body.append([guide, normalisation, label, *scores])
    yield from _table(["guide", "", "recovered", "r", "f", "fused", "fused, fitted"], body)
    yield ""


def _foes(name: str, data: Row) -> Iterator[str]:
    yield f"## {name}: fused minus reconstructed, naive and adaptive foe side by side"
    yield ""
    if not any(foe["guide"] is not None for foe in data["foes"]):
        yield from ("Not measured in this run.", "")
        return
    yield (
        "Read by the undefended network, and in brackets by the foe's own classifier. `difference` is the fused "
        "decision (the paper's weights) minus what is read off the reconstruction."
    )
    yield ""
    body = []
    for foe in data["foes"]:
        attacked = foe["guide"] is not None
        fused = foe["values"].get("fused")
        cells = [
            "none" if not attacked else foe["protocol"],
            foe["guide"] or _NOTHING,
            foe["normalisation"] or _NOTHING,
        ]
        cells.append(f"{foe['epsilon']:g}")
        cells.append(f"{_of(foe, 'sent.victim')} ({_of(foe, 'sent.judge')})")
        for who in ("naive", "adaptive"):
            cells.append(f"{_of(foe, f'{who}.victim')} ({_of(foe, f'{who}.judge')})")
            cells.append(f"{_minus(fused, foe, f'{who}.victim')} ({_minus(fused, foe, f'{who}.judge')})")
            cells.append(_of(foe, f"{who}.ssim", 3))
        body.append(cells)
    heads = ["", "guide", "", "eps", "x_hat itself"]
    for who in ("naive", "adaptive"):
        heads += [f"{who} foe reads", "difference", "SSIM to x"]
    yield from _table(heads, body)
    yield ""


def _weights(name: str, data: Row) -> Iterator[str]:
    yield f"## {name}: fitted weights (r, f, a)"
    yield ""
    body = []
    for protocol, kind in (("P2", "residual"), ("P1", "perturbed")):
        for row in data["rows"]:
            if row["kind"] == kind and row["guide"] is not None:
                names = [f"weights.{stream}" for stream in ("recovered", "fused", "attacked")]
                triple = [_of(row, weight, 2) for weight in names]
                body.append([protocol, row["guide"], row["normalisation"], f"{row['epsilon']:g}", *triple])
    yield from _table(["", "guide", "", "eps", "r", "f", "a"], body)
    yield ""


def _unequal(name: str, data: Row) -> Iterator[str]:
    headed = find(data["rows"], kind="residual", **asdict(HEADLINE))
    if headed is None or "scores.paper.auc" not in headed["values"]:
        return
    yield f"## {name}: balanced accuracy / area under the ROC curve"
    yield ""
    body = []
    for protocol, kind in (("P2", "residual"), ("P1", "perturbed")):
        for row in data["rows"]:
            if row["kind"] != kind or (row["guide"] is None and row["trained"] is not None):
                continue
            head = [protocol, row["guide"] or "clean", row["normalisation"] or _NOTHING, f"{row['epsilon']:g}"]
            pairs = [f"{_of(row, f'scores.{score}.balanced')} / {_of(row, f'scores.{score}.auc')}" for score in _SCORES]
            body.append([*head, *pairs])
    yield from _table(["", "guide", "", "eps", *_SCORES.values()], body)
    yield ""


def _sweep(name: str, data: Row) -> Iterator[str]:
    yield f"## {name}: mu and the number of iterations"
    yield ""
    yield prose.SWEEP
    yield ""
    body = []
    for row in data["sweep"]:
        label = "closed form" if row["step"] is None else f"{row['step']:g}"
        body.append(
            [
                label,
                _NOTHING if row["iterations"] is None else str(row["iterations"]),
                _NOTHING if row["step"] is None else f"{(1 - row['step']) ** row['iterations']:.2g}",
                *(_small(row, part) for part in ("missing", "beyond")),
                _of(row, "accuracy"),
            ]
        )
    heads = ["mu", "k", "(1-mu)^k", "M_k against M*", "M_k / (1-(1-mu)^k) against M*", "stream r"]
    yield from _table(heads, body)
    yield ""


def _sizes(found: Mapping[str, Row]) -> Iterator[str]:
    names = list(next(iter(found.values()))["sizes"])
    yield from _table(["samples", *names], [[data, *map(str, row["sizes"].values())] for data, row in found.items()])


def _machines(found: Mapping[str, Row]) -> str:
    cells: Counter[str] = Counter()
    for data in found.values():
        cells.update(data["machines"])
    return ", ".join(f"{machine} ({count})" for machine, count in cells.most_common())


def _minus(fused: Sequence[float] | None, foe: Row, name: str) -> str:
    read = foe["values"].get(name)
    if fused is None or read is None:
        return _NOTHING
    return prose.signed([a - b for a, b in zip(fused, read, strict=True)])


def _of(row: Row | None, name: str, digits: int = 1) -> str:
    """Mean ± spread of one value of a row, or of plain values."""
    values = None if row is None else row.get("values", row).get(name)
    found = spread(values) if values is not None else None
    return _NOTHING if found is None else prose.plain(found, digits)


def _small(row: Row, name: str) -> str:
    found = spread(row["values"][name])
    return _NOTHING if found is None else f"{found[0]:.1e}"


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in body:
        yield "| " + " | ".join(row) + " |"
