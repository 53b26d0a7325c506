"""What one run is: said once when it begins, kept with it, and the same when it is resumed."""

from __future__ import annotations

from dataclasses import dataclass

from edge_sdk.bundle import Manifest
from edge_sdk.errors import ConfigError

__all__ = ["TrainingPlan", "fronts_for"]


def fronts_for(manifest: Manifest, asked: str | None = None) -> str:
    """What becomes of the devices' fronts: what was asked for, else what the bundle is made for.

    Args:
        asked: ``own``, ``shared``, ``relay`` or ``frozen``; None: ``frozen`` for a bundle with a frozen front, else
            ``own``.

    Raises:
        ConfigError: a frozen front is to be trained.
    """
    if asked is None:
        return "frozen" if manifest.frozen else "own"
    if manifest.frozen and asked != "frozen":
        raise ConfigError(
            f"the bundle's front is frozen and cannot be trained as {asked!r}: use --fronts frozen, or leave it out"
        )
    return asked


@dataclass(frozen=True)
class TrainingPlan:
    """What one run is; a run that is resumed has the same.

    Attributes:
        devices: devices to wait for before the first round.
        rounds: optimizer steps of the back layers.
        batch: samples of each device in one round.
        evaluate_every: rounds between two evaluations, 0 for none before the end.
        schedule: ``rounds`` or ``async``.
        fronts: ``own``, ``shared``, ``relay`` or ``frozen``.
        synchronise_every: rounds between two means of ``shared`` fronts, or a device's turn in ``relay``.
        weights: ``equal`` or ``samples``: how much a device counts in a round and in the mean of the fronts.
        seed: order of stored samples (``frozen``).
        codec: ``float32`` or ``float16`` gradients on the wire.
        chunk_bytes: largest payload of one MQTT message.
    """

    devices: int
    rounds: int
    batch: int = 32
    evaluate_every: int = 0
    schedule: str = "rounds"
    fronts: str = "own"
    synchronise_every: int = 10
    weights: str = "equal"
    seed: int = 0
    codec: str = "float16"
    chunk_bytes: int = 65536
