"""One trial of an audit: a fleet of one device, trained by the commands that a hospital runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edge_sdk.bundle import load_bundle
from edge_sdk.codec import unpack_tensors
from edge_sdk.dataset import save_dataset
from edge_sdk.errors import WireError
from edge_sdk.front import FrontState
from edge_sdk.ledger import bits_per_sample
from edge_sdk.noise import KEY_BYTES
from server_sdk.assembly import back_path, trainer_from
from server_sdk.audit.division import Division
from server_sdk.audit.exposure import Exposure
from server_sdk.audit.twin import Twin
from server_sdk.audit.victim import Victim
from server_sdk.broker import EmbeddedBroker
from server_sdk.errors import ModelError, ServerError
from server_sdk.local_fleet import FleetOptions, FleetRun, run_fleet
from server_sdk.trainer import Trainer

__all__ = ["Trained", "Trial", "load", "shipped", "train"]

Array = npt.NDArray[np.float32]
_CODEC = "float16"


@dataclass(frozen=True)
class Trial:
    """What is tried.

    Attributes:
        bundle: the file that is shipped, with the back's weights beside it.
        folder: where the fleet's files go; its name becomes the fleet's.
        rounds, batch: of the training.
        seed: of the order of the batches and of the attacks.
        protocol: ``P1``: perturbed in training and at test; ``P2``: trained unperturbed, perturbed at test.
        shift: of training images on the device, in pixels (augmentation); nothing where each sample is sent once.
        allow_models: factories outside this SDK that may be imported, which runs their code.
    """

    bundle: Path
    folder: Path
    rounds: int
    batch: int
    seed: int
    protocol: Literal["P1", "P2"] = "P1"
    shift: int = 0
    allow_models: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trained:
    """A device and its server after training.

    Attributes:
        victim: the device, defence on.
        foe: a device of the foe's own, with the same bundle and front, and another key for its noise.
        twin: the victim again, differentiable, or None where its model does not allow it.
        server: decides on activations.
        figures: the server's own, with ``evaluation`` (defence on) and ``clean`` (inputs unperturbed).
        exposure: how often its samples have crossed.
    """

    victim: Victim
    foe: Victim
    twin: Twin | None
    server: Trainer
    figures: dict[str, Any]
    exposure: Exposure

    def probabilities(self, seen: Array) -> Array:
        """What the server decides on activations, float32 (N, *cut_shape): float32 (N, K)."""
        part = self.victim.bundle.manifest.max_batch
        parts = [self.server.decide(seen[start : start + part]).probabilities for start in range(0, len(seen), part)]
        return np.concatenate(parts)

    def decide(self, x: npt.NDArray[Any], *, epsilon: float | None = None) -> Array:
        """What the server decides on samples as the trained device sends them.

        Args:
            x: (N, *input_shape), as ``as_batch`` takes it.
            epsilon: in place of the bundle's budget; 0 leaves the perturbation out.

        Returns:
            Probabilities, float32 (N, K).
        """
        return self.probabilities(self.victim.send(x, epsilon=epsilon))


def train(
    trial: Trial, division: Division, broker: EmbeddedBroker, *, on_event: Callable[[dict[str, Any]], None]
) -> Trained:
    """Train as a hospital would: the server's and the device's own commands, over a broker.

    A frozen front stays as the bundle has it.

    Raises:
        ServerError: a process gave up.
        BundleError, ModelError: a bundle or weights that cannot be used.
    """
    bundle = load_bundle(trial.bundle)
    shard = trial.folder / "device.npz"
    save_dataset(shard, division.train, division.victims, input_range=bundle.manifest.input_range)
    wire = ("--codec", _CODEC, "--chunk-bytes", "262144")
    allowed = [word for name in trial.allow_models for word in ("--allow-model", name)]
    protocol = ["--train-unperturbed"] if trial.protocol == "P2" else []
    if bundle.manifest.normalisation is not None:
        protocol.append("--measure-clean")
    fleet = FleetOptions(
        trial.folder,
        trial.bundle,
        (shard,),
        server=("--rounds", str(trial.rounds), "--batch", str(trial.batch), "--evaluate-every", "0", *wire, *allowed),
        device=("--seed", str(trial.seed), "--shift", str(trial.shift), *wire, *protocol),
    )
    run = FleetRun()
    for event in run_fleet(fleet, broker, run):
        on_event(event)
    if "evaluation" not in run.figures:
        raise ServerError(f"the fleet ended without an evaluation: see the logs in {trial.folder}")
    return load(trial, division, on_note=lambda text: on_event({"event": "note", "text": text}))


def load(trial: Trial, division: Division, *, on_note: Callable[[str], None] = lambda text: None) -> Trained:
    """What ``train`` left in the trial's folder.

    Args:
        division: as it was trained.
        on_note: called with what is missing, one sentence each.

    Raises:
        ServerError: files that are missing or damaged.
        BundleError, ModelError: a bundle or weights that cannot be used.
    """
    bundle = load_bundle(trial.bundle)
    try:
        figures = json.loads((trial.folder / "result.json").read_text())
        device = json.loads((trial.folder / "device-1.json").read_text())
        tensors = unpack_tensors((trial.folder / "device-1.front.cbor").read_bytes())
        steps = int(device["steps"])  # none where each sample is sent once and the front stays
    except (OSError, WireError, ValueError, KeyError, TypeError) as exc:
        raise ServerError(f"what was trained in {trial.folder} cannot be read ({exc}): train again") from exc
    front = FrontState(0 if bundle.manifest.frozen else trial.rounds, tensors)
    server = trainer_from(bundle, back_path(trial.bundle), rounds=trial.rounds, allow_models=trial.allow_models)
    server.load(trial.folder / "server.safetensors")
    victim, foe = (Victim(bundle, front, codec=_CODEC, key=_key(trial.seed, who)) for who in ("victim", "foe"))
    try:
        twin = Twin(victim, front, allow_models=trial.allow_models)
    except ModelError as exc:
        on_note(f"no white-box search: {exc}")
        twin = None
    exposure = Exposure(
        bits_per_sample(bundle.manifest),
        training_samples=len(division.train),
        training_sends=steps * trial.batch or len(division.train),
        versions=max(steps, 1),
        decisions=len(division.victims),
    )
    return Trained(victim, foe, twin, server, figures, exposure)


def shipped(path: Path, *, seed: int, decisions: int, allow_models: Collection[str] = ()) -> Trained:
    """A device and its server as they were exported: of a frozen front, with a back that was trained beside it.

    Args:
        path: of the bundle, with the back's weights beside it.
        seed: of the keys of their noise.
        decisions: how many samples the device is going to send.
        allow_models: factories outside this SDK that may be imported, which runs their code.

    Raises:
        BundleError, ModelError: a bundle or weights that cannot be used.
    """
    bundle = load_bundle(path)
    front = FrontState(0, dict(bundle.initial))
    victim, foe = (Victim(bundle, front, codec=_CODEC, key=_key(seed, who)) for who in ("victim", "foe"))
    server = trainer_from(bundle, back_path(path), rounds=1, allow_models=allow_models)
    exposure = Exposure(bits_per_sample(bundle.manifest), 0, 0, 1, decisions)
    return Trained(victim, foe, None, server, {}, exposure)


def _key(seed: int, who: str) -> bytes:
    return hashlib.blake2b(f"{who} {seed}".encode(), digest_size=KEY_BYTES).digest()
