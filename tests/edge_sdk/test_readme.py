"""The example of README.md, its very lines, over a broker: a sensor's file becomes decisions in under ten lines."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.batch import Samples
from edge_sdk.bundle import load_bundle
from edge_sdk.memory_transport import MemoryBroker, MemoryTransport
from edge_sdk.wire import Message
from export.build import build_bundle, prepare_guide
from export.options import BuildOptions
from tests.edge_sdk.test_client import scripted_server

ROOT = Path(__file__).resolve().parents[2]


def example() -> str:
    section = (ROOT / "README.md").read_text().partition("### On a device")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.fixture(scope="module")
def signal_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beats of a sensor's own units, upright or inverted."""
    path = tmp_path_factory.mktemp("signals") / "ecg.psgl"
    y = np.arange(60) % 2
    beat = 900 * np.exp(-(((np.arange(256) - 120) / 16) ** 2))
    noise = np.random.default_rng(0).normal(0, 40, (60, 256))
    x = (np.where(y, -1, 1)[:, None] * beat + noise).astype(np.int16)[:, None]
    units = (-1000.0, 1000.0)
    guide = prepare_guide(Samples(x, y), 2, seed=0, epochs=4, input_range=units)
    build_bundle(path, BuildOptions("paper", (1, 256), ("upright", "inverted"), input_range=units), guide)
    return path


def decision_for(m: Message) -> Message:
    count, classes = len(m.tensors["activations"]), 2
    probabilities = np.tile(np.array([0.2, 0.8], np.float32), (count, 1))
    assert probabilities.shape == (count, classes)
    return Message(
        "decision",
        m.run,
        m.session,
        m.step,
        {},
        {"probabilities": probabilities, "class.fused": np.ones(count, np.int64)},
    )


def test_the_readmes_device_is_under_ten_lines_and_runs(
    signal_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = example()
    assert len(code.strip().splitlines()) < 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.psgl").write_bytes(signal_bundle.read_bytes())
    wave = -900 * np.exp(-((((np.arange(1024) % 256) - 120) / 16) ** 2))
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
    assert bundle.manifest.input_range == (-1000.0, 1000.0)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(line[0]) for line in lines] == list(range(7)), "(1024 - 256) / 128 + 1 windows"
    assert {tuple(line[1:]) for line in lines} == {("inverted", "server")}, lines


def test_edge_sdk_is_light() -> None:
    """What only a service needs is not loaded with the package."""
    code = "import sys, edge_sdk; print(*sorted(name for name in sys.modules if name.startswith('edge_sdk.')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    lazily = ("daemon", "config", "cli", "run_options", "sqlite_state", "dataset", "notify")
    assert not loaded & {f"edge_sdk.{name}" for name in lazily}
