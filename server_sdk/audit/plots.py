"""Geometry of the page's drawings: what the template puts into inline SVG, in units of their boxes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from server_sdk.audit.report import bundle_label, shown_by

__all__ = ["Point", "Scatter", "picture", "scatter"]

Array = npt.NDArray[np.float32]
_WIDTH, _LEAD_HEIGHT = 160.0, 64.0
_MOST_LEADS, _MOST_STEPS = 4, 400
_LETTER = 6.6  # mean width of a letter of the labels


@dataclass(frozen=True)
class Point:
    """A bundle in the plot.

    Attributes:
        label: its name.
        audited: the one that the page is about.
        x, y: centre, mean over the seeds.
        left, right, high, low: ends of the whiskers: the lowest and highest seed.
        text_x, text_y, anchor: of the label.
    """

    label: str
    audited: bool
    x: float
    y: float
    left: float
    right: float
    high: float
    low: float
    text_x: float
    text_y: float
    anchor: str


@dataclass(frozen=True)
class Scatter:
    """Accuracy (upwards) against leakage (to the right), in a box of 640 by 330.

    Attributes:
        what: the quantity upwards, ``accuracy`` or ``AUC``.
        points: the bundles.
        x_ticks, y_ticks: (place, text).
        floor: place of leakage 0.
        little: right end of the zone that counts as hardly more than the decision.
    """

    what: str
    points: Sequence[Point]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    floor: float
    little: float
    left: float = 62.0
    right: float = 625.0
    top: float = 28.0
    bottom: float = 270.0


def scatter(report: Mapping[str, Any], little: float) -> Scatter:
    """The plot of a report: AUC upwards where there are two classes, else accuracy.

    Args:
        report: from ``report.compose``.
        little: excess up to which an attack shows hardly more than the decision.
    """
    everything = (report, *report["beside"])
    auc = report["classes"] == 2 and all(each["mean"]["auc"] is not None for each in everything)
    what, key = ("AUC", "auc") if auc else ("accuracy", "accuracy")
    shown = [shown_by(each)[1] for each in everything]
    across = [each["spread"]["excess"] for each in everything]
    upwards = [each["spread"][key] for each in everything]
    left, right, top, bottom = Scatter.left, Scatter.right, Scatter.top, Scatter.bottom
    x_low, x_high, x_step = _axis(min(0.0, *(low for low, _ in across)), max(0.1, *(high for _, high in across)))
    y_low, y_high, y_step = _axis(
        max(0.0, min(low for low, _ in upwards) - 0.02), min(1.0, max(high for _, high in upwards) + 0.02)
    )

    def x(value: float) -> float:
        return round(left + (value - x_low) / (x_high - x_low) * (right - left), 1)

    def y(value: float) -> float:
        return round(bottom - (value - y_low) / (y_high - y_low) * (bottom - top), 1)

    spans = [
        (x(value), y(each["mean"][key]), x(xs[0]), x(xs[1]), y(ys[1]), y(ys[0]))
        for value, each, xs, ys in zip(shown, everything, across, upwards, strict=True)
    ]
    boxes = [
        (min(left_end, at - 8), min(high, up - 8), max(right_end, at + 8), max(low, up + 8))
        for at, up, left_end, right_end, high, low in spans
    ]
    points: list[Point] = []
    for each, span, own in zip(everything, spans, list(boxes), strict=True):
        label = bundle_label(each, report)
        text_x, text_y, anchor, box = _place(own, span[1], label, boxes)
        boxes.append(box)
        points.append(Point(label, each is report, *span, text_x, text_y, anchor))
    percent = "" if auc else " %"
    scale, digits = (1, 2 if y_step >= 0.01 else 3) if auc else (100, 0 if y_step >= 0.01 else 1)
    return Scatter(
        what,
        points,
        [(x(tick), f"{tick:.2f}") for tick in _ticks(x_low, x_high, x_step)],
        [(y(tick), f"{scale * tick:.{digits}f}{percent}") for tick in _ticks(y_low, y_high, y_step)],
        x(0.0),
        x(min(little, x_high)),
    )


def _axis(low: float, high: float) -> tuple[float, float, float]:
    """Round ends that hold low and high, and a round step between ticks."""
    rough = max(high - low, 1e-3) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = float(next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough))
    return float(np.floor(low / step + 1e-9) * step), float(np.ceil(high / step - 1e-9) * step), step


def _ticks(low: float, high: float, step: float) -> list[float]:
    return [round(low + number * step, 6) + 0.0 for number in range(round((high - low) / step) + 1)]


Box = tuple[float, float, float, float]


def _place(own: Box, middle: float, label: str, taken: Sequence[Box]) -> tuple[float, float, str, Box]:
    """A place for a label beside its point and whiskers: the first that is free and inside, else the first."""
    width = _LETTER * len(label)
    choices = []
    for dy in (4, -14, 22, -30, 38):
        y = middle + dy
        for x, anchor, start in ((own[2] + 4, "start", own[2] + 4), (own[0] - 4, "end", own[0] - 4 - width)):
            choices.append((x, y, anchor, (start, y - 10, start + width, y + 3)))

    def free(box: Box) -> bool:
        inside = (
            box[0] >= Scatter.left and box[2] <= Scatter.right and Scatter.top <= box[1] and box[3] <= Scatter.bottom
        )
        return inside and not any(
            box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
        )

    return next((choice for choice in choices if free(choice[3])), choices[0])


def picture(sample: Array, against: Array | None = None) -> dict[str, Any]:
    """An image as a PNG in a data URL; a signal as lines, one lead below the other.

    Args:
        sample: float32 (C, H, W) or (C, T) in [0, 1].
        against: what a signal is drawn over, of the same shape.

    Returns:
        ``url``, or ``lines`` and ``against`` (points of SVG polylines) with the ``width`` and ``height`` of their box.
    """
    if sample.ndim == 2:
        height = _LEAD_HEIGHT * min(len(sample), _MOST_LEADS)
        behind = [] if against is None else _lines(against)
        return {"lines": _lines(sample), "against": behind, "width": _WIDTH, "height": height}
    grey = sample.shape[0] != 3
    levels = np.rint(255 * np.clip(sample, 0, 1)).astype(np.uint8)
    image = Image.fromarray(levels[0] if grey else np.ascontiguousarray(levels.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return {"url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}


def _lines(leads: Array) -> list[str]:
    kept = np.unique(np.linspace(0, leads.shape[1] - 1, min(leads.shape[1], _MOST_STEPS)).round().astype(int))
    across = np.linspace(2, _WIDTH - 2, len(kept))
    lines = []
    for number, lead in enumerate(leads[:_MOST_LEADS]):
        down = _LEAD_HEIGHT * number + 3 + (_LEAD_HEIGHT - 6) * (1 - np.clip(lead[kept], 0, 1))
        lines.append(" ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True)))
    return lines
