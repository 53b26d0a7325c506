"""The report and its page, from findings made by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
import pytest

from server_sdk.audit.metrics import likeness
from server_sdk.audit.page import render, rows_of
from server_sdk.audit.report import Finding, compose, shown_by
from server_sdk.audit.trial import Outcome, worst_of

IMAGE, SIGNAL, COLOUR = (1, 12, 12), (2, 40), (3, 12, 12)


def finding(profile: str, shape: tuple[int, ...], noise: float, *, guide: bool = False, seed: int = 0) -> Finding:
    """An attack that adds so much noise to the inputs, and a floor of nothing but the mean."""
    generator = np.random.default_rng(seed)
    x = generator.random((20, *shape)).astype(np.float32)
    mean = np.broadcast_to(x.mean(axis=0), x.shape).astype(np.float32)

    def outcome(name: str, made: np.ndarray) -> Outcome:
        n = len(made)
        return Outcome(name, likeness(made, x[:n]), likeness(mean[:n], x[:n]), 0.5, made)

    noisy = np.clip((1 - noise) * x + noise * generator.random(x.shape), 0, 1).astype(np.float32)
    evaluation: dict[str, Any] = {"accuracy": 0.9, "streams": {"attacked": 0.9}, "samples": 20}
    figures: dict[str, Any] = {"evaluation": evaluation, "bytes_per_sample": 100.0}
    if guide:
        evaluation |= {"guide_accuracy": 0.8, "guide_agreement": 0.7, "follow_when_wrong": 0.1}
        figures["clean"] = {"accuracy": 0.85}
    bundle = SimpleNamespace(id="0123", manifest=SimpleNamespace(profile=profile))
    trained = SimpleNamespace(victim=SimpleNamespace(bundle=bundle), figures=figures)
    return Finding(
        seed, cast(Any, trained), outcome("floor", mean), [outcome("weak", mean), outcome("strong", noisy[:9])]
    )


def page(*findings: Sequence[Finding], shape: tuple[int, ...] = IMAGE, data: str = "mnist") -> str:
    x = np.random.default_rng(0).random((20, *shape)).astype(np.float32)
    return render(compose(findings, data=data, command="psgl-server audit"), rows_of(x, np.arange(20) % 3, findings))


def test_the_report_means_over_seeds_and_names_the_worst() -> None:
    one, two = finding("paper", IMAGE, 0.2), finding("paper", IMAGE, 0.5, seed=1)
    report = compose([[one, two], [finding("vanilla", IMAGE, 0.0)]], data="mnist", command="c")
    json.dumps(report, allow_nan=False)
    assert [seed["worst_attack"] for seed in report["seeds"]] == ["strong", "strong"]
    excess = [worst_of(each.outcomes).excess["ssim"] for each in (one, two)]
    assert report["mean"]["excess"]["ssim"] == pytest.approx(np.mean(cast(Any, excess)))
    assert [each["profile"] for each in report["beside"]] == ["vanilla"]
    assert shown_by(report)[0] == "SSIM"
    assert shown_by(compose([[finding("paper", SIGNAL, 0.2)]], data="ecg", command="c"))[0] == "correlation"


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
def test_the_verdict(noise: float, beside: list[float], verdict: str) -> None:
    text = page([finding("paper", IMAGE, noise)], *([finding("other", IMAGE, each)] for each in beside))
    shown = re.search(r"<strong>(.*?)</strong>", text)
    assert shown and verdict in shown[1]


@pytest.mark.parametrize("shape", [IMAGE, SIGNAL, COLOUR])
def test_a_page_needs_nothing_from_elsewhere_and_is_well_formed(shape: tuple[int, ...]) -> None:
    text = page([finding("paper", shape, 0.1, guide=True)], [finding("vanilla", shape, 0.0)], shape=shape)
    assert not re.findall(r'(?:src|href)="(?!data:)|url\(', text)
    assert text.count("data:image/png" if len(shape) == 3 else "<polyline") >= 8 * 4
    assert "repeats its mistakes in" in text
    body = re.sub(r"<(meta|img|circle)([^>]*?)/?>", r"<\1\2/>", text.split("\n", 1)[1])
    ElementTree.fromstring(body)


def test_names_are_text_and_never_markup() -> None:
    text = page([finding("<script>alert(1)</script>", IMAGE, 0.1)], data='"><img src=x>')
    assert "<script>" not in text and "<img src=x>" not in text
    assert "&lt;script&gt;" in text


def test_one_victim_of_each_class_comes_first() -> None:
    found = finding("paper", IMAGE, 0.1)
    y = np.array([2, 2, 2, 2, 1, 2, 0, *[2] * 13])
    x = np.random.default_rng(0).random((20, *IMAGE)).astype(np.float32)
    rows = rows_of(x, y, [[found]])
    assert np.array_equal(rows[0].samples[:3], x[[0, 4, 6]])
    assert [len(row.samples) for row in rows] == [8, 8, 8]
    assert np.array_equal(rows[1].samples[:3], worst_of(found.outcomes).reconstructions[[0, 4, 6]])
