"""One unit of a sweep: one profile on one data set with one seed, made and trained once, then attacked cell by cell.

Everything is kept in a folder that is named by the hash of its configuration; what is there is not made again. A file
is written whole or not at all, so an interruption costs the cell that was under way.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.batch import Dataset, load_dataset
from edge_sdk.errors import BatchError
from edge_sdk.version import __version__
from export.build import BuildOptions, build_bundle, class_names, measured_range
from export.errors import ExportError
from export.harden import Recipe
from export.plan import AttackOptions, DataOptions, ProfileOptions
from export.prepare import prepare, recipe_of
from server_sdk.audit.attacks import LearnedDecoder
from server_sdk.audit.division import Division, divide
from server_sdk.audit.finding import fields_of, measure
from server_sdk.audit.outcome import Outcome, Target
from server_sdk.audit.trial import Trained, Trial, load, train
from server_sdk.broker import EmbeddedBroker
from server_sdk.reference.profiles import PROFILES

__all__ = ["Unit", "code_version", "read_data"]

Say = Callable[[str], None]
_KEPT = 256
_PACKAGES = ("edge_sdk", "server_sdk", "export")


def code_version() -> str:
    """The version of this SDK and a hash of its sources, by which cells of older code are told apart."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def read_data(options: DataOptions, folder: Path) -> Dataset:
    """Read a plan's data file, made into what ``load_dataset`` reads; the copy is kept in the folder of the sweep.

    Raises:
        BatchError: the file lacks an array or cannot be used.
    """
    try:
        with np.load(options.file, allow_pickle=False) as archive:
            arrays: dict[str, npt.NDArray[Any]] = {
                name: archive[name] for name in ("x_train", "y_train", "x_test", "y_test")
            }
            for x, y in zip(options.merge[::2], options.merge[1::2], strict=True):
                arrays["x_train"] = np.concatenate([arrays["x_train"], archive[x]])
                arrays["y_train"] = np.concatenate([arrays["y_train"], archive[y]])
            if options.group is not None:
                arrays["group_train"] = archive[options.group]
    except (OSError, KeyError, ValueError) as exc:
        raise BatchError(f"{options.file} cannot be used as the plan says: {exc}") from exc
    if options.rest is not None:
        for name in ("y_train", "y_test"):
            arrays[name] = (arrays[name] != options.rest).astype(np.int64)
    if options.signal:
        arrays["kind"] = np.array("signal")
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    path = folder / f"{options.file.stem}-{digest.hexdigest()[:12]}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}.{os.getpid()}.npz")
        np.savez(partial, **arrays)  # type: ignore[arg-type]
        partial.replace(path)
    return load_dataset(path)


