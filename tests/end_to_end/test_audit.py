"""``psgl-server audit`` as an auditor types it: fleet, broker and attacks as real as in use."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.batch import Samples, save_dataset


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
        assert seed["perturbed"]["samples"] == 90
        assert (seed["clean_accuracy"] is None) == (profile != "paper")
        assert f"{audited['mean']['excess']['ssim']:+.3f} SSIM" in " ".join(done.stdout.split())
    assert "can rebuild its inputs" in (tmp_path / "out" / "audit.html").read_text()


def test_what_cannot_be_audited_is_said_in_one_line(built: dict[str, Any], data: Path, tmp_path: Path) -> None:
    bundle = built["vanilla"].path
    for arguments, words in (
        ((bundle, "--data", data, "--seeds", 0), "--seeds"),
        ((bundle, "--data", tmp_path / "none.npz"), "there is no data file"),
        ((tmp_path / "none.psgl", "--data", data), "there is no bundle"),
        ((bundle, "--data", data, "--foe", 1.5), "share"),
        ((bundle, "--data", data, "--batch", 4096), "--batch is at most"),
    ):
        done = run_audit(*arguments, "--out", tmp_path / "out")
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr
