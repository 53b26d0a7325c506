"""The main job as a user runs it: real processes, a real broker, the terminal's output, the files that it leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_sdk.batch import Samples
from edge_sdk.codec import unpack_tensors
from examples.quickstart.hardened import recipe_within
from export.options import BuildOptions

Draw = Callable[[int, int], Samples]
ROOT = Path(__file__).resolve().parents[2]


def command(data: Path, out: Path, *more: str) -> list[str]:
    short = ("--rounds", "24", "--batch", "8", "--shift", "0", "--front-steps", "150")
    return [
        sys.executable,
        "-m",
        "examples.quickstart",
        "--data",
        str(data),
        "--out",
        str(out),
        *short,
        *more,
    ]


def demo(data: Path, out: Path, *more: str, timeout_s: float = 150) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(data, out, *more), cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, samples: Draw) -> Path:
    """A small data file: 150 training and 60 test samples of three classes."""
    path = tmp_path_factory.mktemp("data") / "patterns.npz"
    train, test = samples(150, 1), samples(60, 2)
    np.savez(path, x_train=train.x, y_train=train.y, x_test=test.x, y_test=test.y)
    return path


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("demo")
    done = demo(data, out, "--seed", "3")
    assert done.returncode == 0, done.stderr
    return out, done


def marked(token: str) -> dict[str, str]:
    """An environment that every process of one demo inherits, so that a test can tell them from all others."""
    return {**os.environ, "PSGL_TEST_TOKEN": token}


def processes(token: str) -> dict[int, bytes]:
    """Command lines of the running processes that carry the token, by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"PSGL_TEST_TOKEN={token}".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes()
        except OSError:
            continue
    return found


