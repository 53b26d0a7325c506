"""The example of README.md, its very lines, over a broker: a sensor's file becomes decisions in under ten lines."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_sdk
from edge_sdk.bundle import load_bundle
from edge_sdk.memory_transport import MemoryBroker, MemoryTransport
from edge_sdk.wire import Message
from tests.edge_sdk.test_client import scripted_server

ROOT = Path(__file__).resolve().parents[2]


def example() -> str:
    section = (ROOT / "README.md").read_text().partition("### On a device")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found.group(1)


def decision_for(m: Message) -> Message:
    count, classes = len(m.tensors["activations"]), 2
    probabilities = np.tile(np.array([0.2, 0.8], np.float32), (count, 1))
    assert probabilities.shape == (count, classes)
    return Message("decision", m.run, m.session, m.step, {}, {"probabilities": probabilities})


def test_the_readmes_device_is_under_ten_lines_and_runs(
    signal_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = example()
    assert len(code.strip().splitlines()) < 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.psgl").write_bytes(signal_bundle.read_bytes())
    wave = np.sin(np.arange(1024) / 9) / 2 + 0.5
    rows = [f"{number / 128},{value}" for number, value in enumerate(wave)]
    (tmp_path / "ecg.csv").write_text("\n".join(["time,II", *rows]))
    broker = MemoryBroker()

    def paho(connection: Any, client_id: str) -> MemoryTransport:
        assert (connection.host, client_id) == ("127.0.0.1", "psgl-ward-ward-1")
        return MemoryTransport(broker, client_id)

    monkeypatch.setattr("edge_sdk.paho_transport.PahoTransport", paho)
    bundle = load_bundle("net.psgl")
    with scripted_server(broker, bundle.id, lambda m, n: [decision_for(m)], device="ward-1"):
        exec(compile(code, "README.md", "exec"), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(line[0]) for line in lines] == list(range(7)), "(1024 - 256) / 128 + 1 windows"
    assert all(line[-1] in ("server", "guide", "none") for line in lines)


def test_edge_sdk_is_light() -> None:
    """What only a service needs is not loaded with the package."""
    code = "import sys, edge_sdk; print(*sorted(name for name in sys.modules if name.startswith('edge_sdk.')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    lazily = ("daemon", "config", "cli", "run_options", "sqlite_state", "dataset", "notify")
    assert not loaded & {f"edge_sdk.{name}" for name in lazily}
