"""One cell of an audit: what one seed found of one bundle, as plain fields and arrays that outlive the process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.bundle import Manifest
from server_sdk.audit.attacks import Attack, Averaging, LearnedDecoder, Progress, WhiteBox
from server_sdk.audit.division import Division
from server_sdk.audit.outcome import Outcome, attack, worst_name, worst_of
from server_sdk.audit.scores import score
from server_sdk.audit.trial import Trained, Trial, train
from server_sdk.broker import EmbeddedBroker

__all__ = ["PROTOCOLS", "Finding", "fields_of", "find", "measure", "payload_per_sample", "standard_attacks"]

PROTOCOLS: Mapping[str, str] = {
    "P1": "perturbed in training and at test",
    "P2": "trained unperturbed, perturbed at test",
}
"""How accuracy is measured; attacks run on what P1 trained."""

Array = npt.NDArray[np.float32]
_COUNTED = ("accuracy", "streams", "samples", "guide_accuracy", "guide_agreement", "follow_when_wrong")
_KEPT = 256


@dataclass(frozen=True)
class Finding:
    """What one seed found of one bundle.

    Attributes:
        name: of the bundle's file.
        seed: of training and attacks.
        trained: device and server after P1.
        floor: the foe that sees decisions alone.
        outcomes: of the attacks.
        protocols: ``P1`` and, where it was measured, ``P2``, each from ``measure``.
    """

    name: str
    seed: int
    trained: Trained
    floor: Outcome
    outcomes: Sequence[Outcome]
    protocols: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def as_fields(self) -> dict[str, Any]:
        """As JSON values: all that ``report.compose`` needs. Excess is the worst attack's above the floor."""
        attacks = {each.attack: each.as_fields() for each in self.outcomes}
        return fields_of(self.name, self.seed, self.trained, self.protocols, self.floor.as_fields(), attacks)

    def arrays(self) -> dict[str, Array]:
        """Reconstructions of the first victims, for ``page.rows_of``: by the ``worst`` attack, and by the ``floor``."""
        worst = worst_of(self.outcomes)
        return {"worst": worst.reconstructions[:_KEPT], "floor": self.floor.reconstructions[:_KEPT]}


def fields_of(
    name: str,
    seed: int,
    trained: Trained,
    protocols: Mapping[str, Any],
    floor: Mapping[str, Any],
    attacks: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """A cell out of its parts, wherever they were found.

    Args:
        name, seed, trained, protocols: as ``Finding`` has them.
        floor: ``Outcome.as_fields`` of the floor.
        attacks: ``Outcome.as_fields`` by the attack's name, at least one that is not supposed.

    Raises:
        ServerError: none is.
    """
    bundle = trained.victim.bundle
    manifest = bundle.manifest
    unperturbed = protocols.get("P2", {}).get("clean") or {}
    worst = worst_name(attacks)
    return {
        "bundle": {
            "id": bundle.id,
            "name": name,
            "profile": manifest.profile,
            "input_shape": list(manifest.input_shape),
            "classes": len(manifest.classes),
            "perturbs": manifest.normalisation is not None,
            "frozen": manifest.frozen,
        },
        "seed": seed,
        "protocols": dict(protocols),
        # The network that never met a perturbation, asked without one: what follows the guide there, follows
        # because both find the same samples hard.
        "follow_when_wrong_without_perturbation": unperturbed.get("follow_when_wrong"),
        "bytes_per_sample": trained.figures["bytes_per_sample"],
        "payload_per_sample": payload_per_sample(manifest),
        "exposure": trained.exposure.as_fields(),
        "floor": floor,
        "attacks": attacks,
        "worst_attack": worst,
        "excess": attacks[worst]["excess"],
    }


def payload_per_sample(manifest: Manifest) -> int:
    """Bytes of one sample's activations, without labels and envelope; floats travel as float16."""
    values = math.prod(manifest.cut_shape)
    return -(-values * manifest.bits // 8) if manifest.bits else 2 * values


def standard_attacks(*, epochs: int, width: int, steps: int, sends: int, device: str = "cpu") -> list[Attack]:
    """The attacks of an audit: decoders, a white-box search, decoders on means of repeated sends.

    Args:
        epochs, width: of each decoder.
        steps: of the search.
        sends: of each sample that a mean is taken over.
        device: where decoders train, ``cpu`` or ``cuda``.
    """
    decoders = [
        LearnedDecoder("convolution", epochs, width, device=device),
        LearnedDecoder("mlp", epochs, width, device=device),
    ]
    return [*decoders, WhiteBox(steps), *(Averaging(decoder, sends) for decoder in decoders)]


def find(
    trial: Trial,
    division: Division,
    attacks: Sequence[Attack],
    *,
    second_protocol: bool = True,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    progress: Callable[[str], Progress] | None = None,
) -> Finding:
    """Train a bundle's fleet over a broker of its own, attack it, and measure its accuracy.

    Args:
        trial: of protocol P1.
        division: who has which samples.
        attacks: for instance ``standard_attacks``.
        second_protocol: measure P2 too, where the bundle perturbs: a second training.
        on_event: called with the events of the fleets.
        progress: gives the callback for the attack of a name.

    Raises:
        ServerError: a process gave up, or no attack fits.
        BundleError, ModelError: a bundle or weights that cannot be used.
    """
    with EmbeddedBroker("auto") as broker:
        trained = train(trial, division, broker, on_event=on_event)
        protocols = {"P1": measure(trained, division)}
        if second_protocol and trained.victim.bundle.manifest.normalisation is not None:
            folder = trial.folder.with_name(trial.folder.name + "-p2")
            second = train(replace(trial, folder=folder, protocol="P2"), division, broker, on_event=on_event)
            protocols["P2"] = measure(second, division)
    floor, outcomes = attack(trained, division, attacks, seed=trial.seed, progress=progress)
    return Finding(trial.bundle.stem, trial.seed, trained, floor, outcomes, protocols)


def measure(trained: Trained, division: Division) -> dict[str, Any]:
    """Accuracy on the victims, as JSON values.

    What the device itself counted (decisions, streams, guide), and from the server's probabilities balanced accuracy
    and AUC; ``clean`` is the same with inputs unperturbed, None where the profile has no perturbation.
    """

    def shares(evaluation: dict[str, Any], epsilon: float | None) -> dict[str, Any]:
        scores = score(trained.decide(division.victims.x, epsilon=epsilon), division.victims.y)
        counted = {name: evaluation[name] for name in _COUNTED if name in evaluation}
        return {**counted, "balanced_accuracy": scores.balanced_accuracy, "auc": scores.auc}

    clean = trained.figures.get("clean")
    return {
        **shares(trained.figures["evaluation"], None),
        "clean": None if clean is None else shares(clean, 0.0),
    }
