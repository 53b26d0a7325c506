"""``psgl-server audit`` as an auditor types it: fleet, broker and attacks as real as in use."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.batch import Samples
from edge_sdk.dataset import save_dataset


def run_audit(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server_sdk.cli", "audit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, samples: Callable[[int, int], Samples]) -> Path:
    path = tmp_path_factory.mktemp("data") / "patterns.npz"
    save_dataset(path, samples(600, 11), samples(90, 12))
    return path


def test_an_audit(built: dict[str, Any], data: Path, tmp_path: Path) -> None:
    short = ("--rounds", 20, "--epochs", 20, "--width", 16, "--steps", 60, "--sends", 4, "--threads", 1)
    bundles = (built["paper"].path, "--beside", built["vanilla"].path, "--beside", built["gaussian"].path)
    done = run_audit(*bundles, "--data", data, "--out", tmp_path / "out", *short)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "audit.json").read_text())
    for audited, profile in zip((report, *report["beside"]), ("paper", "vanilla", "gaussian"), strict=True):
        assert (audited["bundle"], audited["profile"]) == (built[profile].bundle.id, profile)
        (seed,) = audited["seeds"]
        often = {"averaging_decoder_convolution", "averaging_decoder_mlp"} if profile == "gaussian" else set()
        assert set(seed["attacks"]) == {"decoder_convolution", "decoder_mlp", "white_box", *often}
        worst, whole = seed["attacks"][seed["worst_attack"]], seed["attacks"]["decoder_mlp"]
        assert seed["excess"] == worst["excess"]
        assert worst["excess"]["ssim"] == max(each["excess"]["ssim"] for each in seed["attacks"].values())
        assert whole["victims"] == 90 and seed["attacks"]["white_box"]["victims"] == 64
        assert whole["excess"]["ssim"] == pytest.approx(whole["ssim"] - seed["floor"]["ssim"])
        assert audited["mean"]["excess"]["ssim"] > 0.05, "no profile hides its inputs from this foe"
        assert worst["nmse"] < 0.7 * seed["floor"]["nmse"]
        assert set(seed["protocols"]) == ({"P1", "P2"} if profile == "paper" else {"P1"})
        for measured in seed["protocols"].values():
            assert measured["samples"] == 90 and (measured["clean"] is None) == (profile != "paper")
            assert 0 <= measured["balanced_accuracy"] <= 1 and 0.5 < measured["auc"] <= 1
        assert seed["protocols"]["P1"]["balanced_accuracy"] == pytest.approx(
            seed["protocols"]["P1"]["accuracy"], abs=0.25 if profile == "gaussian" else 1e-6
        ), "classes are equally frequent; the audit draws other noise than the device"
        exposure = seed["exposure"]
        assert (exposure["training_samples"], exposure["training_sends"], exposure["front_versions"]) == (300, 640, 20)
        assert exposure["most_sends_of_a_sample"] == 3 and exposure["bits_per_sample"] is None
        without = seed["follow_when_wrong_without_perturbation"]
        assert (without is None) == (profile != "paper")
        assert f"shows {audited['mean']['excess']['ssim']:.3f} SSIM more than" in " ".join(done.stdout.split())
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "can rebuild its inputs" in page and "P2, decision" in page
    passed = [
        json.loads((tmp_path / "out" / f"bundle-0-seed-0{end}" / "device-1.json").read_text())["unperturbed"]
        for end in ("", "-p2")
    ]
    assert passed == [0, 640], "P1 perturbs every training sample, P2 none"
    assert report["lost"]["accuracy_points"] == pytest.approx(
        100 * (report["beside"][0]["mean"]["accuracy"] - report["mean"]["accuracy"])
    )


def test_an_audit_of_signals_in_a_sensors_units(tmp_path: Path) -> None:
    """One lead, int16, normal beats against others: build and audit as one would an ECG."""
    generator = np.random.default_rng(0)
    beat = 900 * np.exp(-(((np.arange(32) - 15) / 3) ** 2))

    def beats(count: int) -> Samples:
        y = np.arange(count) % 2
        drift = generator.normal(0, 150, (count, 1))
        return Samples((np.where(y, -1, 1)[:, None] * beat + drift).astype(np.int16)[:, None], y.astype(np.int64))

    save_dataset(tmp_path / "guide.npz", beats(60), beats(20))
    save_dataset(tmp_path / "ecg.npz", beats(240), beats(40))
    built = [sys.executable, "-m", "export.cli", "build", "--profile", "vanilla", "-o", str(tmp_path / "ecg.psgl")]
    done = subprocess.run([*built, "--data", str(tmp_path / "guide.npz")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "the 0.1 and 99.9 percentiles" in done.stderr, done.stderr
    short = ("--rounds", 8, "--epochs", 8, "--width", 8, "--steps", 20, "--threads", 1, "--json")
    done = run_audit(tmp_path / "ecg.psgl", "--data", tmp_path / "ecg.npz", "--out", tmp_path / "out", *short)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["input_shape"] == [1, 32] and report["mean"]["auc"] > 0.5
    assert report["mean"]["excess"]["ssim"] is None and report["mean"]["excess"]["correlation"] is not None
    page = (tmp_path / "out" / "audit.html").read_text()
    assert 'class="rebuilt"' in page and "AUC against leakage" in page


def test_what_cannot_be_audited_is_said_in_one_line(built: dict[str, Any], data: Path, tmp_path: Path) -> None:
    bundle = built["vanilla"].path
    raw = Samples(np.zeros((30, 1, 8, 8), np.int16), np.arange(30) % 3)
    save_dataset(tmp_path / "int16.npz", raw, raw)
    for arguments, words in (
        ((bundle, "--data", data, "--seeds", 0), "--seeds"),
        ((bundle, "--data", tmp_path / "none.npz"), "there is no data file"),
        ((tmp_path / "none.psgl", "--data", data), "there is no bundle"),
        ((bundle, "--data", data, "--foe", 1.5), "share"),
        ((bundle, "--data", data, "--protocols", "P2"), "--protocols is P1 or P1,P2"),
        ((bundle, "--data", tmp_path / "int16.npz"), "--input-range LOW HIGH"),
        ((bundle, "--data", data, "--batch", 4096), "--batch is at most"),
    ):
        done = run_audit(*arguments, "--out", tmp_path / "out")
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr
