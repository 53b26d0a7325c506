"""One trial of an audit: train a fleet of one device, then attack what it sends with every attack there is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edge_sdk.batch import as_batch, save_dataset
from edge_sdk.bundle import Manifest, load_bundle
from edge_sdk.codec import unpack_tensors
from edge_sdk.errors import WireError
from edge_sdk.front import FrontState
from edge_sdk.ledger import bits_per_sample
from edge_sdk.noise import KEY_BYTES
from server_sdk.assembly import back_path, trainer_from
from server_sdk.audit.attacks.attack import Attack, Knowledge, Progress
from server_sdk.audit.attacks.decoder import LearnedDecoder
from server_sdk.audit.division import Division
from server_sdk.audit.exposure import Exposure
from server_sdk.audit.metrics import Likeness, likeness
from server_sdk.audit.twin import Twin
from server_sdk.audit.victim import Victim
from server_sdk.broker import EmbeddedBroker
from server_sdk.errors import ModelError, ServerError
from server_sdk.local_fleet import FleetOptions, FleetRun, run_fleet
from server_sdk.reference.guide import Guide, fit_guide
from server_sdk.trainer import Trainer

__all__ = ["Outcome", "Trained", "Trial", "attack", "decide", "shipped", "train", "worst_of"]

Array = npt.NDArray[np.float32]
_CODEC = "float16"
_JUDGE_EPOCHS = 15


@dataclass(frozen=True)
class Trial:
    """What is tried.

    Attributes:
        bundle: the file that is shipped, with the back's weights beside it.
        folder: where the fleet's files go; its name becomes the fleet's.
        rounds, batch: of the training.
        seed: of the order of the batches and of the attacks.
        protocol: ``P1``: perturbed in training and at test; ``P2``: trained unperturbed, perturbed at test.
    """

    bundle: Path
    folder: Path
    rounds: int
    batch: int
    seed: int
    protocol: Literal["P1", "P2"] = "P1"


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


@dataclass(frozen=True)
class Outcome:
    """What an attack came to.

    Attributes:
        attack: its name.
        likeness: of its reconstructions to x.
        floor: of what the decisions alone give, for the same victims.
        classified: share of the reconstructions that a classifier of clean inputs gets right.
        reconstructions: float32 (N, *input_shape), of the first N victims.
    """

    attack: str
    likeness: Likeness
    floor: Likeness
    classified: float
    reconstructions: Array = field(repr=False)

    @property
    def excess(self) -> dict[str, float | None]:
        """Beyond the floor: ``ssim`` and ``correlation`` above it, ``nmse_deficit`` the share below it."""
        mine, floor = self.likeness, self.floor
        return {
            "ssim": None if mine.ssim is None or floor.ssim is None else mine.ssim - floor.ssim,
            "correlation": mine.correlation - floor.correlation,
            "nmse_deficit": 1.0 - mine.nmse / floor.nmse,
        }

    def as_fields(self) -> dict[str, Any]:
        """As JSON values, without the reconstructions."""
        return {
            "victims": len(self.reconstructions),
            **self.likeness.as_fields(),
            "classified": self.classified,
            "excess": self.excess,
        }


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
    protocol = ["--train-unperturbed"] if trial.protocol == "P2" else []
    if bundle.manifest.normalisation is not None:
        protocol.append("--measure-clean")
    fleet = FleetOptions(
        trial.folder,
        trial.bundle,
        (shard,),
        server=("--rounds", str(trial.rounds), "--batch", str(trial.batch), "--evaluate-every", "0", *wire),
        device=("--seed", str(trial.seed), *wire, *protocol),
    )
    run = FleetRun()
    for event in run_fleet(fleet, broker, run):
        on_event(event)
    if "evaluation" not in run.figures:
        raise ServerError(f"the fleet ended without an evaluation: see the logs in {trial.folder}")
    path = trial.folder / "device-1.front.cbor"
    try:
        version = 0 if bundle.manifest.frozen else trial.rounds
        front = FrontState(version, unpack_tensors(path.read_bytes()))
    except (OSError, WireError) as exc:
        raise ServerError(f"the trained front {path} cannot be read: {exc}") from exc
    server = trainer_from(bundle, back_path(trial.bundle), rounds=trial.rounds)
    server.load(trial.folder / "server.safetensors")
    victim, foe = (Victim(bundle, front, codec=_CODEC, key=_key(trial.seed, who)) for who in ("victim", "foe"))
    try:
        twin = Twin(victim, front)
    except ModelError as exc:
        on_event({"event": "note", "text": f"no white-box search: {exc}"})
        twin = None
    steps = int(run.devices[0]["steps"])  # none where each sample is sent once and the front stays
    exposure = Exposure(
        bits_per_sample(bundle.manifest),
        training_samples=len(division.train),
        training_sends=steps * trial.batch or len(division.train),
        versions=max(steps, 1),
        decisions=len(division.victims),
    )
    return Trained(victim, foe, twin, server, run.figures, exposure)


def shipped(path: Path, *, seed: int, decisions: int) -> Trained:
    """A device and its server as they were exported: of a frozen front, with a back that was trained beside it.

    Args:
        path: of the bundle, with the back's weights beside it.
        seed: of the keys of their noise.
        decisions: how many samples the device is going to send.

    Raises:
        BundleError, ModelError: a bundle or weights that cannot be used.
    """
    bundle = load_bundle(path)
    front = FrontState(0, dict(bundle.initial))
    victim, foe = (Victim(bundle, front, codec=_CODEC, key=_key(seed, who)) for who in ("victim", "foe"))
    server = trainer_from(bundle, back_path(path), rounds=1)
    exposure = Exposure(bits_per_sample(bundle.manifest), 0, 0, 1, decisions)
    return Trained(victim, foe, None, server, {}, exposure)


def decide(trained: Trained, x: npt.NDArray[Any], *, epsilon: float | None = None) -> Array:
    """What the server decides on samples as the trained device sends them.

    Args:
        x: (N, *input_shape), as ``as_batch`` takes it.
        epsilon: in place of the bundle's budget; 0 leaves the perturbation out.

    Returns:
        Probabilities, float32 (N, K).
    """
    seen = trained.victim.send(x, epsilon=epsilon)
    return _probabilities(trained.server, seen, trained.victim.bundle.manifest.max_batch)


def attack(
    trained: Trained,
    division: Division,
    attacks: Sequence[Attack],
    *,
    seed: int,
    progress: Callable[[str], Progress] | None = None,
) -> tuple[Outcome, list[Outcome]]:
    """Attack the victims with each attack, and rebuild them from the server's decisions alone.

    Args:
        attacks: those that do not fit the cut are left out; the first ``mlp`` decoder among them gives the floor.
        seed: of the attacks.
        progress: gives the callback for the attack of a name.

    Returns:
        (the floor, the outcomes in the attacks' order). The floor is what a decoder makes of the decision alone: what
        any useful server must learn anyway.

    Raises:
        ServerError: no decoder for the floor, or no attack that fits.
    """
    manifest = trained.victim.bundle.manifest
    fitting = [
        each
        for each in attacks
        # Without noise all sends of a sample are one and the same, and so they are under one version of the front.
        if each.fits(manifest.cut_shape, twin=trained.twin is not None)
        and (each.sends == 1 or (manifest.noise and not manifest.frozen))
    ]
    plain = next((each for each in attacks if isinstance(each, LearnedDecoder) and each.kind == "mlp"), None)
    if plain is None or not fitting:
        raise ServerError("an audit needs the mlp decoder: it gives the floor, and fits every cut")
    own, x = (_floats(samples.x, manifest) for samples in (division.auxiliary, division.victims))
    seen_own, seen = trained.foe.send(own), trained.victim.send(x)
    judge = _judge(division, own, manifest, seed)
    told_own, told = (_decisions(trained.server, part, manifest.max_batch) for part in (seen_own, seen))

    def rebuilt(each: Attack, knowledge: Knowledge, of: Array, name: str) -> Array:
        return each.rebuild(knowledge, of, seed=seed, progress=None if progress is None else progress(name))

    lowest = rebuilt(plain, Knowledge(own, told_own), told, "floor")

    def outcome(name: str, done: Array) -> Outcome:
        first = slice(len(done))
        share = _share(judge, done, division.victims.y[first])
        return Outcome(name, likeness(done, x[first]), likeness(lowest[first], x[first]), share, done)

    found = []
    for each in fitting:
        known, of = seen_own, seen
        if each.sends > 1:
            known, of = (side.send(part, sends=each.sends) for side, part in ((trained.foe, own), (trained.victim, x)))
        done = rebuilt(each, Knowledge(own, known, trained.twin), of[: each.victims], each.name)
        found.append(outcome(each.name, done))
    return outcome("floor", lowest), found


def worst_of(outcomes: Sequence[Outcome]) -> Outcome:
    """The attack that shows most beyond the floor: by SSIM for images, by correlation for signals."""

    def shown(outcome: Outcome) -> float:
        ssim, correlation = outcome.excess["ssim"], outcome.excess["correlation"]
        return float(correlation or 0.0) if ssim is None else ssim

    return max(outcomes, key=shown)


def _key(seed: int, who: str) -> bytes:
    return hashlib.blake2b(f"{who} {seed}".encode(), digest_size=KEY_BYTES).digest()


def _floats(x: npt.NDArray[Any], manifest: Manifest) -> Array:
    return as_batch(x, manifest.input_shape, max_batch=len(x), input_range=manifest.input_range)


def _probabilities(server: Trainer, seen: Array, part: int) -> Array:
    decided = [server.decide(seen[start : start + part]).probabilities for start in range(0, len(seen), part)]
    return np.concatenate(decided)


def _decisions(server: Trainer, seen: Array, part: int) -> Array:
    """The decided class of each sample, one-hot: float32 (N, K)."""
    probabilities = _probabilities(server, seen, part)
    one_hot: Array = np.eye(probabilities.shape[1], dtype=np.float32)[probabilities.argmax(axis=1)]
    return one_hot


def _judge(division: Division, own: Array, manifest: Manifest, seed: int) -> Guide:
    """A classifier of clean inputs, trained on all that is not a victim."""
    clean = np.concatenate([_floats(division.train.x, manifest), own])
    labels = np.concatenate([division.train.y, division.auxiliary.y])
    return fit_guide(clean, labels, classes=len(manifest.classes), seed=seed, epochs=_JUDGE_EPOCHS)


def _share(judge: Guide, x: Array, y: npt.NDArray[np.int64]) -> float:
    import torch

    with torch.inference_mode():
        decided = torch.cat(
            [
                judge(part).argmax(dim=1)
                for part in torch.tensor_split(torch.from_numpy(x), tuple(range(512, len(x), 512)))
            ]
        )
    return float((decided.numpy() == y).mean())
