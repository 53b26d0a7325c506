"""What attacks make of a device's samples, compared with the samples and with what the decisions alone give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edge_sdk.batch import as_batch
from edge_sdk.bundle import Manifest
from server_sdk.audit.attacks.attack import Attack, Knowledge, Progress
from server_sdk.audit.attacks.decoder import LearnedDecoder
from server_sdk.audit.division import Division
from server_sdk.audit.metrics import Likeness, likeness
from server_sdk.audit.trial import Trained
from server_sdk.errors import ServerError
from server_sdk.reference.guide import fit_guide

__all__ = ["Outcome", "Target", "attack", "worst_name", "worst_of"]

Array = npt.NDArray[np.float32]
_JUDGE_EPOCHS = 15


@dataclass(frozen=True)
class Outcome:
    """What an attack came to.

    Attributes:
        attack: its name.
        likeness: of its reconstructions to x.
        floor: of what the decisions alone give, for the same victims.
        classified: share of the reconstructions that a classifier of clean inputs gets right.
        reconstructions: float32 (N, *input_shape), of the first N victims.
        supposed: the device does not send what the attack was given: it is no part of any verdict.
    """

    attack: str
    likeness: Likeness
    floor: Likeness
    classified: float
    reconstructions: Array = field(repr=False)
    supposed: bool = False

    @property
    def excess(self) -> dict[str, float | None]:
        """Beyond the floor: ``ssim`` and ``correlation`` above it, ``nmse_deficit`` the share below, 0 of none."""
        mine, floor = self.likeness, self.floor
        return {
            "ssim": None if mine.ssim is None or floor.ssim is None else mine.ssim - floor.ssim,
            "correlation": mine.correlation - floor.correlation,
            "nmse_deficit": 1.0 - mine.nmse / floor.nmse if floor.nmse > 0 else 0.0,
        }

    def as_fields(self) -> dict[str, Any]:
        """As JSON values, without the reconstructions."""
        return {
            "victims": len(self.reconstructions),
            **self.likeness.as_fields(),
            "classified": self.classified,
            "supposed": self.supposed,
            "excess": self.excess,
        }


class Target:
    """A trained device whose victims are attacked, one attack after the other.

    Args:
        trained: device and server.
        division: who has which samples.
        plain: rebuilds from decisions alone: a decoder that fits every cut.
        seed: of the attacks.
        progress: gives the callback for the attack of a name.
    """

    def __init__(
        self,
        trained: Trained,
        division: Division,
        plain: LearnedDecoder,
        *,
        seed: int,
        progress: Callable[[str], Progress] | None = None,
    ) -> None:
        manifest = trained.victim.bundle.manifest
        self._trained = trained
        self._seed = seed
        self._progress = progress
        self._y = division.victims.y
        self._own, self._x = (_floats(samples.x, manifest) for samples in (division.auxiliary, division.victims))
        self._seen_own, self._seen = trained.foe.send(self._own), trained.victim.send(self._x)
        self._judge = _judge(division, self._own, manifest, seed)
        told_own, told = (_one_hot(trained.probabilities(seen)) for seen in (self._seen_own, self._seen))
        self._lowest = self._rebuilt(plain, Knowledge(self._own, told_own), told, "floor")

    def fits(self, attack: Attack) -> bool:
        """Whether the attack applies: to this cut, and over several sends only where noise makes them differ."""
        manifest = self._trained.victim.bundle.manifest
        possible = attack.fits(manifest.cut_shape, twin=self._trained.twin is not None)
        return possible and (attack.sends == 1 or manifest.noise > 0)

    def floor(self) -> Outcome:
        """What a decoder makes of the decision alone: what any useful server must learn anyway."""
        return self._outcome("floor", self._lowest)

    def against(self, attack: Attack) -> Outcome:
        """Attack the victims.

        Raises:
            ServerError: the attack does not fit.
        """
        known, of = self._seen_own, self._seen
        if attack.sends > 1:
            known = self._trained.foe.send(self._own, sends=attack.sends)
            of = self._trained.victim.send(self._x, sends=attack.sends)
        knowledge = Knowledge(self._own, known, self._trained.twin)
        found = self._outcome(attack.name, self._rebuilt(attack, knowledge, of[: attack.victims], attack.name))
        return replace(found, supposed=attack.sends > 1 and self._trained.victim.bundle.manifest.frozen)

    def _rebuilt(self, attack: Attack, knowledge: Knowledge, of: Array, name: str) -> Array:
        progress = None if self._progress is None else self._progress(name)
        return attack.rebuild(knowledge, of, seed=self._seed, progress=progress)

    def _outcome(self, name: str, done: Array) -> Outcome:
        first = slice(len(done))
        x, share = self._x[first], _share(self._judge, done, self._y[first])
        return Outcome(name, likeness(done, x), likeness(self._lowest[first], x), share, done)


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
        (the floor, the outcomes in the attacks' order).

    Raises:
        ServerError: no decoder for the floor, or no attack that fits.
    """
    plain = next((each for each in attacks if isinstance(each, LearnedDecoder) and each.kind == "mlp"), None)
    if plain is None:
        raise ServerError("an audit needs the mlp decoder: it gives the floor, and fits every cut")
    target = Target(trained, division, plain, seed=seed, progress=progress)
    return target.floor(), [target.against(each) for each in attacks if target.fits(each)]


def worst_of(outcomes: Sequence[Outcome]) -> Outcome:
    """The attack that shows most beyond the floor, by SSIM or, of signals, correlation; supposed ones do not count."""
    named = {each.attack: each for each in outcomes}
    return named[worst_name({name: each.as_fields() for name, each in named.items()})]


def worst_name(attacks: Mapping[str, Mapping[str, Any]]) -> str:
    """``worst_of`` by ``Outcome.as_fields``: the name of the worst.

    Raises:
        ServerError: no attack, or supposed ones alone.
    """
    real = [name for name, fields in attacks.items() if not fields["supposed"]]
    if not real:
        raise ServerError("there is no attack on what the device really sends: add a decoder")

    def shown(name: str) -> float:
        excess = attacks[name]["excess"]
        return float(excess["correlation"] if excess["ssim"] is None else excess["ssim"])

    return max(real, key=shown)


def _floats(x: npt.NDArray[Any], manifest: Manifest) -> Array:
    return as_batch(x, manifest.input_shape, max_batch=len(x), input_range=manifest.input_range)


def _one_hot(probabilities: Array) -> Array:
    """The decided class of each sample: float32 (N, K)."""
    one_hot: Array = np.eye(probabilities.shape[1], dtype=np.float32)[probabilities.argmax(axis=1)]
    return one_hot


def _judge(division: Division, own: Array, manifest: Manifest, seed: int) -> nn.Module:
    """A classifier of clean inputs, trained on all that is not a victim."""
    clean = np.concatenate([_floats(division.train.x, manifest), own])
    labels = np.concatenate([division.train.y, division.auxiliary.y])
    return fit_guide(clean, labels, classes=len(manifest.classes), seed=seed, epochs=_JUDGE_EPOCHS)


def _share(judge: nn.Module, x: Array, y: npt.NDArray[np.int64]) -> float:
    with torch.inference_mode():
        decided = torch.cat(
            [
                judge(part).argmax(dim=1)
                for part in torch.tensor_split(torch.from_numpy(x), tuple(range(512, len(x), 512)))
            ]
        )
    return float((decided.numpy() == y).mean())
