"""What a bundle with a trained front costs and what it shows, said before it is handed out.

A quick look by the device's own graphs; ``psgl-server audit`` is the judge.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edge_sdk.batch import Samples, as_batch
from export.errors import ExportError
from server_sdk.audit.attacks import Knowledge, LearnedDecoder
from server_sdk.audit.finding import payload_per_sample
from server_sdk.audit.metrics import likeness
from server_sdk.audit.report import beyond_in_words
from server_sdk.audit.trial import shipped
from server_sdk.reference.perturbation import front_input

__all__ = ["LEAST_HELD_OUT", "TradeOff", "weigh"]

LEAST_HELD_OUT = 20
"""Of fewer samples a decoder learns nothing, and what it then shows would flatter."""


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
        alone: accuracy of the device's guide, which decides where there is no server; None without one.
    """

    accuracy: float
    undefended: float | None
    excess: float
    measure: str
    bytes_per_sample: int
    bits_per_sample: float | None
    victims: int
    alone: float | None = None

    def __str__(self) -> str:
        beside = "" if self.undefended is None else f" ({self.undefended:.1%} without a defence)"
        bound = "no bound in bits" if self.bits_per_sample is None else f"at most {self.bits_per_sample:.0f} bits"
        alone = "" if self.alone is None else f", {self.alone:.1%} by the device's guide where there is no server"
        return (
            f"accuracy {self.accuracy:.1%}{beside}{alone}; "
            f"a decoder shows {beyond_in_words(self.measure, self.excess)}; "
            f"{self.bytes_per_sample} bytes a sample, {bound} (on held-out samples, {self.victims} of them attacked)"
        )


def weigh(
    bundle: Path,
    held_out: Samples,
    *,
    undefended: nn.Module | None = None,
    downsample: int = 2,
    epochs: int = 20,
    seed: int = 0,
    allow_models: Collection[str] = (),
) -> TradeOff:
    """Decide on held-out samples with a bundle as it is shipped, and attack it as a foe who has half of them.

    Args:
        bundle: of a front and a back that are trained, the back's weights beside it.
        held_out: at least ``LEAST_HELD_OUT`` samples that they have not seen.
        undefended: a whole network to compare with; it takes what ``front_input`` gives.
        downsample: of that network.
        epochs: of the decoder.
        seed: of split, noise and decoder.
        allow_models: factories outside this SDK that may be imported, which runs their code.

    Raises:
        ExportError: too few samples.
        BundleError, BatchError, ServerError: a bundle or samples that cannot be used.
    """
    if len(held_out) < LEAST_HELD_OUT:
        raise ExportError(
            f"{len(held_out)} held-out samples are too few to measure anything: give at least {LEAST_HELD_OUT}"
        )
    trained = shipped(bundle, seed=seed, decisions=len(held_out), allow_models=allow_models)
    manifest = trained.victim.bundle.manifest
    x = as_batch(held_out.x, manifest.input_shape, max_batch=len(held_out), input_range=manifest.input_range)
    probabilities = trained.decide(x)
    decided = np.eye(probabilities.shape[1], dtype=np.float32)[probabilities.argmax(axis=1)]
    theirs, mine = (np.sort(p) for p in np.array_split(np.random.default_rng(seed).permutation(len(x)), 2))
    decoder = LearnedDecoder("mlp", epochs)
    floor = decoder.rebuild(Knowledge(x[theirs], decided[theirs]), decided[mine], seed=seed)
    known, seen = trained.foe.send(x[theirs]), trained.victim.send(x[mine])
    shown = decoder.rebuild(Knowledge(x[theirs], known), seen, seed=seed)
    least, most = likeness(floor, x[mine]), likeness(shown, x[mine])
    images = least.ssim is not None and most.ssim is not None
    said = trained.victim.alone(x)
    beside = None
    if undefended is not None:
        with torch.inference_mode():
            parts = torch.split(torch.from_numpy(x), manifest.max_batch)
            classes = torch.cat([undefended(front_input(part, None, downsample)).argmax(dim=1) for part in parts])
        beside = float((classes.numpy() == held_out.y).mean())
    return TradeOff(
        accuracy=float((probabilities.argmax(axis=1) == held_out.y).mean()),
        undefended=beside,
        excess=(most.ssim or 0.0) - (least.ssim or 0.0) if images else most.correlation - least.correlation,
        measure="SSIM" if images else "correlation",
        bytes_per_sample=payload_per_sample(manifest),
        bits_per_sample=trained.exposure.bits_per_sample,
        victims=len(mine),
        alone=None if said is None else float((said.argmax(axis=1) == held_out.y).mean()),
    )
