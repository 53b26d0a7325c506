"""What is measured: attacks, settings and cells; a cell is one piece of work whose result is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

from server_sdk.reference.perturbation import Normalisation

__all__ = ["HEADLINE", "STAGES", "Attack", "Cell", "Guided", "Settings", "cells_of", "settings_of"]

Guided = Literal["victim", "transferred", "own"]
_STRANGERS: tuple[Guided, ...] = ("victim", "transferred")


@dataclass(frozen=True)
class Attack:
    """How samples are perturbed.

    Attributes:
        guide: whose logits steer it: the ``victim`` (the undefended classifier itself), a ``transferred`` one (the
            small guide of the SDK, trained on samples that nobody else has) or, in P2 alone, the defended network's
            ``own`` stream of attacked activations.
        normalisation: ``sign`` or ``max``.
        epsilon: the budget, in units of the input's range.
    """

    guide: Guided
    normalisation: Normalisation
    epsilon: float

    @property
    def name(self) -> str:
        """``<guide>-<normalisation>-<epsilon>``."""
        return f"{self.guide}-{self.normalisation}-{self.epsilon:g}"


HEADLINE = Attack("victim", "sign", 0.2)
"""The attack that the figures are of."""


@dataclass(frozen=True)
class Settings:
    """Everything beside data, seed and code that decides a result.

    Attributes:
        epochs: passes over the training samples, of every split network.
        batch: its batch size, and the batch of the batch-level recovery at test.
        guide_epochs: of the transferred guide.
        decoder_epochs: of a foe's decoder.
        decoder_width: its channels.
        epsilons: budgets that are measured.
        trained_epsilons: those under which P1 trains.
        foe_guides: whose attacks, at the headline's budget, the foes meet.
        most: at most so many training and test samples each; None: all.
        swept: test samples of the sweep over mu.
        back_rate: learning rate of the server's Adam; both follow a cosine to 0.
        front_rate: of the devices' Adam.
    """

    epochs: int = 10
    batch: int = 64
    guide_epochs: int = 30
    decoder_epochs: int = 20
    decoder_width: int = 48
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    trained_epsilons: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3)
    foe_guides: tuple[Guided, ...] = ("victim",)
    most: int | None = None
    swept: int = 200
    back_rate: float = 2e-3
    front_rate: float = 1e-3

    def attacks(self, guides: Sequence[Guided], epsilons: Sequence[float] | None = None) -> list[Attack]:
        """Every attack with these guides, or those of some budgets."""
        chosen = self.epsilons if epsilons is None else epsilons
        return [
            Attack(guide, normalisation, epsilon)
            for guide, normalisation, epsilon in product(guides, get_args(Normalisation), chosen)
        ]


def settings_of(data: str, *, quick: bool) -> Settings:
    """How a data set is measured.

    Args:
        data: its name, for instance ``mnist_10k``; few large images (``mias``) take smaller batches and more passes.
        quick: a run of seconds, whose figures say nothing.
    """
    chosen = Settings()
    if "mias" in data:
        chosen = Settings(epochs=40, batch=32, guide_epochs=60, decoder_epochs=40, swept=64)
        chosen = replace(chosen, trained_epsilons=(0.2,))
    if quick:
        chosen = replace(chosen, batch=32, guide_epochs=5, decoder_epochs=3, decoder_width=16)
        chosen = replace(
            chosen, epochs=5, epsilons=(0.2,), trained_epsilons=(0.2,), most=160 if "mias" in data else 400, swept=16
        )
    return chosen


Kind = Literal["networks", "residual", "trace", "batch", "perturbed", "foes"]
STAGES: tuple[tuple[Kind, ...], ...] = (("networks",), ("batch", "residual", "trace", "perturbed"), ("foes",))
"""Kinds of cells in the order in which they depend on each other, within a stage the longest first."""


@dataclass(frozen=True)
class Cell:
    """One piece of work.

    Attributes:
        data: name of the data set.
        seed: of the parts, of initial weights and of everything that is drawn.
        kind: ``networks`` trains what the others need (victim, transferred guide, the foe's own classifier);
            ``residual``, ``trace`` and ``batch`` train clean and attack at test (P2), with what the name says as
            recovered activations (``batch``: residuals of a whole batch as one matrix); ``perturbed`` trains and
            tests under one attack (P1); ``foes`` rebuild inputs of a ``residual`` or ``perturbed`` network, or of the
            victim (``networks``).
        attack: of ``perturbed`` and ``foes``; None for foes of the victim, to which samples go as they are.
        of: of ``foes``: the kind of cell that trained what is attacked.
    """

    data: str
    seed: int
    kind: Kind
    attack: Attack | None = None
    of: Kind | None = None

    def attacks(self, settings: Settings) -> list[Attack]:
        """Under which attacks a network of this cell is tested."""
        return [self.attack] if self.attack is not None else settings.attacks(get_args(Guided))

    @property
    def name(self) -> str:
        """For progress."""
        parts = (self.data, f"seed {self.seed}", self.kind, self.of, self.attack and self.attack.name)
        return " ".join(part for part in parts if part)

    @property
    def protocol(self) -> str:
        """``P1`` or ``P2``."""
        return "P1" if "perturbed" in (self.kind, self.of) else "P2"

    @property
    def trained_by(self) -> Cell:
        """Of ``foes``: the cell whose network is attacked."""
        if self.of is None:
            raise ValueError(f"{self.name} attacks no network of another cell")
        return Cell(self.data, self.seed, self.of, self.attack if self.of == "perturbed" else None)

    @property
    def networks(self) -> Cell:
        """The cell with the networks that this one needs."""
        return Cell(self.data, self.seed, "networks")


def cells_of(data: str, seeds: Sequence[int], settings: Settings) -> list[Cell]:
    """Every cell of a data set, in the order of `STAGES`."""
    cells: list[Cell] = []
    for seed in seeds:
        cells += [Cell(data, seed, kind) for kind in ("networks", "batch", "residual", "trace")]
        cells += [
            Cell(data, seed, "perturbed", attack) for attack in settings.attacks(_STRANGERS, settings.trained_epsilons)
        ]
        cells.append(Cell(data, seed, "foes", None, "networks"))
        cells += [Cell(data, seed, "foes", replace(HEADLINE, guide=guide), "residual") for guide in settings.foe_guides]
    order = [kind for stage in STAGES for kind in stage]
    return sorted(cells, key=lambda cell: order.index(cell.kind))
