"""What a device installs: small enough for a gateway, and there is a wheel of each part for aarch64."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.edge import closure

ROOT = Path(__file__).resolve().parents[2]
_MOST_MB = 180.0
_OUTAGE = re.compile(r"connection broken|Retrying \(|Temporary failure in name resolution|ProxyError|SSLError")


def pins() -> dict[str, str]:
    """The edge's dependencies and theirs, by normalised name, with the versions of constraints.txt."""
    lines = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    versions = {normalised(name): version for name, version in lines}
    return {name: versions[name] for name in map(normalised, closure("psgl")) if name != "psgl"}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def wheels(machine: str, folder: Path) -> tuple[dict[str, str], str]:
    """File name of each pin's wheel for CPython 3.11 on a machine, by name, and what pip said if there is none."""
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(17, 37)] + [f"manylinux2014_{machine}", "any"]
    options = [word for one in platforms for word in ("--platform", one)]
    options += [
        "--python-version",
        "3.11",
        "--implementation",
        "cp",
        "--abi",
        "cp311",
        "--abi",
        "abi3",
        "--abi",
        "none",
    ]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps"]
    command += ["--only-binary=:all:", "--retries", "1", "--timeout", "15", "--report", str(folder / "report.json")]
    command += [
        "--target",
        str(folder / "target"),
        *options,
        *(f"{name}=={version}" for name, version in pins().items()),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    except subprocess.TimeoutExpired:
        pytest.skip("no package registry answers within 100 s: pip cannot say which wheels there are")
    if done.returncode != 0:
        return {}, done.stderr
    items = json.loads((folder / "report.json").read_text())["install"]
    return {normalised(one["metadata"]["name"]): one["download_info"]["url"].rpartition("/")[2] for one in items}, ""


def test_the_closure_is_small_enough_for_a_gateway() -> None:
    sizes = closure("psgl")
    assert {"numpy", "onnxruntime", "paho-mqtt", "cbor2"} <= set(map(normalised, sizes))
    assert not {"torch", "onnx"} & set(sizes)
    assert min(sizes.values()) > 0
    assert sum(sizes.values()) <= _MOST_MB, sizes


@pytest.mark.timeout(240)
def test_each_part_of_the_closure_has_a_wheel_for_aarch64(tmp_path: Path) -> None:
    if os.environ.get("PIP_NO_INDEX"):
        pytest.skip("PIP_NO_INDEX is set: pip asks no package registry")
    found, error = wheels("aarch64", tmp_path)
    if error and (_OUTAGE.search(error) or wheels(platform.machine(), tmp_path)[1]):
        pytest.skip("no package registry is reachable: pip finds no wheels for this machine either")
    assert not error, error
    assert set(found) == set(pins())
    for name, file in found.items():
        assert file.endswith(("_aarch64.whl", "-none-any.whl")), f"{name}: {file}"
