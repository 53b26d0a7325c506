"""Bundles of 28x28 digits with untrained weights: what a device computes does not depend on how good they are."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from export.build import build_bundle
from export.options import BuildOptions, class_names, model_of
from server_sdk.reference.guide import Guide
from server_sdk.reference.profiles import PROFILES
from server_sdk.reference.specification import build

__all__ = ["CLASSES", "SHAPE", "main", "untrained_bundle"]

SHAPE = (1, 28, 28)
CLASSES = 10


def main() -> int:
    """Write a bundle of each profile named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="gets PROFILE.psgl and PROFILE.back.safetensors")
    parser.add_argument("profiles", nargs="+", choices=tuple(PROFILES), help="of the bundles")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for profile in arguments.profiles:
        print(untrained_bundle(arguments.folder, profile), flush=True)
    return 0


def untrained_bundle(folder: Path, profile: str) -> Path:
    """Build ``<profile>.psgl`` in a folder, the same weights each time; returns its path."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    frozen = PROFILES[profile].frozen
    options = BuildOptions(profile, SHAPE, class_names(CLASSES), offline_guide=frozen)
    network = build(model_of(options), 0) if frozen else None
    guide = Guide(SHAPE, CLASSES) if frozen or PROFILES[profile].perturbation is not None else None
    return build_bundle(folder / f"{profile}.psgl", options, guide, network=network).bundle


if __name__ == "__main__":
    raise SystemExit(main())
