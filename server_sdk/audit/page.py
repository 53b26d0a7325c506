"""The audit as one self-contained HTML page that a privacy officer can read: verdict first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt

from server_sdk.audit.exposure import exposure_in_words
from server_sdk.audit.plots import picture, scatter
from server_sdk.audit.report import attack_label, beyond_in_words, bundle_label, shown_by
from server_sdk.errors import ServerError

__all__ = ["Row", "render", "rows_of", "write_page"]

Array = npt.NDArray[np.float32]
_IMAGES, _SIGNALS = 8, 4
_LITTLE, _SOME = 0.01, 0.05
_VERDICTS = {
    "good": "What this device sends shows hardly more than the decision itself.",
    "unsure": "What this device sends shows more than the decision: judge by the pictures whether that is too much.",
    "unproven": "These attacks found little, but were not shown to work: audit an undefended bundle too (--beside).",
    "bad": "Whoever reads what this device sends can rebuild its inputs.",
}


@dataclass(frozen=True)
class Row:
    """Pictures side by side.

    Attributes:
        label: what they are.
        samples: float32 (N, C, H, W) or (N, C, T) in [0, 1].
        against: what signals are drawn over: the inputs that they are of.
    """

    label: str
    samples: Array = field(repr=False)
    against: Array | None = field(default=None, repr=False)


def rows_of(
    x: Array, y: npt.NDArray[np.int64], report: Mapping[str, Any], arrays: Sequence[Mapping[str, Array]]
) -> list[Row]:
    """What to show of the first seed: a victim of each class, as it was, as each bundle's worst attack rebuilds it, and
    as the decision alone gives it.

    Args:
        x: float32 (N, *input_shape), the victims of the first seed.
        y: int64 (N).
        report: from ``report.compose``.
        arrays: of the report's bundles in its order, each ``Finding.arrays`` of the first seed, as it is or read back.

    Raises:
        ServerError: arrays that are not those of the report.
    """
    everything = (report, *report["beside"])
    shapes = {tuple(part.shape[1:]) for each in arrays for part in each.values()}
    if len(arrays) != len(everything) or shapes != {x.shape[1:]}:
        raise ServerError("the arrays are not of this report's bundles, or not of these victims")
    enough = min(len(x), *(len(each["worst"]) for each in arrays))
    _, first = np.unique(y[:enough], return_index=True)
    others = np.setdiff1d(np.arange(enough), first)
    chosen = np.concatenate([np.sort(first), others])[: _IMAGES if x.ndim == 4 else _SIGNALS]
    rows = [Row("the patient's input", x[chosen])]
    for audited, each in zip(everything, arrays, strict=True):
        attack = attack_label(audited["seeds"][0]["worst_attack"], audited)
        label = f"rebuilt from what {bundle_label(audited, report)} sends ({attack})"
        rows.append(Row(label, each["worst"][chosen], x[chosen]))
    rows.append(Row("rebuilt from the decision alone", arrays[0]["floor"][chosen], x[chosen]))
    return rows


def render(report: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The page, with nothing to load from elsewhere.

    Args:
        report: from ``report.compose``, as it is or read back from JSON.
        rows: from ``rows_of``.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("server_sdk.audit", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda value: "-" if value is None else f"{100 * value:.1f} %",
        "figure": lambda value: "-" if value is None else f"{value:.3f}",
        "points": lambda value: "-" if value is None else f"{value:+.1f}",
    }
    measure, shown = shown_by(report)
    audited = [report, *report["beside"]]
    verdict = _verdict(*(shown_by(each)[1] for each in audited))
    drawn = [
        [picture(sample, None if row.against is None else row.against[n]) for n, sample in enumerate(row.samples)]
        for row in rows
    ]
    return environment.get_template("page.html.j2").render(
        report=report,
        audited=[
            {
                **each,
                "label": bundle_label(each, report),
                "shown": shown_by(each)[1],
                "exposed": exposure_in_words(each["seeds"][0]["exposure"]),
                "worst": ", ".join(attack_label(name, each) for name in each["worst_attacks"]),
                "attack_labels": {name: attack_label(name, each) for name in each["seeds"][0]["attacks"]},
            }
            for each in audited
        ],
        verdict="unsure" if verdict == "unproven" else verdict,
        sentence=_VERDICTS[verdict],
        measure=measure,
        beyond=beyond_in_words(measure, shown),
        little=_LITTLE,
        rows=[{"label": row.label, "pictures": pictures} for row, pictures in zip(rows, drawn, strict=True)],
        signals=len(report["input_shape"]) == 2,
        plot=scatter(report, _LITTLE),
        two_classes=report["classes"] == 2,
    )


def write_page(path: Path, text: str) -> None:
    """Write the page.

    Raises:
        ServerError: the disk refuses.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise ServerError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def _verdict(shown: float, *beside: float) -> str:
    """A foe that breaks nothing proves nothing: it must have broken a bundle that stands beside."""
    if shown > _SOME:
        return "bad"
    if not any(other > _SOME for other in beside):
        return "unproven"
    return "good" if shown <= _LITTLE else "unsure"
