"""``psgl-export sweep`` over a real broker: made once, gone on with, and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.batch import Samples
from edge_sdk.dataset import save_dataset

ROOT = Path(__file__).resolve().parents[2]
PLAN = """\
[attack]
epochs = 1
width = 2
[data.patterns]
file = "patterns.npz"
rounds = {rounds}
batch = 8
[profile.hardened]
recipe = {{steps = 3}}
[[stage]]
profiles = ["vanilla", "hardened"]
data = ["patterns"]
attacks = ["decoder_mlp", "decoder_convolution"]
seeds = {seeds}
"""


def begin(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "export.cli", "sweep", "plan.toml", "--out", "out", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def sweep(folder: Path, *arguments: object) -> tuple[int, dict[str, Any], str]:
    process = begin(folder, "--json", *arguments)
    out, errors = process.communicate(timeout=200)
    return process.returncode, json.loads(out.splitlines()[-1]) if out else {}, errors


def cells(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in (folder / "out").glob("*/*/*/*.json")}


@pytest.fixture
def folder(tmp_path: Path, samples: Callable[[int, int], Samples]) -> Path:
    save_dataset(tmp_path / "patterns.npz", samples(60, 1), samples(20, 2))
    return tmp_path


@pytest.mark.timeout(300)
def test_what_is_there_is_not_made_again(folder: Path) -> None:
    (folder / "plan.toml").write_text(PLAN.format(rounds=3, seeds=1))
    code, report, errors = sweep(folder, "--status")
    assert (code, report["figures"]) == (1, {}) and "missing: patterns vanilla seed 0, decoder_mlp: not yet" in errors
    code, report, errors = sweep(folder, "--figures", folder / "new" / "figures.json")
    assert code == 0, errors
    assert json.loads((folder / "new" / "figures.json").read_text()) == report
    assert report["figures"]["audit.patterns.hardened.bytes_per_sample"] == 16
    assert report["figures"]["audit.patterns.vanilla.accuracy_lost_points"] == 0
    assert set(report["samples"]) == {"patterns.vanilla.0", "patterns.hardened.0"}
    assert set(report["samples"]["patterns.hardened.0"]["attacks"]) == {"decoder_mlp"}, "no axes to convolve"
    assert "hardened" in (folder / "out" / "patterns.html").read_text()
    before = cells(folder)
    assert len(before) == 2 * 4 and not list((folder / "out").rglob("*.partial*"))

    lost = next(name for name in before if "vanilla" in name and "/decoder_convolution-" in name)
    (folder / lost).unlink()
    code, report, errors = sweep(folder)
    after = cells(folder)
    assert code == 0 and {name for name in after if after[name] != before.get(name)} == {lost}

    code, again, errors = sweep(folder)
    assert code == 0 and cells(folder) == after and again["figures"] == report["figures"]

    next((folder / "out").glob("patterns/vanilla/*/net.psgl")).unlink()
    code, report, errors = sweep(folder, "--status")
    assert code == 1 and "cannot be read: patterns vanilla seed 0" in errors
    assert set(report["samples"]) == {"patterns.hardened.0"}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_every_process_within_seconds(how: signal.Signals, folder: Path) -> None:
    (folder / "plan.toml").write_text(PLAN.format(rounds=100000, seeds=2))
    process = begin(folder, "--jobs", 2)
    deadline = time.monotonic() + 120
    while len(list((folder / "out").glob("*/*/*/fleet-*/device-1.sqlite"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.2)
    begun = time.monotonic()
    process.send_signal(how)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert time.monotonic() - begun < 20
    assert not running_in(folder)
    assert not list((folder / "out").glob("*/*/*/unit.json"))


def running_in(folder: Path) -> list[str]:
    """Commands that are still there and name the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text()
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


def test_a_plan_or_data_that_is_not_there_is_one_line(folder: Path) -> None:
    process = begin(folder)
    assert process.communicate(timeout=60)[1] == "error: plan.toml cannot be read: No such file or directory\n"
    (folder / "plan.toml").write_text(PLAN.format(rounds=3, seeds=1))
    (folder / "patterns.npz").unlink()
    process = begin(folder)
    errors = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 2 and len(errors) == 1 and "patterns.npz cannot be read" in errors[0]
