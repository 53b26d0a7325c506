"""The short form of the search, and proof that the search finds what is wrong."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TARGETS = {"envelope", "assembler", "codec", "bundle", "topics"}

needs_atheris = pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is for Linux only")


def fuzz(*arguments: str, environment: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", environment] if environment else ["-m", "tests.fuzz"]), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)


@needs_atheris
def test_five_thousand_hostile_inputs(tmp_path: Path) -> None:
    done = fuzz("--runs", "5000", "--seed", "1", "--json", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert said["figures"]["fuzz.inputs"] == 5000 and said["figures"]["fuzz.violations"] == 0
    assert said["targets"].keys() == TARGETS
    for name, report in said["targets"].items():
        assert report["accepted"] > 0, f"{name}: inputs that are valid are part of the search"
        assert len(report["rejected"]) >= (1 if name == "topics" else 5), f"{name}: {report['rejected']}"
        if name in ("envelope", "codec", "topics"):
            assert report["accepted"] + sum(report["rejected"].values()) == report["inputs"]
    assert said["targets"]["envelope"]["rejected"].keys() >= {"crc", "schema", "limit", "truncated", "tag", "header"}


@needs_atheris
@pytest.mark.parametrize(
    ("defect", "target", "words"),
    [
        ("no-checksum", "envelope", "against its checksum"),
        ("early-allocation", "codec", "bytes, at most"),
        ("unbounded", "assembler", "bytes are held"),
        ("foreign-error", "topics", "KeyError"),
        ("endless", "codec", "Timeout"),
    ],
)
def test_a_planted_defect_is_found_kept_and_found_again(tmp_path: Path, defect: str, target: str, words: str) -> None:
    patience = "1" if defect == "endless" else "30"  # whoever finds another defect must not run out of it meanwhile
    options = ("--target", target, "--plant", defect, "--timeout-s", patience, "--seed", "5", "--out", str(tmp_path))
    done = fuzz("--runs", "3000", *options)
    assert done.returncode == 1 and words in done.stderr
    (kept,) = tmp_path.iterdir()
    assert str(kept) in done.stderr
    again = fuzz("--replay", str(kept), *options)
    assert again.returncode == 1
    assert (words if defect != "endless" else "takes too long") in again.stderr
    healthy = fuzz("--replay", str(kept), "--target", target)
    assert healthy.returncode == 0, healthy.stderr


def test_without_the_fuzzer_it_says_what_to_install() -> None:
    hide = (
        "import sys, runpy, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'atheris' else find(name, *more)\n"
        "runpy.run_module('tests.fuzz', run_name='__main__', alter_sys=True)"
    )
    done = fuzz(environment=hide)
    assert done.returncode == 2
    assert done.stderr == "error: the fuzzer needs atheris (Linux): pip install 'psgl[dev]'\n"


def test_a_replay_needs_a_target_and_a_file() -> None:
    assert fuzz("--replay", "nothing").returncode == 2
    done = fuzz("--replay", "nothing", "--target", "codec")
    assert done.returncode == 2 and "cannot be read" in done.stderr
