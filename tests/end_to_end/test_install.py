"""``pip install .`` alone: a new environment with an importable edge and neither torch nor onnx."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_base_install_is_the_edge_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for package in ("edge_sdk", "server_sdk", "export"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True, timeout=120)
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", source / "constraints.txt", source]
    done = subprocess.run(install, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, *command], capture_output=True, text=True, cwd=tmp_path, timeout=60)

    names = {line.partition("==")[0].lower() for line in run("-m", "pip", "freeze").stdout.split()}
    assert not names & {"torch", "onnx", "onnxscript", "rich", "amqtt", "safetensors"}
    assert {"numpy", "onnxruntime", "paho-mqtt", "cbor2"} <= names
    imported = run(
        "-c", "import edge_sdk, edge_sdk.cli, sys; print(edge_sdk.__file__); sys.exit('torch' in sys.modules)"
    )
    assert imported.returncode == 0, imported.stderr
    assert str(environment) in imported.stdout
    helped = subprocess.run(
        [environment / "bin" / "psgl-edge", "run", "--help"], capture_output=True, text=True, timeout=60
    )
    assert helped.returncode == 0 and "examples:" in helped.stdout
    # The other commands are there too and say which extra they need.
    for program, extra in (("psgl-server", "psgl[server]"), ("psgl-export", "psgl[export]")):
        arguments = {
            "psgl-server": ["train", "x.psgl"],
            "psgl-export": ["build", "--data", "x.npz", "-o", "y.psgl"],
        }
        told = subprocess.run(
            [environment / "bin" / program, *arguments[program]], capture_output=True, text=True, timeout=60
        )
        assert told.returncode == 2 and "Traceback" not in told.stderr, told.stderr
        assert extra in told.stderr