@dataclass(frozen=True)
class Unit:
    """One profile on one data set with one seed.

    Attributes:
        folder: of the whole sweep.
        data: name and options of the data.
        profile: name and options of the profile.
        seed: of division, training and attacks.
        attack: options of the attacks.
        compute: where networks and decoders train, ``cpu`` or ``cuda``; no part of the hash.
    """

    folder: Path
    data: tuple[str, DataOptions]
    profile: tuple[str, ProfileOptions]
    seed: int
    attack: AttackOptions
    compute: str = "cpu"

    @property
    def name(self) -> str:
        """For people: data, profile, seed."""
        return f"{self.data[0]} {self.profile[0]} seed {self.seed}"

    @cached_property
    def path(self) -> Path:
        """The unit's own folder; its name holds the hash of all that decides what is found."""
        data = {
            **asdict(self.data[1]),
            "file": hashlib.sha256(self.data[1].file.read_bytes()).hexdigest(),
            "seeds": None,
        }
        own = asdict(self.profile[1])
        settings = PROFILES[self.profile[1].profile]
        told = {
            "data": data,
            "profile": {**own, "recipe": dict(own["recipe"])},
            "settings": repr(settings),
            "attack": asdict(self.attack),
            "seed": self.seed,
        }
        digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:12]
        return self.folder / self.data[0] / self.profile[0] / f"{self.seed}-{digest}"

    def has(self, attack: str) -> bool:
        """Whether that cell is there."""
        return self._cell(attack).exists()

    def run(self, attacks: tuple[str, ...], say: Say) -> None:
        """Make what is missing: the bundle, the training, the floor, each attack.

        Args:
            attacks: by name, in this order; one that does not fit the cut is noted as such.
            say: called with one line for each thing that was made or is under way.

        Raises:
            ExportError, ServerError, BatchError: the unit cannot be made.
        """
        missing = [name for name in attacks if not self.has(name)]
        if not missing:
            return
        division = self._division
        trained = self._trained(division, say)
        plain = self.attack.make("decoder_mlp", self.compute)
        if not isinstance(plain, LearnedDecoder):
            raise ExportError("the floor needs the mlp decoder")

        def progress(name: str) -> Callable[[int, int, float], None]:
            return lambda done, of, loss: say(f"{self.name}: {name}, {done} of {of}, loss {loss:.4f}")

        target = Target(trained, division, plain, seed=self.seed, progress=progress)
        if not self.has("floor"):
            self._keep("floor", target.floor())
        for name in missing:
            attack = self.attack.make(name, self.compute)
            self._keep(name, target.against(attack) if target.fits(attack) else None)

    def cell(self, attacks: tuple[str, ...]) -> dict[str, Any] | None:
        """What was found so far, as ``Finding.as_fields`` has it; None before the first attack."""
        found = {name: fields for name in attacks if (fields := self._read(name)) is not None}
        if not any(not fields["supposed"] for fields in found.values()):
            return None
        facts: dict[str, Any] = json.loads((self.path / "unit.json").read_text())
        floor = self._read("floor")
        trained = load(self._trial(), self._division)
        cell = fields_of(self.profile[0], self.seed, trained, facts["protocols"], floor or {}, found)
        return {**cell, "code": facts["code"], "samples": facts["samples"]}

    def arrays(self, worst: str) -> dict[str, npt.NDArray[np.float32]]:
        """Reconstructions of the first victims, for ``page.rows_of``."""
        names = {"worst": worst, "floor": "floor"}
        return {kind: np.load(self.path / f"{name}.npz")["reconstructions"] for kind, name in names.items()}

    def victims(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """The first victims and their classes."""
        victims = self._division.victims
        return victims.x[:_KEPT], victims.y[:_KEPT]

    @cached_property
    def _division(self) -> Division:
        options = self.data[1]
        return divide(read_data(options, self.folder / "data"), foe=options.foe, seed=self.seed)

    def _trial(self, protocol: str = "P1") -> Trial:
        name = self.path.name if protocol == "P1" else f"{self.path.name}-p2"
        options = self.data[1]
        return Trial(
            self.path / "net.psgl",
            self.path / f"fleet-{name}",
            options.rounds,
            options.batch,
            self.seed,
            "P2" if protocol == "P2" else "P1",
            options.shift,
        )

    def _trained(self, division: Division, say: Say) -> Trained:
        facts = self.path / "unit.json"
        if facts.exists():
            return load(self._trial(), division)
        self.path.mkdir(parents=True, exist_ok=True)
        division = self._bundle(division, say)

        def event(what: dict[str, Any]) -> None:
            if what["event"] == "round" and what["round"] % 20 == 0:
                say(f"{self.name}: round {what['round']} of {what['rounds']}, loss {what['loss']:.4f}")

        with EmbeddedBroker("auto") as broker:
            trained = train(self._trial(), division, broker, on_event=event)
            protocols = {"P1": measure(trained, division)}
            if trained.victim.bundle.manifest.normalisation is not None:
                protocols["P2"] = measure(train(self._trial("P2"), division, broker, on_event=event), division)
        counts = {"train": len(division.train), "foe": len(division.auxiliary), "victims": len(division.victims)}
        self._write(facts, {"protocols": protocols, "samples": counts, "code": code_version()})
        return trained

    def _bundle(self, division: Division, say: Say) -> Division:
        """Make the bundle; returns the division with what is left to the device."""
        first = division.train
        profile = self.profile[1]
        classes = int(first.y.max()) + 1
        options = BuildOptions(
            profile.profile,
            tuple(int(size) for size in first.x.shape[1:]),
            class_names(classes),
            seed=self.seed,
            noise=profile.noise,
            input_range=measured_range(first),
        )
        settings = PROFILES[profile.profile]
        mine = first
        if settings.perturbation is not None:
            halves = divide(Dataset(first, division.victims, classes), foe=self.data[1].guide, seed=self.seed)
            first, mine = halves.auxiliary, halves.train

        def progress(stage: str, done: int, of: int, loss: float) -> None:
            say(f"{self.name}: {stage}, {done} of {of}, loss {loss:.4f}")

        made = prepare(first, options, self._recipe(options), progress=progress)
        build_bundle(self.path / "net.psgl", made.options, made.guide, network=made.network)
        return replace(division, train=mine)

    def _recipe(self, options: BuildOptions) -> Recipe:
        try:
            return replace(recipe_of(options), compute=self.compute, **self.profile[1].recipe)
        except TypeError as exc:
            raise ExportError(f"the recipe of profile {self.profile[0]!r} in the plan: {exc}") from exc

    def _cell(self, name: str) -> Path:
        return self.path / f"{name}.json"

    def _keep(self, name: str, outcome: Outcome | None) -> None:
        if outcome is not None:
            partial = self.path / f"{name}.partial.npz"
            np.savez_compressed(partial, reconstructions=outcome.reconstructions[:_KEPT])
            partial.replace(self.path / f"{name}.npz")
        fields = {"fits": False} if outcome is None else {"fits": True, **outcome.as_fields()}
        self._write(self._cell(name), {**fields, "code": code_version()})

    def _read(self, name: str) -> dict[str, Any] | None:
        """A cell's fields; None where it is missing or its attack does not fit."""
        path = self._cell(name)
        if not path.exists():
            return None
        fields: dict[str, Any] = json.loads(path.read_text())
        return fields if fields.pop("fits") else None

    def _write(self, path: Path, content: Mapping[str, Any]) -> None:
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(content, indent=1) + "\n")
            partial.replace(path)
        except OSError as exc:
            raise ExportError(f"{path} cannot be written: {exc.strerror or exc}") from exc
