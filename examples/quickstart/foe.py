"""What a foe makes of what a device sends: one small learned decoder for each profile; ``psgl-server audit`` judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_sdk.batch import Samples, as_batch
from server_sdk.audit.attacks import Knowledge, LearnedDecoder
from server_sdk.audit.division import Division
from server_sdk.audit.metrics import likeness
from server_sdk.audit.trial import Trained, Trial, load

__all__ = ["FLOOR", "Rebuilt", "attack"]

Array = npt.NDArray[np.float32]
FLOOR = "floor"
"""The name of what is rebuilt from the server's decisions alone."""

_EPOCHS = (5, 40)
_AUXILIARY = 1000
_PIXELS = 20 * _AUXILIARY * 28 * 28  # that a decoder is trained on at most, all epochs together
_WIDTH = 32


@dataclass(frozen=True)
class Rebuilt:
    """What the foe made of the victims.

    Attributes:
        ssim: mean structural similarity to the true inputs, in [-1, 1].
        pictures: float32 (N, C, H, W) in [0, 1].
    """

    ssim: float
    pictures: Array = field(repr=False)


def attack(
    folders: Sequence[Path],
    auxiliary: Samples,
    shard: tuple[Samples, Samples],
    *,
    rounds: int,
    batch: int,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Rebuilt]:
    """Rebuild the first device's test samples from what it sends after its training, defence on.

    The foe has the device's graphs and its trained front, asks them about samples of its own and trains a decoder on
    the answers: of convolutions where what is sent has spatial axes, else a perceptron.

    Args:
        folders: of the runs, each named for its profile, with ``net.psgl`` and what the run left. The floor is what the
            same foe makes of the last run's decisions.
        auxiliary: the foe's samples, which no device has; of many or large ones the first are enough.
        shard: (train, test) of the first device; its test samples are the victims.
        rounds, batch, seed: of the runs; the seed is the attack's too.
        progress: called with what is attacked now.

    Returns:
        By profile, and ``FLOOR``.

    Raises:
        ServerError, BundleError, ModelError: a run that left no whole result.
    """
    shape = auxiliary.x.shape[1:]
    pixels = int(shape[1] * shape[2])
    count = max(min(len(auxiliary), _AUXILIARY, _PIXELS // (_EPOCHS[0] * pixels)), 2)
    epochs = min(max(_PIXELS // (count * pixels), _EPOCHS[0]), _EPOCHS[1])
    own = auxiliary.take(np.arange(min(count, len(auxiliary))))
    division = Division(shard[0], own, shard[1])
    known, x = (as_batch(samples.x, shape, max_batch=len(samples)) for samples in (own, shard[1]))

    def rebuilt(knowledge: Array, seen: Array) -> Rebuilt:
        kind = "convolution" if seen.ndim > 2 else "mlp"
        decoder = LearnedDecoder(kind, epochs=epochs, width=_WIDTH, least_steps=1)  # type: ignore[arg-type]
        pictures = decoder.rebuild(Knowledge(known, knowledge), seen, seed=seed)
        ssim = likeness(pictures, x).ssim
        assert ssim is not None, "images of 8 pixels and more have one"
        return Rebuilt(ssim, pictures)

    found: dict[str, Rebuilt] = {}
    for folder in folders:
        progress(folder.name)
        trained = load(Trial(folder / "net.psgl", folder, rounds, batch, seed), division)
        known_sent, sent = trained.foe.send(known), trained.victim.send(x)
        found[folder.name] = rebuilt(known_sent, sent)
    found[FLOOR] = rebuilt(_decided(trained, known_sent), _decided(trained, sent))
    return found


def _decided(trained: Trained, sent: Array) -> Array:
    """The class that the server decides on for each sample, one-hot: float32 (N, K)."""
    probabilities = trained.probabilities(sent)
    decided: Array = np.eye(probabilities.shape[1], dtype=np.float32)[probabilities.argmax(axis=1)]
    return decided
