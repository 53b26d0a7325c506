"""One unit of a sweep: one profile on one data set with one seed, made and trained once, then attacked cell by cell.

Everything is kept in a folder that is named by the hash of its configuration; what is there is not made again. A file
is written whole or not at all, so an interruption costs the cell that was under way.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from edge_sdk.batch import Samples
from edge_sdk.dataset import Dataset, load_dataset
from edge_sdk.errors import BatchError, PsglError
from edge_sdk.version import __version__
from export.build import build_bundle
from export.errors import ExportError
from export.harden import Recipe
from export.options import BuildOptions, class_names, measured_range, perturbation_of
from export.plan import AttackOptions, DataOptions, ProfileOptions
from export.prepare import prepare, recipe_of
from server_sdk.audit.division import Division, divide
from server_sdk.audit.finding import fields_of, measure
from server_sdk.audit.outcome import Outcome, Target
from server_sdk.audit.trial import Trained, Trial, load, train
from server_sdk.broker import EmbeddedBroker
from server_sdk.reference.profiles import PROFILES

__all__ = ["Unit", "code_version", "read_data"]

Say = Callable[[str], None]
_KEPT = 256
_FLOOR = "floor"
_PACKAGES = ("edge_sdk", "server_sdk", "export")
_EXTRAS = ("kind", "input_range", "group_train")


@cache
def code_version() -> str:
    """The version of this SDK and a hash of its sources, by which cells of older code are told apart.

    Read once: a process that runs for days stays with the code that it began with.
    """
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
        ExportError: the disk refuses.
    """
    try:
        with np.load(options.file, allow_pickle=False) as archive:
            extras = [name for name in _EXTRAS if name in archive.files]
            arrays: dict[str, npt.NDArray[Any]] = {
                name: archive[name] for name in ("x_train", "y_train", "x_test", "y_test", *extras)
            }
            for x, y in zip(options.merge[::2], options.merge[1::2], strict=True):
                arrays["x_train"] = np.concatenate([arrays["x_train"], archive[x]])
                arrays["y_train"] = np.concatenate([arrays["y_train"], archive[y]])
            if options.group is not None:
                arrays["group_train"] = archive[options.group]
    except (OSError, KeyError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as exc:
        raise BatchError(f"{options.file} cannot be used as the plan says: {' '.join(str(exc).split())}") from exc
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
        with _whole(path) as partial:
            np.savez(partial, **arrays)  # type: ignore[arg-type]
    return load_dataset(path)


_read_once = lru_cache(maxsize=2)(read_data)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write to; the file gets its own name once it is whole.

    Raises:
        ExportError: the disk refuses.
    """
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as exc:
        raise ExportError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def _digest(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Unit:
    """One profile on one data set with one seed.

    Attributes:
        folder: of the whole sweep.
        data: name and options of the data.
        profile: name and options of the profile.
        seed: of division, training and attacks.
        attack: options of the attacks; the names of cells hold the hash of those that decide them.
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
        """The unit's own folder; its name holds the hash of all that decides what is trained but the code.

        Raises:
            BatchError: the data file cannot be read.
        """
        file = self.data[1].file
        try:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as exc:
            raise BatchError(f"the data file {file} cannot be read ({exc.strerror or exc}): put it there") from exc
        data = {**asdict(self.data[1]), "file": content}
        own = {name: value for name, value in asdict(self.profile[1]).items() if value is not None}
        settings = asdict(PROFILES[self.profile[1].profile])
        del settings["about"]
        told = {
            "data": data,
            "profile": {**own, "recipe": dict(own["recipe"])},
            "settings": settings,
            "recipe": {**asdict(self._recipe()), "compute": None} if settings["frozen"] else None,
            "seed": self.seed,
        }
        return self.folder / self.data[0] / self.profile[0] / f"{self.seed}-{_digest(told)}"

    def has(self, attack: str) -> bool:
        """Whether that cell is there, whole."""
        fields = self._read(self._cell(attack))
        return fields is not None and (not fields["fits"] or self._pictures(attack).exists())

    def missing(self, attacks: Sequence[str]) -> list[str]:
        """Which of these cells are not there, the floor included."""
        return [name for name in (_FLOOR, *attacks) if not self.has(name)]

    def run(self, attacks: Sequence[str], say: Say) -> None:
        """Make what is missing: the bundle, the training, the floor, each attack.

        Args:
            attacks: by name, in this order; one that does not fit the cut is noted as such.
            say: called with one line for each thing that was made or is under way.

        Raises:
            ExportError, ServerError, BatchError: the unit cannot be made.
        """
        missing = self.missing(attacks)
        if not missing:
            return
        trained = self._trained(say)
        missing = self.missing(attacks)

        def progress(name: str) -> Callable[[int, int, float], None]:
            return lambda done, of, loss: say(f"{self.name}: {name}, {done} of {of}, loss {loss:.4f}")

        target = Target(
            trained, self._division, self.attack.decoder("mlp", self.compute), seed=self.seed, progress=progress
        )
        for name in missing:
            if name == _FLOOR:
                self._keep(name, target.floor())
                continue
            attack = self.attack.make(name, self.compute)
            self._keep(name, target.against(attack) if target.fits(attack) else None)

    def cell(self, attacks: Sequence[str]) -> dict[str, Any] | None:
        """What was found so far, as ``Finding.as_fields`` has it; None before the floor and the first attack.

        Args:
            attacks: by name; those that are not there or do not fit are left out.

        Raises:
            ExportError, ServerError, BatchError: what was trained cannot be read.
        """
        facts, floor = self._read(self._facts), self._fitting(_FLOOR)
        found = {name: fields for name in attacks if (fields := self._fitting(name)) is not None}
        if facts is None or floor is None or all(fields["supposed"] for fields in found.values()):
            return None
        cell = fields_of(self.profile[0], self.seed, self._loaded(), facts["protocols"], floor, found)
        return {**cell, "code": facts["code"], "samples": facts["samples"]}

    def arrays(self, worst: str) -> dict[str, npt.NDArray[np.float32]]:
        """Reconstructions of the first victims, for ``page.rows_of``.

        Raises:
            ExportError: a file is missing or damaged.
        """
        return {"worst": self._reconstructions(worst), _FLOOR: self._reconstructions(_FLOOR)}

    def victims(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """The first victims and their classes."""
        victims = self._division.victims
        return victims.x[:_KEPT], victims.y[:_KEPT]

    @property
    def _dataset(self) -> Dataset:
        return _read_once(self.data[1], self.folder / "data")

    @property
    def _division(self) -> Division:
        return divide(self._dataset, foe=self.data[1].foe, seed=self.seed)

    def _shares(self) -> tuple[Samples | None, Division]:
        """The guide's samples, if there is a guide, and who has which others: the guide's are not the device's."""
        division = self._division
        if perturbation_of(self._options()) is None:
            return None, division
        whole = Dataset(division.train, division.victims, self._dataset.classes)
        halves = divide(whole, foe=self.data[1].guide, seed=self.seed)
        return halves.auxiliary, replace(division, train=halves.train)

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

    def _loaded(self) -> Trained:
        try:
            return load(self._trial(), self._shares()[1])
        except PsglError as exc:
            raise ExportError(f"{exc} (delete {self.path}, and the unit is made again)") from exc

    def _trained(self, say: Say) -> Trained:
        if self._read(self._facts) is not None:
            return self._loaded()
        for stale in self.path.glob("*.json"):
            stale.unlink()  # what was found of another training
        guide_samples, division = self._shares()
        self._bundle(division.train, guide_samples, say)

        def event(what: dict[str, Any]) -> None:
            if what["event"] == "round" and what["round"] % 20 == 0:
                say(f"{self.name}: round {what['round']} of {what['rounds']}, loss {what['loss']:.4f}")

        with EmbeddedBroker("auto") as broker:
            trained = train(self._trial(), division, broker, on_event=event)
            protocols = {"P1": measure(trained, division)}
            if trained.victim.bundle.manifest.normalisation is not None:
                protocols["P2"] = measure(train(self._trial("P2"), division, broker, on_event=event), division)
        counts = {"train": len(division.train), "foe": len(division.auxiliary), "victims": len(division.victims)}
        self._write(self._facts, {"protocols": protocols, "samples": counts, "code": code_version()})
        return trained

    def _options(self) -> BuildOptions:
        return BuildOptions(
            self.profile[1].profile,
            self._dataset.input_shape,
            class_names(self._dataset.classes),
            seed=self.seed,
            perturb=cast(Literal["sign", "max", "none"] | None, self.profile[1].perturb),
            epsilon=self.profile[1].epsilon,
            noise=self.profile[1].noise,
        )

    def _recipe(self) -> Recipe:
        return replace(recipe_of(self._options()), compute=self.compute, **self.profile[1].recipe)

    def _bundle(self, samples: Samples, guide_samples: Samples | None, say: Say) -> None:
        measured = self._dataset.input_range or measured_range(self._division.train)
        options = replace(self._options(), input_range=measured)

        def progress(stage: str, done: int, of: int, loss: float) -> None:
            say(f"{self.name}: {stage}, {done} of {of}, loss {loss:.4f}")

        made = prepare(samples, options, self._recipe(), guide_samples=guide_samples, progress=progress)
        build_bundle(self.path / "net.psgl", made.options, made.guide, network=made.network)

    @property
    def _facts(self) -> Path:
        """What the training came to; there once it is over."""
        return self.path / "unit.json"

    def _cell(self, name: str) -> Path:
        return self.path / f"{name}-{_digest(self.attack.told(name))[:6]}.json"

    def _pictures(self, name: str) -> Path:
        return self._cell(name).with_suffix(".npz")

    def _keep(self, name: str, outcome: Outcome | None) -> None:
        if outcome is not None:
            with _whole(self._pictures(name)) as partial:
                np.savez_compressed(partial, reconstructions=outcome.reconstructions[:_KEPT])
        fields = {"fits": False} if outcome is None else {"fits": True, **outcome.as_fields()}
        self._write(self._cell(name), {**fields, "code": code_version()})

    def _fitting(self, name: str) -> dict[str, Any] | None:
        """A cell's fields; None where it is missing or its attack does not fit."""
        fields = self._read(self._cell(name)) if self.has(name) else None
        return fields if fields is not None and fields.pop("fits") else None

    def _read(self, path: Path) -> dict[str, Any] | None:
        """A file of this unit; None where it is missing or damaged: then it is made again."""
        try:
            fields = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return fields if isinstance(fields, dict) and "code" in fields else None

    def _reconstructions(self, name: str) -> npt.NDArray[np.float32]:
        path = self._pictures(name)
        try:
            with np.load(path, allow_pickle=False) as archive:
                made: npt.NDArray[np.float32] = archive["reconstructions"]
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as exc:
            raise ExportError(f"{path} is missing or damaged: delete it, and the cell is made again") from exc
        return made

    def _write(self, path: Path, content: Mapping[str, Any]) -> None:
        with _whole(path) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n")
