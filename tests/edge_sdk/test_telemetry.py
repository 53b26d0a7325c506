"""Whatever of ours brings onnxruntime in, nothing is gathered for its makers: no file appears in the user's folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.telemetry import SWITCH


def run(code: str, home: Path, **variables: str) -> str:
    bare = {name: value for name, value in os.environ.items() if name != SWITCH and not name.startswith("XDG_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**bare, "HOME": str(home), **variables},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["edge_sdk", "edge_sdk.front", "export.costs"])
def test_nothing_is_gathered(module: str, tmp_path: Path) -> None:
    code = f"import os, {module}, sys; print('onnxruntime' in sys.modules, os.environ['{SWITCH}'])"
    assert run(code, tmp_path) == "True 1"
    assert list(tmp_path.rglob("*")) == []


def test_who_wants_it_may_switch_it_on(tmp_path: Path) -> None:
    assert run(f"import os, edge_sdk; print(os.environ['{SWITCH}'])", tmp_path, **{SWITCH: "0"}) == "0"
