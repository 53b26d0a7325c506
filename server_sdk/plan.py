"""What one run is: said once when it begins, kept with it, and the same when it is resumed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TrainingPlan"]


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
