"""The page, from findings made by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from server_sdk.audit.finding import Finding
from server_sdk.audit.outcome import worst_of
from server_sdk.audit.page import render, rows_of
from server_sdk.audit.plots import Scatter, scatter
from server_sdk.audit.report import compose
from server_sdk.errors import ServerError

Make = Callable[..., Finding]
IMAGE, SIGNAL, COLOUR = (1, 12, 12), (2, 40), (3, 12, 12)


def inputs(shape: tuple[int, ...]) -> np.ndarray:
    """The victims of a finding with seed 0."""
    return np.random.default_rng(0).random((20, *shape)).astype(np.float32)


def report_of(*findings: Sequence[Finding], data: str = "mnist") -> dict[str, Any]:
    cells = [[each.as_fields() for each in seeds] for seeds in findings]
    return compose(cells, data=data, command="psgl-server audit")


def page(*findings: Sequence[Finding], shape: tuple[int, ...] = IMAGE, data: str = "mnist") -> str:
    report = report_of(*findings, data=data)
    rows = rows_of(inputs(shape), np.arange(20) % 3, report, [each[0].arrays() for each in findings])
    return render(json.loads(json.dumps(report)), rows)


@pytest.mark.parametrize(
    ("noise", "beside", "verdict"),
    [
        (0.0, [], "can rebuild its inputs"),
        (1.0, [], "not shown to work"),
        (1.0, [1.0], "not shown to work"),
        (1.0, [0.0], "hardly more than the decision"),
        (0.87, [1.0, 0.0], "shows more than the decision"),
    ],
)
def test_the_verdict(noise: float, beside: list[float], verdict: str, finding: Make) -> None:
    text = page([finding("paper", IMAGE, noise)], *([finding("other", IMAGE, each)] for each in beside))
    shown = re.search(r"<strong>(.*?)</strong>", text)
    assert shown and verdict in shown[1]


@pytest.mark.parametrize("shape", [IMAGE, SIGNAL, COLOUR])
def test_a_page_needs_nothing_from_elsewhere_and_is_well_formed(shape: tuple[int, ...], finding: Make) -> None:
    paper = [finding("paper", shape, 0.1, guide=True, bits=16.0), finding("paper", shape, 0.2, guide=True, seed=1)]
    text = page(paper, [finding("vanilla", shape, 0.0)], shape=shape)
    assert not re.findall(r'(?:src|href)="(?!data:)|url\(|<script', text)
    pictures = ("data:image/png", 8 * 4) if len(shape) == 3 else ("<polyline", 4 * 2 * (1 + 3 * 2))
    assert text.count(pictures[0]) == pictures[1]
    for words in (
        "repeats its mistakes",
        "P2, decision",
        "stream recovered",
        "at most 16.0 bits",
        "No bound",
        "points lost",
    ):
        assert words in text
    ElementTree.fromstring(re.sub(r"<(meta|img)([^>]*?)/?>", r"<\1\2/>", text.split("\n", 1)[1]))


def test_names_are_text_and_never_markup(finding: Make) -> None:
    text = page([finding("<script>alert(1)</script>", IMAGE, 0.1, name="<b>")], data='"><img src=x>')
    assert "<script>" not in text and "<img src=x>" not in text and "<b>" not in text
    assert "&lt;script&gt;" in text


def test_one_victim_of_each_class_comes_first(finding: Make) -> None:
    found = finding("paper", IMAGE, 0.1)
    x, y = inputs(IMAGE), np.array([2, 2, 2, 2, 1, 2, 0, *[2] * 13])
    rows = rows_of(x, y, report_of([found]), [found.arrays()])
    assert np.array_equal(rows[0].samples[:3], x[[0, 4, 6]])
    assert [len(row.samples) for row in rows] == [8, 8, 8]
    assert np.array_equal(rows[1].samples[:3], worst_of(found.outcomes).reconstructions[[0, 4, 6]])
    with pytest.raises(ServerError, match="not of this report"):
        rows_of(x, y, report_of([found]), [])
    with pytest.raises(ServerError, match="not of this report"):
        rows_of(inputs(COLOUR), y, report_of([found]), [found.arrays()])


def test_signals_are_drawn_over_the_inputs_that_they_are_of(finding: Make) -> None:
    found = finding("paper", SIGNAL, 0.1)
    rows = rows_of(inputs(SIGNAL), np.arange(20) % 3, report_of([found]), [found.arrays()])
    assert rows[0].against is None and [len(row.samples) for row in rows] == [4, 4, 4]
    assert all(np.array_equal(row.against, rows[0].samples) for row in rows[1:] if row.against is not None)
    text = page([found], shape=SIGNAL)
    assert text.count('class="against"') == text.count('class="rebuilt"') == 4 * 2 * 2


def test_the_plot_holds_every_point_with_its_whiskers(finding: Make) -> None:
    findings = [
        [finding("paper", IMAGE, noise, seed=seed, accuracy=accuracy) for seed, accuracy in enumerate((0.8, 0.9, 0.85))]
        for noise in (0.0, 0.3, 1.0)
    ]
    report = report_of(*findings)
    plot = scatter(report, 0.01)
    assert plot.what == "accuracy" and [point.audited for point in plot.points] == [True, False, False]
    assert plot.left <= plot.floor < plot.little < plot.right
    for point in plot.points:
        assert plot.left <= point.left <= point.x <= point.right <= plot.right
        assert plot.top <= point.high < point.y < point.low <= plot.bottom, "upwards is less in SVG"
    assert plot.points[0].x > plot.points[1].x > plot.points[2].x
    for point in plot.points:
        assert point.text_x > point.right if point.anchor == "start" else point.text_x < point.left, "clear of whiskers"
    ticks = [place for place, _ in plot.y_ticks]
    assert ticks == sorted(ticks, reverse=True) and ticks[0] == Scatter.bottom and ticks[-1] == Scatter.top


def test_two_classes_are_plotted_by_auc(finding: Make) -> None:
    plot = scatter(report_of([finding("paper", SIGNAL, 0.2, classes=2)]), 0.01)
    assert plot.what == "AUC" and all("%" not in text for _, text in plot.y_ticks)


def test_labels_of_points_in_one_place_do_not_cover_each_other(finding: Make) -> None:
    plot = scatter(report_of(*([finding("paper", IMAGE, 0.2, name=f"number {n}")] for n in range(5))), 0.01)
    assert len({(point.text_x, point.text_y) for point in plot.points}) == 5


def test_no_axis_goes_beyond_what_can_be(finding: Make) -> None:
    plot = scatter(
        report_of([finding("paper", IMAGE, 0.2, accuracy=1.0)], [finding("other", IMAGE, 0.2, accuracy=0.0)]), 0.01
    )
    assert plot.y_ticks[0][1] == "0 %" and plot.y_ticks[-1][1] == "100 %"
