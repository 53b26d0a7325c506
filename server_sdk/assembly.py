"""A bundle and the weights beside it become a trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from edge_sdk.bundle import Bundle
from server_sdk.errors import ModelError
from server_sdk.reference.profiles import ServerPart
from server_sdk.reference.specification import build
from server_sdk.reference.split import split
from server_sdk.streams import Streams
from server_sdk.trainer import Trainer

__all__ = ["back_path", "trainer_from"]

_SPATIAL: tuple[Literal[0], Literal[1], Literal[2]] = (0, 1, 2)


def back_path(bundle_path: Path) -> Path:
    """Where export puts the back's initial weights: ``net.back.safetensors`` beside ``net.psgl``."""
    return bundle_path.with_name(f"{bundle_path.stem}.back.safetensors")


def trainer_from(
    bundle: Bundle,
    back: Path,
    *,
    rounds: int,
    learning_rate: float = 2e-3,
    optimizer: Literal["adam", "sgd"] = "adam",
    device: str = "cpu",
    allow_models: Collection[str] = (),
) -> Trainer:
    """Build the back networks that a bundle asks for.

    Args:
        bundle: a checked bundle.
        back: safetensors file with the back's initial weights, as export wrote it.
        rounds: length of the learning rate's cosine schedule.
        device: ``cpu`` or ``cuda``.
        allow_models: factories outside this SDK that may be imported, which runs their code.

    Raises:
        ModelError: the weights are missing or are not this bundle's, or the model cannot be built.
    """
    part = ServerPart.from_manifest(bundle.manifest.server)
    try:
        data = back.read_bytes()
    except OSError as exc:
        raise ModelError(
            f"the back's weights are not readable at {back}: copy them there from beside the bundle"
        ) from exc
    if hashlib.sha256(data).hexdigest() != part.back_sha256:
        raise ModelError(f"{back} holds the weights of another bundle: copy the file from beside this bundle")
    try:
        weights = safetensors.torch.load(data)
    except SafetensorError as exc:
        raise ModelError(f"{back} is damaged ({exc}): copy it again from beside the bundle") from exc
    channels, *grid = bundle.manifest.cut_shape
    if len(grid) > 2:
        raise ModelError("the cut must have at most two spatial axes: export the bundle with another cut")

    def new_back() -> nn.Module:
        # Drawn from the stream's own generator, so that no two streams start from the same weights.
        seed = int(torch.randint(2**31, ()))
        return split(build(part.model, seed, allow_models=allow_models), part.model.cut)[1]

    streams = Streams(
        new_back,
        channels,
        _SPATIAL[len(grid)],
        names=part.streams,
        threshold=part.threshold,
        seed=part.seed,
    )
    streams.load_back(weights)
    return Trainer(
        streams,
        cut=bundle.manifest.cut_shape,
        learning_rate=learning_rate,
        optimizer=optimizer,
        gradient_from=part.gradient_from,
        base_weights=part.base_weights,
        rounds=rounds,
        device=device,
    )
