"""The device's work beside torch eager on the same machine: perturb and front, backward and optimizer, memory, size.

Profile ``paper`` with its reference front (16 and 32 channels), weights as inputs, in turns. Both sides have one
thread, and its CPU time is what counts, so that neighbours on a shared machine disturb less.
``perturb_front`` is what an inference costs, ``backward`` the rest of a training step after its forward pass, ``step``
all of it but the wire. Torch does the same with autograd: two backward passes through the guide, then front, backward
and ``torch.optim.Adam``. ``front`` alone takes what a perturbation would give it. Memory and imports are those of
fresh processes (``benchmarks/edge_process.py``).
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.figures import options, print_figures, ratio
from edge_sdk.bundle import load_bundle
from edge_sdk.front import Front
from edge_sdk.memory import keep_freed_memory
from export.build import build_bundle
from export.options import BuildOptions, class_names, model_of
from server_sdk.reference.guide import Guide
from server_sdk.reference.perturbation import front_input, normalise
from server_sdk.reference.profiles import PROFILES
from server_sdk.reference.specification import ModelSpec, build
from server_sdk.reference.split import split

__all__ = ["closure", "main"]

_SHAPES = {"28": (1, 28, 28), "128": (1, 128, 128), "ecg": (1, 256)}
_BATCHES = (1, 8, 32)
_CLASSES = 10
_SLICE_S = 0.08  # of one measurement: long enough for the clock, short enough to take turns
_RATE = 1e-3


def main() -> int:
    """Measure and print."""
    parser = options("edge", __doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=tuple(_SHAPES), default=tuple(_SHAPES), help="(default: all)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as psgl-edge does; torch profits alike
    turns = 5 if arguments.quick else 25
    figures: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.sizes:
            pair = _Pair(Path(folder), _SHAPES[name])
            for batch in _BATCHES:
                times = _in_turns(pair.ways(batch), turns)
                samples |= {f"{way}_ms.{name}.{batch}": values for way, values in times.items()}
                for figure, ours, theirs in (
                    ("perturb_front_vs_torch", "perturb_front", "torch_perturb_front"),
                    ("backward_vs_torch", "backward", "torch_backward"),
                    ("step_vs_torch", "step", "torch_step"),
                    ("perturb_front_vs_front", "perturb_front", "front"),
                ):
                    figures[f"edge.{figure}.{name}.{batch}"] = ratio(times[ours], times[theirs])
        paper, hardened = _bundle(Path(folder), "paper"), _bundle(Path(folder), "hardened")
        figures["edge.bundle_kb"] = paper.stat().st_size / 1e3
        figures["edge.bundle_kb.hardened"] = hardened.stat().st_size / 1e3
        compact = _bundle(Path(folder), "hardened", weight_bits=8)
        figures["edge.bundle_kb.hardened_8_bits"] = compact.stat().st_size / 1e3
        found = _processes(paper, 3 if arguments.quick else 9)
    imports, device = (np.array(found[name]["peak_rss_mb"]) for name in ("imports", "device"))
    figures["edge.peak_rss_mb"] = float(np.median(device))
    figures["edge.peak_rss_vs_imports"] = float(np.median(device / imports))
    figures["edge.import_own_s"] = float(np.median(found["own"]["own_s"]))
    figures["edge.closure_mb"] = sum(closure("psgl").values())
    samples |= {f"peak_rss_mb.{name}": list(values["peak_rss_mb"]) for name, values in found.items()}
    print_figures(figures, samples, as_json=arguments.json)
    return 0


class _Pair:
    """A device's graphs and the same network in torch."""

    def __init__(self, folder: Path, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._guide = Guide(shape, _CLASSES).eval()
        options = BuildOptions("paper", shape, class_names(_CLASSES))
        self._device = Front(load_bundle(build_bundle(folder / "net.psgl", options, self._guide).bundle))
        model = model_of(options)
        self._front = split(build(model, 0), model.cut)[0]
        perturbation = PROFILES["paper"].perturbation
        assert perturbation is not None
        self._how, self._epsilon = perturbation.normalisation, perturbation.epsilon
        grid = tuple(model.arguments["grid"])
        self._seen_shape = (int(model.arguments["in_channels"]), *grid)
        alone = BuildOptions(
            "vanilla",
            self._seen_shape,
            class_names(_CLASSES),
            model=ModelSpec(model.factory, model.arguments, model.cut),
            downsample=1,
        )
        self._alone = Front(load_bundle(build_bundle(folder / "alone.psgl", alone, None).bundle))

    def ways(self, batch: int) -> dict[str, Callable[[], float]]:
        """What is timed, by name: each returns its seconds."""
        generator = np.random.default_rng(0)
        x = generator.random((batch, *self._shape), dtype=np.float32)
        seen = generator.random((batch, *self._seen_shape), dtype=np.float32)
        state, alone = self._device.initial_state(), self._alone.initial_state()
        gradient = self._gradient(x)
        return {
            "perturb_front": lambda: _timed(lambda: self._device.forward(state, x, None, training=False)),
            "torch_perturb_front": lambda: _timed(lambda: self._torch_inference(torch.from_numpy(x))),
            "front": lambda: _timed(lambda: self._alone.forward(alone, seen, None, training=False)),
            "backward": lambda: self._backward(x, gradient, whole=False),
            "torch_backward": lambda: self._torch_step(x, gradient, whole=False),
            "step": lambda: self._backward(x, gradient, whole=True),
            "torch_step": lambda: self._torch_step(x, gradient, whole=True),
        }

    def _gradient(self, x: np.ndarray) -> np.ndarray:
        cut = self._device.forward(self._device.initial_state(), x, None, training=False).activations
        return np.random.default_rng(1).standard_normal(cut.shape, dtype=np.float32)

    def _backward(self, x: np.ndarray, gradient: np.ndarray, *, whole: bool) -> float:
        state = self._device.initial_state()
        began = time.thread_time()
        forward = self._device.forward(state, x, None, training=True)
        if not whole:
            began = time.thread_time()
        self._device.backward(state, self._device.prepare(state, forward), gradient, rate=_RATE)
        return time.thread_time() - began

    def _perturbed(self, x: Tensor) -> Tensor:
        """As ``server_sdk.reference.perturbation`` has it, by plain autograd."""
        wanted = x.clone().requires_grad_(True)
        logits = self._guide(wanted)
        chosen = nn.functional.one_hot(logits.argmax(dim=1), _CLASSES).to(logits.dtype)
        (alpha,) = torch.autograd.grad(logits, wanted, chosen, retain_graph=True)
        (beta,) = torch.autograd.grad(logits, wanted, 1 - chosen)
        scaled = normalise(torch.relu(-alpha) * torch.relu(beta), self._how, self._epsilon)
        return front_input((x + scaled).clamp(0, 1), scaled, 2)

    def _torch_inference(self, x: Tensor) -> Tensor:
        seen = self._perturbed(x)
        self._front.eval()
        with torch.inference_mode():
            activations: Tensor = self._front(seen)
        return activations

    def _torch_step(self, x: np.ndarray, gradient: np.ndarray, *, whole: bool) -> float:
        self._front.train()
        optimizer = torch.optim.Adam(self._front.parameters(), _RATE)
        given = torch.from_numpy(gradient)
        began = time.thread_time()
        activations = self._front(self._perturbed(torch.from_numpy(x)))
        if not whole:
            began = time.thread_time()
        optimizer.zero_grad()
        torch.autograd.backward(activations, given)
        optimizer.step()
        return time.thread_time() - began


def _timed(call: Callable[[], object]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


def _in_turns(ways: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """Milliseconds of each way in each turn: the least of the calls that a slice of time holds."""
    calls = {}
    for name, way in ways.items():
        way()
        calls[name] = max(3, round(_SLICE_S / max(way(), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            times[name].append(1000 * min(way() for _ in range(calls[name])))
    return times


def _bundle(folder: Path, profile: str, *, weight_bits: int = 32) -> Path:
    """The bundle of 28x28 digits; a frozen front's weights need not be trained to be weighed."""
    options = BuildOptions(profile, _SHAPES["28"], class_names(_CLASSES), weight_bits=weight_bits)
    network = build(model_of(options), 0) if PROFILES[profile].frozen else None
    guide = None if PROFILES[profile].perturbation is None else Guide(_SHAPES["28"], _CLASSES)
    return build_bundle(folder / f"{profile}.psgl", options, guide, network=network).bundle


def _processes(bundle: Path, turns: int) -> dict[str, dict[str, list[float]]]:
    """By what a process does: its peak memory, and seconds of the import of edge_sdk where it is timed."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(turns):
        for name, arguments in {"imports": [], "own": [], "device": [str(bundle), "8"]}.items():
            command = [sys.executable, "-m", "benchmarks.edge_process", name, *arguments]
            printed = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
            assert not printed["torch_loaded"]
            of = found.setdefault(name, {"peak_rss_mb": [], "own_s": []})
            of["peak_rss_mb"].append(printed["peak_rss_mb"])
            of["own_s"].append(printed.get("own_s", 0.0))
    return found


def closure(distribution: str) -> dict[str, float]:
    """Installed size of a distribution and of all that it requires without extras, in MB of 10^6 bytes, by name."""
    sizes: dict[str, float] = {}
    waiting = [distribution]
    while waiting:
        name = waiting.pop()
        if name in sizes:
            continue
        found = importlib.metadata.distribution(name)
        sizes[name] = sum(_bytes(found)) / 1e6
        for requirement in found.requires or []:
            if "extra ==" not in requirement:
                waiting.append(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])
    return sizes


def _bytes(found: importlib.metadata.Distribution) -> Iterator[int]:
    for file in found.files or []:
        path = Path(str(file.locate()))
        if path.is_file():
            yield path.stat().st_size


if __name__ == "__main__":
    raise SystemExit(main())
