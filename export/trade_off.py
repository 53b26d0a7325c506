"""What a bundle with a trained front costs and what it shows, said before it is handed out.

A quick look by the device's own graphs; ``psgl-server audit`` is the judge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edge_sdk.batch import Samples, as_batch
from edge_sdk.packing import Codes
from export.errors import ExportError
from server_sdk.audit.attacks import LearnedDecoder
from server_sdk.audit.division import Division
from server_sdk.audit.trial import attack, decide, shipped, worst_of
from server_sdk.reference.perturbation import front_input

__all__ = ["TradeOff", "weigh"]

_LEAST = 8


@dataclass(frozen=True)
class TradeOff:
    """What was found on samples that were held out.

    Attributes:
        accuracy: of the decisions, defence on, 0 to 1.
        undefended: of a network without a defence that saw the same training samples, or None.
        excess: how much more of x a decoder rebuilds than the decision alone tells, by ``measure``.
        measure: ``SSIM`` for images, ``correlation`` for signals.
        bytes_per_sample: of the activations, without the envelope.
        bits_per_sample: the most that one send tells of a sample, or None.
        victims: number of samples attacked.
    """

    accuracy: float
    undefended: float | None
    excess: float
    measure: str
    bytes_per_sample: int
    bits_per_sample: float | None
    victims: int

    def __str__(self) -> str:
        beside = "" if self.undefended is None else f" ({self.undefended:.1%} without a defence)"
        bound = "no bound in bits" if self.bits_per_sample is None else f"at most {self.bits_per_sample:.0f} bits"
        return (
            f"accuracy {self.accuracy:.1%}{beside}; a decoder shows {self.excess:+.3f} {self.measure} more than the "
            f"decision alone tells; {self.bytes_per_sample} bytes a sample, {bound} (on held-out samples, "
            f"{self.victims} of them attacked)"
        )


def weigh(
    bundle: Path,
    train: Samples,
    held_out: Samples,
    *,
    undefended: nn.Module | None = None,
    downsample: int = 2,
    epochs: int = 20,
    seed: int = 0,
) -> TradeOff:
    """Decide on held-out samples with a bundle as it is shipped, and attack it as a foe who has half of them.

    Args:
        bundle: of a front and a back that are trained, the back's weights beside it.
        train: what they were trained on; here for the classifier that judges reconstructions.
        held_out: at least 8 samples that they have not seen.
        undefended: a whole network to compare with; it takes what ``front_input`` gives.
        downsample: of that network.
        epochs: of the decoder.
        seed: of split, noise and decoder.

    Raises:
        ExportError: too few samples.
        BundleError, BatchError, ServerError: a bundle or samples that cannot be used.
    """
    if len(held_out) < _LEAST:
        raise ExportError(f"{len(held_out)} held-out samples are too few to measure anything: give at least {_LEAST}")
    trained = shipped(bundle, seed=seed, decisions=len(held_out))
    manifest = trained.victim.bundle.manifest
    order = np.random.default_rng(seed).permutation(len(held_out))
    theirs, mine = (held_out.take(np.sort(part)) for part in np.array_split(order, 2))
    worst = worst_of(attack(trained, Division(train, theirs, mine), [LearnedDecoder("mlp", epochs)], seed=seed)[1])
    right = decide(trained, held_out.x).argmax(axis=1) == held_out.y
    signal = worst.excess["ssim"] is None
    values, packing = math.prod(manifest.cut_shape), manifest.packing
    beside = None
    if undefended is not None:
        x = as_batch(held_out.x, manifest.input_shape, max_batch=len(held_out), input_range=manifest.input_range)
        with torch.inference_mode():
            parts = torch.split(torch.from_numpy(x), manifest.max_batch)
            classes = torch.cat([undefended(front_input(part, None, downsample)).argmax(dim=1) for part in parts])
        beside = float((classes.numpy() == held_out.y).mean())
    return TradeOff(
        accuracy=float(right.mean()),
        undefended=beside,
        excess=worst.excess["correlation" if signal else "ssim"] or 0.0,
        measure="correlation" if signal else "SSIM",
        bytes_per_sample=2 * values if packing is None else Codes(packing.bits, manifest.cut_shape, 0.0, 1.0).sample_bytes,
        bits_per_sample=trained.exposure.bits_per_sample,
        victims=len(mine),
    )
