"""The audit as one self-contained HTML page that a privacy officer can read: verdict first."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image

from server_sdk.audit.report import Finding, shown_by
from server_sdk.audit.trial import worst_of
from server_sdk.errors import ServerError

__all__ = ["Row", "render", "rows_of", "write_page"]

Array = npt.NDArray[np.float32]
_SHOWN = 8
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
    """

    label: str
    samples: Array = field(repr=False)


def rows_of(x: Array, y: npt.NDArray[np.int64], findings: Sequence[Sequence[Finding]]) -> list[Row]:
    """What to show of the first seed: a victim of each class, as it was, as each bundle's worst attack rebuilds it, and
    as the decision alone gives it.

    Args:
        x: float32 (N, *input_shape), the victims.
        y: int64 (N).
        findings: as ``report.compose`` takes them.
    """
    worst = [worst_of(each[0].outcomes) for each in findings]
    enough = min(len(outcome.reconstructions) for outcome in worst)
    _, first = np.unique(y[:enough], return_index=True)
    others = np.setdiff1d(np.arange(enough), first)
    chosen = np.concatenate([np.sort(first), others])[:_SHOWN]
    rows = [Row("the patient's input", x[chosen])]
    for each, outcome in zip(findings, worst, strict=True):
        profile = each[0].trained.victim.bundle.manifest.profile
        rows.append(Row(f"rebuilt from what {profile} sends ({outcome.attack})", outcome.reconstructions[chosen]))
    rows.append(Row("rebuilt from the decision alone", findings[0][0].floor.reconstructions[chosen]))
    return rows


def render(report: dict[str, Any], rows: Sequence[Row]) -> str:
    """The page, with nothing to load from elsewhere.

    Args:
        report: from ``report.compose``.
        rows: from ``rows_of``.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("server_sdk.audit", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    measure, shown = shown_by(report)
    audited = [report, *report["beside"]]
    verdict = _verdict(*(shown_by(each)[1] for each in audited))
    return environment.get_template("page.html.j2").render(
        report=report,
        audited=audited,
        verdict="unsure" if verdict == "unproven" else verdict,
        sentence=_VERDICTS[verdict],
        measure=measure,
        shown=shown,
        rows=[{"label": row.label, "pictures": [_picture(sample) for sample in row.samples]} for row in rows],
        points=[
            {"profile": each["profile"], "x": shown_by(each)[1], "y": each["mean"]["accuracy"]} for each in audited
        ],
        plot=_Plot([shown_by(each)[1] for each in audited], [each["mean"]["accuracy"] for each in audited]),
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


class _Plot:
    """Axes of leakage (to the right) and accuracy (upwards), in a box of 640 by 300."""

    left, right, top, bottom = 60.0, 620.0, 15.0, 250.0

    def __init__(self, shown: Sequence[float], accuracy: Sequence[float]) -> None:
        self._x = (min(0.0, *shown), max(0.1, *shown) * 1.1)
        low = min(accuracy) - 0.02
        self._y = (max(0.0, float(np.floor(50 * low)) / 50), min(1.0, max(accuracy) + 0.02))

    def x(self, value: float) -> float:
        low, high = self._x
        return round(self.left + (value - low) / (high - low) * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        low, high = self._y
        return round(float(self.bottom - (value - low) / max(high - low, 1e-9) * (self.bottom - self.top)), 1)

    def x_ticks(self) -> list[float]:
        return [float(value) for value in np.linspace(max(self._x[0], 0.0), self._x[1], 5)]

    def y_ticks(self) -> list[float]:
        return [float(value) for value in np.linspace(*self._y, 5)]


def _picture(sample: Array) -> dict[str, Any]:
    """An image as a PNG in a data URL, a signal as the points of lines in a box of 120 by 40."""
    if sample.ndim == 2:
        across = np.linspace(0, 120, sample.shape[1])
        lines = [" ".join(f"{x:.1f},{40 * (1 - y):.1f}" for x, y in zip(across, lead, strict=True)) for lead in sample]
        return {"lines": lines}
    grey = sample.shape[0] != 3
    levels = np.rint(255 * np.clip(sample, 0, 1)).astype(np.uint8)
    image = Image.fromarray(levels[0] if grey else np.ascontiguousarray(levels.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return {"url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}
