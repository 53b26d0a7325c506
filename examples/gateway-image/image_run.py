"""A device inside the image, with a broker and a server outside, to the end of a few rounds; run.sh calls this."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from image_bundles import CLASSES, SHAPE, untrained_bundle

from edge_sdk.batch import Samples
from edge_sdk.dataset import save_dataset
from server_sdk.broker import EmbeddedBroker

__all__ = ["main"]

_ROUNDS = 8
_PATIENCE_S = 180.0
_DEVICE_FOLDER = "/mnt"  # inside the image; FOLDER/device outside
_CONFIG = """\
bundle = "net.psgl"
device = "gateway"
fleet = "image"
mode = "train"
[broker]
host = "{host}"
port = {port}
[state]
file = "state.sqlite"
[train]
data = "data.npz"
report = "report.json"
"""
_FILES = {"data.npz", "device.toml", "net.psgl", "report.json", "state.sqlite"}
_INSTALLED = "import importlib.util as u; print([n for n in ('torch', 'onnx', 'safetensors') if u.find_spec(n)])"


def main() -> int:
    """Run it; returns 0 if both ended their rounds, torch was neither there nor loaded, and no stray file is left."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path, help="the image, with /mnt bound to FOLDER/device")
    parser.add_argument("folder", type=Path, help="for all that is written")
    arguments = parser.parse_args()
    root, folder = arguments.root, arguments.folder
    bundle = untrained_bundle(folder, "paper")
    (folder / "device" / "net.psgl").write_bytes(bundle.read_bytes())
    save_dataset(folder / "device" / "data.npz", _digits(64 * _ROUNDS, 0), _digits(100, 1))
    began = time.monotonic()
    with EmbeddedBroker() as broker:
        config = _CONFIG.format(host=broker.host, port=broker.port)
        (folder / "device" / "device.toml").write_text(config)
        _inside(root, "psgl-edge", "check", f"{_DEVICE_FOLDER}/device.toml")
        server = _server(bundle, folder / "server", broker)
        try:
            _inside(root, "psgl-edge", "run", "--config", f"{_DEVICE_FOLDER}/device.toml")
            code = server.wait(timeout=_PATIENCE_S)
        finally:
            server.kill()
    report = json.loads((folder / "device" / "report.json").read_text())
    strays = sorted({path.name for path in (folder / "device").iterdir()} - _FILES)
    installed = _inside(root, "python3", "-c", _INSTALLED).strip()
    print(
        f"{_ROUNDS} rounds in {time.monotonic() - began:.1f} s: {report['steps']} steps of the device, "
        f"{report['bytes_sent']:,} bytes sent, {report['bytes_received']:,} received, "
        f"peak memory {report['peak_rss_mb']} MB\n"
        f"torch loaded by the device: {report['torch_loaded']}; of torch, onnx, safetensors in the image: {installed}; "
        f"files that the device was not told to write: {strays}"
    )
    fine = code == 0 and report["steps"] == _ROUNDS and not report["torch_loaded"] and installed == "[]" and not strays
    if not fine:
        print(f"this is not what was asked for: the server ended with {code}, see {folder}/server.log", file=sys.stderr)
    return 0 if fine else 1


def _digits(count: int, seed: int) -> Samples:
    """Pictures (count, *SHAPE) uint8 with one bright row for each class, in noise."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, CLASSES, count)
    x = generator.integers(0, 96, (count, *SHAPE), dtype=np.uint8)
    x[np.arange(count), 0, 2 * y + 4] = 230
    return Samples(x, y.astype(np.int64))


def _server(bundle: Path, out: Path, broker: EmbeddedBroker) -> subprocess.Popen[bytes]:
    options = {"--devices": 1, "--rounds": _ROUNDS, "--evaluate-every": 0, "--fleet": "image", "--out": out}
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, "-m", "server_sdk.cli", "train", str(bundle), *words]
    command += ["--host", broker.host, "--port", str(broker.port), "--json"]
    with (out.parent / "server.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _inside(root: Path, *command: str) -> str:
    """Run a command in the image as user psgl, with an environment of its own; returns what it printed.

    Raises:
        SystemExit: it failed; what it said is the message.
    """
    environment = ["PATH=/usr/local/bin:/usr/bin:/bin", "OMP_NUM_THREADS=1", f"HOME={_DEVICE_FOLDER}"]
    chroot = ["chroot", "--userspec=psgl:psgl", str(root), "/usr/bin/env", "-i", *environment]
    done = subprocess.run([*chroot, *command], capture_output=True, text=True, timeout=_PATIENCE_S)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode} in the image: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
