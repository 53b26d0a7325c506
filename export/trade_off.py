"""What a hardened bundle costs and what it shows, measured before it is handed out: a quick look, the audit is the judge."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edge_sdk.batch import Samples, as_batch
from edge_sdk.bundle import load_bundle
from edge_sdk.front import FrontState
from edge_sdk.ledger import bits_per_sample
from edge_sdk.noise import KEY_BYTES
from edge_sdk.packing import packed_bytes
from export.harden import Progress
from server_sdk.assembly import back_path, trainer_from
from server_sdk.audit.attacks import LearnedDecoder
from server_sdk.audit.division import Division
from server_sdk.audit.trial import Trained, attack, worst_of
from server_sdk.audit.victim import Victim
from server_sdk.reference.perturbation import front_input

__all__ = ["TradeOff", "weigh"]


@dataclass(frozen=True)
class TradeOff:
    """What was found on samples that were held out.

    Attributes:
        accuracy: of the decisions, defence on, 0 to 1.
        undefended: of the same samples by a network without a defence that saw the same training samples; None where
            there is none.
        excess: how much more of x a decoder rebuilds than the decision alone tells: SSIM for images, correlation for
            signals.
        measure: which of the two.
        bytes_per_sample: of the activations, without the envelope.
        bits_per_sample: bound on what one send tells of a sample, or None.
        victims: number of samples attacked.
    """

    accuracy: float
    undefended: float | None
    excess: float
    measure: str
    bytes_per_sample: float
    bits_per_sample: float | None
    victims: int

    def __str__(self) -> str:
        lost = "" if self.undefended is None else f" ({self.undefended:.1%} without a defence)"
        bound = "no bound in bits" if self.bits_per_sample is None else f"at most {self.bits_per_sample:.0f} bits"
        return (
            f"accuracy {self.accuracy:.1%}{lost}; a decoder shows {self.excess:+.3f} {self.measure} more than the "
            f"decision alone; {self.bytes_per_sample:.0f} bytes a sample, {bound} (on {self.victims} held-out samples)"
        )


def weigh(
    bundle_path: Path,
    train: Samples,
    held_out: Samples,
    *,
    undefended: torch.nn.Module | None = None,
    downsample: int = 2,
    epochs: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> TradeOff:
    """Attack a bundle whose front and back are trained, as a foe who has the first half of the held-out samples.

    Args:
        bundle_path: the bundle, the back's weights beside it.
        train: what the network was trained on; only for the classifier that judges reconstructions.
        held_out: at least 8 samples that it has not seen.
        undefended: a whole network to compare with, (N, C', *S') as ``front_input`` gives to logits.
        epochs: of the decoder.
        seed: of split, noise and decoder.

    Raises:
        ServerError: the bundle cannot be attacked.
        BundleError, BatchError, ModelError: a bundle or samples that cannot be used.
    """
    bundle = load_bundle(bundle_path)
    manifest = bundle.manifest
    front = FrontState(0, dict(bundle.initial))
    server = trainer_from(bundle, back_path(bundle_path), rounds=1)
    order = np.random.default_rng(seed).permutation(len(held_out))
    half = len(order) // 2
    division = Division(train, held_out.take(np.sort(order[:half])), held_out.take(np.sort(order[half:])))
    sides = [
        Victim(bundle, front, key=hashlib.blake2b(f"{who} {seed}".encode(), digest_size=KEY_BYTES).digest())
        for who in ("victim", "foe")
    ]
    trained = Trained(sides[0], sides[1], None, server, {})

    def shown(name: str) -> Progress | None:  # type: ignore[valid-type]
        return None

    floor, outcomes = attack(trained, division, [LearnedDecoder("mlp", epochs)], seed=seed)
    worst = worst_of(outcomes)
    x = as_batch(held_out.x, manifest.input_shape, max_batch=len(held_out))
    right = total = 0
    for start in range(0, len(x), manifest.max_batch):
        part = slice(start, start + manifest.max_batch)
        classes = server.decide(sides[0].send(x[part])).probabilities.argmax(axis=1)
        right, total = right + int((classes == held_out.y[part]).sum()), total + len(classes)
    excess = worst.excess["ssim"]
    return TradeOff(
        accuracy=right / total,
        undefended=None if undefended is None else _accuracy(undefended, x, held_out, downsample),
        excess=worst.excess["correlation"] if excess is None else excess,
        measure="correlation" if excess is None else "SSIM",
        bytes_per_sample=0,
        bits_per_sample=bits_per_sample(manifest),
        victims=len(order) - half,
    )
