"""The report from plain fields, wherever they were found, and its table on a terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from server_sdk.audit.finding import Finding
from server_sdk.audit.outcome import worst_of
from server_sdk.audit.report import attack_label, beyond_in_words, bundle_label, compose, shown_by
from server_sdk.audit.table import print_table
from server_sdk.errors import ServerError

Make = Callable[..., Finding]
IMAGE, SIGNAL = (1, 12, 12), (2, 40)


def report_of(*findings: list[Finding], data: str = "mnist") -> dict[str, Any]:
    return compose([[each.as_fields() for each in seeds] for seeds in findings], data=data, command="c")


def test_it_means_over_seeds_and_names_the_worst(finding: Make) -> None:
    one, two = finding("paper", IMAGE, 0.2), finding("paper", IMAGE, 0.5, seed=1, accuracy=0.8)
    report = report_of([one, two], [finding("vanilla", IMAGE, 0.0)])
    assert [seed["worst_attack"] for seed in report["seeds"]] == ["strong", "strong"]
    excess = [cast(float, worst_of(each.outcomes).excess["ssim"]) for each in (one, two)]
    assert report["mean"]["excess"]["ssim"] == pytest.approx(np.mean(excess))
    assert report["spread"]["excess"] == pytest.approx(sorted(excess))
    assert report["mean"]["accuracy"] == pytest.approx(0.85) and report["spread"]["accuracy"] == [0.8, 0.9]
    assert [each["profile"] for each in report["beside"]] == ["vanilla"]
    assert shown_by(report)[0] == "SSIM"
    assert shown_by(report_of([finding("paper", SIGNAL, 0.2)]))[0] == "correlation"


def test_what_was_lost_is_counted_from_the_first_undefended_bundle(finding: Make) -> None:
    report = report_of(
        [finding("paper", IMAGE, 0.2, accuracy=0.6)],
        [finding("vanilla", IMAGE, 0.0, accuracy=0.9)],
        [finding("vanilla", IMAGE, 0.0, accuracy=0.95, name="later")],
    )
    lost = [each["lost"] for each in (report, *report["beside"])]
    assert [each["accuracy_points"] for each in lost] == pytest.approx([30, 0, -5])
    assert [each["auc_points"] for each in lost] == pytest.approx([30, 0, -5])
    assert report_of([finding("paper", IMAGE, 0.2)])["lost"] is None


def test_cells_of_other_processes_are_put_together_alike(finding: Make) -> None:
    findings = [[finding("paper", IMAGE, 0.2, guide=True, bits=16.0, seed=n) for n in (0, 1)]]
    cells = [[each.as_fields() for each in seeds] for seeds in findings]
    stored = json.loads(json.dumps(cells, allow_nan=False))
    assert compose(stored, data="d", command="c") == json.loads(json.dumps(compose(cells, data="d", command="c")))
    for wrong in ([], [[]], [[*cells[0], finding("vanilla", IMAGE, 0.2).as_fields()]]):
        with pytest.raises(ServerError, match=r"at least one|different kinds"):
            compose(wrong, data="d", command="c")


def test_protocols_stand_side_by_side(finding: Make) -> None:
    report = report_of([finding("paper", IMAGE, 0.2, guide=True)], [finding("vanilla", IMAGE, 0.0)])
    assert report["mean"]["protocols"]["P1"]["accuracy"] == 0.9 and report["mean"]["protocols"]["P2"]["accuracy"] == 0.3
    assert report["mean"]["clean_accuracy"] == 0.85
    (seed,) = report["seeds"]
    assert seed["protocols"]["P1"]["follow_when_wrong"] == 0.1
    assert seed["follow_when_wrong_without_perturbation"] == 0.06, "of the fleet that P2 trained, asked unperturbed"
    (vanilla,) = report["beside"]
    assert set(vanilla["mean"]["protocols"]) == {"P1"}
    assert vanilla["mean"]["follow_when_wrong_without_perturbation"] is None


def test_names_tell_bundles_of_one_profile_apart(finding: Make) -> None:
    report = report_of(*([finding("gaussian", IMAGE, 0.2, name=name)] for name in ("one", "two")))
    assert [bundle_label(each, report) for each in (report, *report["beside"])] == ["gaussian (one)", "gaussian (two)"]
    assert bundle_label(report, {**report, "beside": []}) == "gaussian"


def test_averaging_over_a_frozen_front_is_called_a_supposition(finding: Make) -> None:
    frozen, trained = (report_of([finding("hardened", IMAGE, 0.2, frozen=each)]) for each in (True, False))
    attack = "averaging_decoder_mlp"
    assert frozen["worst_attacks"] == ["weak"], "what the device does not send is no part of the verdict"
    assert attack_label(attack, frozen) == f"{attack}, if noise were drawn anew"
    assert attack_label("strong", trained) == "strong" and attack_label("weak", frozen) == "weak"


def test_the_table_says_it_all(finding: Make) -> None:
    out = io.StringIO()
    report = report_of([finding("paper", IMAGE, 0.2, guide=True, bits=16.0)], [finding("vanilla", IMAGE, 0.0)])
    print_table(report, Console(file=out, width=100))
    text = " ".join(out.getvalue().split())
    for words in (
        f"paper: the worst attack shows {shown_by(report)[1]:.3f} SSIM more than the decision alone tells",
        "P1 90.0 70.0 95.0 85.0 80.0 70.0 10.0",
        "P2 30.0 70.0 95.0",
        "recovered 87.0",
        "(6.0% with no perturbation at all)",
        "at most 16.0 bits of its sample",
        "No bound: nothing limits",
        "side by side",
        "100 no bound",
    ):
        assert words in text, (words, text)


def test_what_stays_below_the_floor_is_less() -> None:
    assert beyond_in_words("SSIM", -0.0071) == "0.007 SSIM less than the decision alone tells"
    assert beyond_in_words("correlation", 0.4621) == "0.462 correlation more than the decision alone tells"
