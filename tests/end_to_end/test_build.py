"""``psgl-export build`` as one types it: the default profile trains its front, weighs it, and writes last."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_sdk.batch import Samples
from edge_sdk.bundle import load_bundle
from edge_sdk.dataset import save_dataset
from export.build_command import _PROFILES
from export.cli import main
from server_sdk.assembly import back_path, trainer_from
from server_sdk.reference.profiles import PROFILES

Draw = Callable[[int, int], Samples]


def build(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "export.cli", "build", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.fixture
def data(tmp_path: Path, samples: Draw) -> Path:
    path = tmp_path / "patterns.npz"
    save_dataset(path, samples(60, 1), samples(30, 2))
    return path


def test_the_default_profile_is_trained_weighed_and_written(data: Path, tmp_path: Path) -> None:
    done = build("--data", data, "-o", tmp_path / "net.psgl", "--steps", 5, "--threads", 1)
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"trade-off: accuracy [\d.]+% \([\d.]+% without a defence\), [\d.]+% by the device's guide where there is no "
        r"server; a decoder shows [\d.]+ SSIM (more|less) than the "
        r"decision alone tells; 16 bytes a sample, at most 16 bits",
        " ".join(done.stderr.split()),
    )
    assert found, done.stderr
    assert "trained weights of the back" in done.stdout and "graphs agree with torch" in done.stdout
    bundle = load_bundle(tmp_path / "net.psgl")
    assert bundle.manifest.decides_alone
    assert bundle.id in done.stdout and (bundle.manifest.profile, bundle.manifest.frozen) == ("hardened", True)
    trainer_from(bundle, back_path(tmp_path / "net.psgl"), rounds=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.back.safetensors", "net.psgl", "patterns.npz"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", 0), "--steps must be at least 1"),
        (("--noise", 0), "noise above 0"),
        (("--shift", -1), "shift are at least 0"),
        (("--strength", "nan"), "finite"),
        (("--teacher", 2), "share is 0 to 1"),
        (("--profile", "vanilla", "--steps", 5), "--steps is for a front that is trained here"),
        (("--profile", "paper", "--flip"), "--flip is for a front that is trained here"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line_and_writes_nothing(
    options: tuple[object, ...], words: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "--data", str(data), "-o", str(tmp_path / "net.psgl"), *map(str, options)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["patterns.npz"]


def test_too_few_test_samples_are_said_before_anything_is_trained(
    tmp_path: Path, samples: Draw, capsys: pytest.CaptureFixture[str]
) -> None:
    few = samples(6, 2)
    save_dataset(tmp_path / "few.npz", samples(60, 1), few)
    assert main(["build", "--data", str(tmp_path / "few.npz"), "-o", str(tmp_path / "net.psgl")]) == 2
    assert "has 6 test samples" in capsys.readouterr().err
    assert not (tmp_path / "net.psgl").exists()


def test_a_training_that_fails_writes_no_bundle(
    tmp_path: Path, samples: Draw, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dataset(tmp_path / "data.npz", samples(60, 1), samples(30, 2))
    options = ["--steps", "5", "--strength", "1e38", "--no-comparison", "--threads", "1"]
    code = main(["build", "--data", str(tmp_path / "data.npz"), "-o", str(tmp_path / "net.psgl"), *options])
    assert code == 2 and "lower learning_rate or strength" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]


@pytest.mark.parametrize("line", [("--help",), ("build", "--help"), ("sweep", "--help")])
def test_help_shows_examples(line: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert (
        "examples:" in shown and f"psgl-export {line[0] if len(line) > 1 else 'build'} " in shown.split("examples:")[1]
    )


def test_every_profile_can_be_asked_for() -> None:
    assert set(_PROFILES) == set(PROFILES) and len(_PROFILES) == len(PROFILES)
