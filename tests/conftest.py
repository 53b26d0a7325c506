"""Small real things that many tests share: samples, a guide, one bundle of each profile."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import nn

from edge_sdk.batch import Samples
from edge_sdk.bundle import Bundle, load_bundle
from export.build import build_bundle, prepare_guide
from export.options import BuildOptions, class_names, model_of
from server_sdk.assembly import back_path, trainer_from
from server_sdk.reference.guide import Guide
from server_sdk.reference.perturbation import front_input
from server_sdk.reference.profiles import PROFILES
from server_sdk.reference.specification import build
from server_sdk.trainer import Trainer

SHAPE = (1, 8, 8)
CLASSES = 3

# The same examples in every run; pytest --hypothesis-profile=default draws others, make fuzz very many.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


def pytest_configure() -> None:
    """A shell that starts the tests in the background has them ignore Ctrl-C, and every command that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def draw_samples(count: int, seed: int) -> Samples:
    """Noisy images of three easily told patterns: rows, columns, a square."""
    generator = np.random.default_rng(seed)
    patterns = np.zeros((CLASSES, 8, 8))
    patterns[0, ::2], patterns[1, :, ::2], patterns[2, 2:6, 2:6] = 0.8, 0.8, 0.8
    y = np.arange(count) % CLASSES
    x = np.clip(patterns[y] + generator.normal(0, 0.15, (count, 8, 8)), 0, 1)
    return Samples((255 * x[:, None]).astype(np.uint8), y.astype(np.int64))


@dataclass(frozen=True)
class Built:
    """A bundle file with what a test wants of it."""

    path: Path
    bundle: Bundle

    def trainer(self, rounds: int = 20) -> Trainer:
        """A new trainer from the weights beside the bundle."""
        return trainer_from(self.bundle, back_path(self.path), rounds=rounds)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def samples() -> Callable[[int, int], Samples]:
    return draw_samples


@pytest.fixture(scope="session")
def guide() -> Guide:
    return prepare_guide(draw_samples(60, 99), CLASSES, seed=0, epochs=6)


def _settled(network: nn.Sequential) -> nn.Sequential:
    """With BatchNorm statistics of samples, as after a training."""
    x = torch.from_numpy(draw_samples(60, 98).x.astype(np.float32) / 255)
    with torch.no_grad(), torch.random.fork_rng():
        for _ in range(30):
            network.train()(front_input(x, None, 2))
    return network


class Bundles(dict[str, Built]):
    """One bundle of each profile, made when it is asked for; a frozen front is random and settled, with a guide."""

    def __init__(self, folder: Path, guide: Guide) -> None:
        self._folder, self._guide = folder, guide

    def __missing__(self, profile: str) -> Built:
        path = self._folder / f"{profile}.psgl"
        options = BuildOptions(profile, SHAPE, class_names(CLASSES))
        network = None
        if PROFILES[profile].frozen:
            spec = model_of(options)
            if "hardened" in spec.factory:
                spec = replace(spec, arguments={**spec.arguments, "widths": [4, 4, 6, 6]})
            options, network = replace(options, model=spec, offline_guide=True), _settled(build(spec, 7))
        build_bundle(path, options, self._guide, network=network)
        self[profile] = Built(path, load_bundle(path))
        return self[profile]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, guide: Guide) -> dict[str, Built]:
    """One bundle of each profile, by the profile's name."""
    return Bundles(tmp_path_factory.mktemp("bundles"), guide)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ca, broker and client certificates, and another authority that signed nothing."""
    directory = tmp_path_factory.mktemp("ca")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "stranger"):
        openssl(
            "req",
            "-x509",
            *key,
            "-days",
            "1",
            "-subj",
            f"/CN={name}",
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.pem",
        )
    (directory / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for name in ("broker", "client"):
        openssl("req", "-new", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "1", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
    for path in (*directory.iterdir(), directory, directory.parent, directory.parent.parent):
        path.chmod(0o755)  # the broker reads them as another user
    return directory
