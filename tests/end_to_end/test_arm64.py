"""An aarch64 device computes what was exported: the edge's aarch64 wheels under qemu-user. ``pytest -m arm64``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "gateway-image" / "arm64.sh"


@pytest.mark.arm64
@pytest.mark.timeout(600)
def test_every_graph_agrees_under_qemu(tmp_path: Path) -> None:
    missing = [program for program in ("debootstrap", "qemu-aarch64") if shutil.which(program) is None]
    if os.getuid() != 0 or missing:
        pytest.skip(f"this needs root, and the packages debootstrap and qemu-user (missing here: {missing})")
    done = subprocess.run(
        [SCRIPT, tmp_path], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "aarch64 Python 3.11" in done.stdout
    found = json.loads((tmp_path / "arm64" / "verify.json").read_text())
    graphs = {profile: [check["graph"] for check in each["checks"]] for profile, each in found.items()}
    assert graphs == {"paper": ["infer", "train", "prepare", "backward"], "hardened": ["infer", "guide"]}
    errors = [
        check["worst_error"] for each in found.values() for check in each["checks"] if check["graph"] != "prepare"
    ]
    assert max(errors) <= 1e-5
