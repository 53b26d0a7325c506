"""A model of one's own, from a file in a folder to a trained fleet: the commands as one types them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch

from edge_sdk.batch import Samples
from edge_sdk.bundle import load_bundle
from edge_sdk.dataset import save_dataset
from export.cli import main
from tests.models import write_module

Build = Callable[..., None]


@pytest.fixture
def built() -> dict[str, Any]:
    """Of the ward: the bundle that a test builds, once it did."""
    return {}


@pytest.fixture
def build(
    ward: Any, built: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Build]:
    """``psgl-export build`` of ``my_module.py``, which lies beside the ward's data."""
    monkeypatch.chdir(ward.folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    write_module(ward.folder, "my_module")

    def run(*options: object) -> None:
        line = ["build", "my_module:MyNet", "--data", "data.npz", "-o", "net.psgl", *map(str, options)]
        assert main(line) == 0, capsys.readouterr().err
        built["own"] = SimpleNamespace(path=ward.folder / "net.psgl")

    yield run
    sys.modules.pop("my_module", None)


def test_a_residual_network_with_its_own_guide_is_trained_by_server_and_device(ward: Any, build: Build) -> None:
    build("--cut", "layer2", "--profile", "paper", "--guide", "my_module:MyGuide", "--classes", 3)
    refused = ward.server(6, profile="own")
    assert "--allow-model my_module:MyNet" in refused.one_line()
    server = ward.server(6, "--allow-model", "my_module:MyNet", profile="own")
    server.wait("waiting")
    device = ward.device("d1", profile="own")
    assert device.end() == 0 and server.end() == 0, (device.errors, server.errors)
    assert server.of("end")[0]["rounds"] == 6 and ward.report("d1")["torch_loaded"] is False
    weights = safetensors.torch.load_file(ward.folder / "server" / "server.safetensors")
    for name in ("attacked.layer3.conv1.weight", "fused.back.head.weight"):
        assert any(each.endswith(name) for each in weights), name
    assert not any(".layer2." in name for name in weights)


def test_a_hardened_one_sends_a_code(ward: Any, build: Build, samples: Callable[[int, int], Samples]) -> None:
    save_dataset(ward.folder / "open.npz", samples(48, 3), samples(24, 4))
    build(
        "--data",
        "open.npz",
        "--cut",
        "layer1",
        "--steps",
        3,
        "--no-comparison",
        "--code",
        8,
        "--back",
        "my_module:MyBack",
    )
    assert load_bundle(ward.folder / "net.psgl").manifest.cut_shape == (8,)
    allowed = ("--allow-model", "my_module:MyNet", "--allow-model", "my_module:MyBack")
    server = ward.server(10, *allowed, profile="own")
    server.wait("waiting")
    device = ward.device("d1", profile="own")
    assert device.end() == 0 and server.end() == 0, (device.errors, server.errors)
    assert ward.report("d1")["bits_per_sample"] == pytest.approx(4.0)