@pytest.mark.timeout(180)
def test_it_leaves_the_promised_figures(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = finished
    result = json.loads((out / "result.json").read_text())
    shares = (
        "fused_accuracy",
        "vanilla_accuracy",
        "clean_accuracy",
        "guide_accuracy",
        "guide_agreement",
        "follow_when_wrong",
    )
    assert all(0 <= result[name] <= 1 for name in shares)
    assert set(result["streams"]) == {"attacked", "recovered", "fused"}
    assert result["fused_accuracy"] > 0.6 and result["vanilla_accuracy"] > 0.6
    assert result["steps"] == 2 * 24 * 3 and result["seconds"] > 0 and result["bytes_per_sample"] > 0
    assert result["broker"] in ("mosquitto", "amqtt")
    assert result["hardened_accuracy"] > 0.6 and result["hardened_seconds"] > 0
    assert 2 <= result["hardened_bits_per_sample"] <= 16 * 8
    assert 16 <= result["hardened_bytes_per_sample"] < result["bytes_per_sample"]
    assert result["front_samples"] == {"vanilla": 120, "hardened": 30}
    assert set(result["foe"]) == {"vanilla", "paper", "hardened", "floor"} and result["foe_victims"] == 20
    for rebuilt in result["foe"].values():
        assert -1 <= rebuilt["ssim"] <= 1
        assert rebuilt["excess"] == pytest.approx(rebuilt["ssim"] - result["foe"]["floor"]["ssim"])
    assert result["foe"]["vanilla"]["ssim"] > 0.5, "an undefended front shows these patterns"
    assert [device["name"] for device in result["devices"]] == ["device-1", "device-2", "device-3"]
    for device in result["devices"]:
        assert device["torch_loaded"] is False and device["steps"] == 48 and 20 < device["peak_rss_mb"] < 120
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    for words in (
        "vanilla",
        "stream a",
        "stream r",
        "stream f",
        "fused",
        "clean test",
        "guide",
        "agreement",
        "follows",
        "hardened",
        "psgl-server audit",
        "peak memory",
    ):
        assert words in " ".join(done.stdout.split())
    assert "3 devices" in done.stderr and "round 24" in done.stderr


@pytest.mark.timeout(300)
def test_it_leaves_samples_to_build_with_that_no_device_has(
    finished: tuple[Path, subprocess.CompletedProcess[str]], data: Path
) -> None:
    def samples_of(path: Path, part: str) -> set[bytes]:
        with np.load(path) as archive:
            return {x.tobytes() for x in archive[f"x_{part}"]}

    folder = finished[0] / "data"
    opened = {part: samples_of(folder / "open.npz", part) for part in ("train", "test")}
    assert not opened["train"] & opened["test"]
    devices = [samples_of(path, part) for path in folder.glob("device-*.npz") for part in ("train", "test")]
    assert len(devices) == 6 and not any(each & (opened["train"] | opened["test"]) for each in devices)
    assert len(opened["train"]) == 24 and len(opened["test"]) == 6
    assert opened["train"] | opened["test"] | set().union(*devices) == samples_of(data, "train") | samples_of(
        data, "test"
    )


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    finished: tuple[Path, subprocess.CompletedProcess[str]], data: Path, tmp_path: Path
) -> None:
    first, _ = finished
    assert demo(data, tmp_path / "same", "--seed", "3").returncode == 0

    def weights(out: Path) -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for profile in ("vanilla", "paper"):
            tensors |= {f"{profile}.{k}": v for k, v in load_file(out / profile / "server.safetensors").items()}
            for number in (1, 2, 3):
                front = unpack_tensors((out / profile / f"device-{number}.front.cbor").read_bytes())
                tensors |= {f"{profile}.{number}.{k}": v for k, v in front.items()}
        return tensors

    ours, again = weights(first), weights(tmp_path / "same")
    assert set(ours) == set(again)
    assert all(np.array_equal(value, again[name]) for name, value in ours.items())
    key = "paper.1.p.conv1.weight"
    assert not np.array_equal(ours[key], ours["paper.2.p.conv1.weight"])
    shipped = [
        [unpack_tensors((out / "hardened" / f"device-{number}.front.cbor").read_bytes()) for number in (1, 2, 3)]
        for out in (first, tmp_path / "same")
    ]
    for front in (*shipped[0], *shipped[1]):
        assert all(np.array_equal(value, shipped[0][0][name]) for name, value in front.items())
    # The noise of the devices is of no seed: only what rests on their decisions may differ.
    foes = [json.loads((out / "result.json").read_text())["foe"] for out in (first, tmp_path / "same")]
    for profile in ("vanilla", "paper", "hardened"):
        assert foes[0][profile]["ssim"] == foes[1][profile]["ssim"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("options", "words", "least"),
    [
        pytest.param(("--rounds", "5000"), "round", 6, id="demo, broker, server and three devices run"),
        pytest.param(("--front-steps", "1000000"), "training the front", 2, id="the demo itself trains"),
    ],
)
def test_ctrl_c_ends_every_process_in_time(
    options: tuple[str, ...], words: str, least: int, data: Path, tmp_path: Path
) -> None:
    token = uuid.uuid4().hex
    process = subprocess.Popen(
        command(data, tmp_path, *options),
        cwd=ROOT,
        env=marked(token),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            break
    assert len(processes(token)) >= least
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
    assert "stopped" in process.stderr.read()
    process.stderr.close()
    assert processes(token) == {}


@pytest.mark.timeout(180)
def test_a_broker_that_dies_does_not_end_the_demo(data: Path, tmp_path: Path) -> None:
    token = uuid.uuid4().hex
    process = subprocess.Popen(
        command(data, tmp_path, "--rounds", "150"),
        cwd=ROOT,
        env=marked(token),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "paper" in line and "round 16" in line:
            break
    brokers = [
        pid for pid, line in processes(token).items() if b"mosquitto.conf" in line or b"server_sdk.broker" in line
    ]
    assert len(brokers) == 1
    os.kill(brokers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert "started again" in err
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 2 * 150 * 3


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 28, 28), (1, 64, 64), (1, 224, 224)])
def test_the_hardened_front_costs_no_more_for_larger_images(shape: tuple[int, ...]) -> None:
    for classes in (("0", "1"), ("0", "1", "2")):
        options = BuildOptions("hardened", shape, classes)
        recipe = recipe_within(options, None)
        assert recipe.steps * recipe.batch * shape[1] * shape[2] <= 1600 * 64 * 28 * 28 and recipe.teacher == 0
        assert 1 <= recipe.steps <= 1600 and 16 <= recipe.batch <= 64
        assert recipe_within(options, 7).steps == 7


BAD = {
    "keys": ({"y_test": None}, "it needs x_train, y_train, x_test, y_test"),
    "nan": ({"x_train": np.full((12, 8, 8), np.nan)}, "NaN"),
    "one_class": ({"y_train": np.zeros(12, int)}, "single class"),
    "labels": ({"y_test": np.full(6, 9)}, "test labels go from 9 to 9"),
    "few": ({"y_train": np.array([0] * 11 + [1])}, "every class"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_gives_one_line_and_code_2(name: str, tmp_path: Path) -> None:
    changes, words = BAD[name]
    arrays: dict[str, Any] = {
        "x_train": np.zeros((12, 8, 8), np.uint8),
        "y_train": np.arange(12) % 2,
        "x_test": np.zeros((6, 8, 8), np.uint8),
        "y_test": np.arange(6) % 2,
    } | changes
    path = tmp_path / "bad.npz"
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    done = demo(path, tmp_path / "out", timeout_s=60)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0]
    assert "Traceback" not in done.stderr


def test_a_port_in_use(data: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = demo(data, tmp_path, "--port", str(taken.getsockname()[1]), timeout_s=60)
    assert done.returncode == 2 and "in use" in done.stderr and "Traceback" not in done.stderr
