"""The plan of a sweep, read from TOML: which data, which profiles, which attacks, how many seeds, in which order."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from edge_sdk.errors import ConfigError, PsglError
from export.harden import Recipe
from server_sdk.audit.attacks import Attack, Averaging, LearnedDecoder, WhiteBox
from server_sdk.reference.perturbation import Normalisation
from server_sdk.reference.profiles import PROFILES

__all__ = ["ATTACKS", "AttackOptions", "DataOptions", "Plan", "ProfileOptions", "Stage", "read_plan"]

ATTACKS = ("decoder_mlp", "decoder_convolution", "white_box", "averaging_decoder_mlp", "averaging_decoder_convolution")
"""Attacks that a plan may name; all but the decoders on a single send are slow or seldom the worst."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class AttackOptions:
    """How hard the foe tries.

    Attributes:
        epochs, width: of each decoder.
        steps: of the white-box search.
        sends: of each sample that a foe averages over.
    """

    epochs: int = 20
    width: int = 48
    steps: int = 400
    sends: int = 16

    def __post_init__(self) -> None:
        _at_least(1, epochs=self.epochs, width=self.width, steps=self.steps)
        _at_least(2, sends=self.sends)

    def decoder(self, kind: Literal["mlp", "convolution"], compute: str) -> LearnedDecoder:
        """The decoder of that kind."""
        return LearnedDecoder(kind, self.epochs, self.width, device=compute)

    def make(self, name: str, compute: str) -> Attack:
        """The attack of that name, one of ``ATTACKS``."""
        if name == "white_box":
            return WhiteBox(self.steps)
        decoder = self.decoder("mlp" if name.endswith("mlp") else "convolution", compute)
        return Averaging(decoder, self.sends) if name.startswith("averaging_") else decoder

    def told(self, name: str) -> dict[str, int]:
        """Which of these options decide what the attack of that name finds; the floor is a decoder's."""
        if name == "white_box":
            return {"steps": self.steps}
        averaged = {"sends": self.sends} if name.startswith("averaging_") else {}
        return {"epochs": self.epochs, "width": self.width, **averaged}


@dataclass(frozen=True)
class DataOptions:
    """A data file and how it is used.

    Attributes:
        file: .npz with ``x_train``, ``y_train``, ``x_test``, ``y_test``, as ``load_dataset`` reads it.
        foe: the foe's share of the training samples, above 0 and below 1.
        rest: None, or the class that all others are told from: labels become 0 (this class) and 1 (any other).
        signal: samples are signals, also where the file does not say so.
        group: name of the array in the file that says which patient or record a training sample is of; None:
            ``group_train``, if the file has it.
        merge: names of the arrays of further training samples and of their labels, a validation set for instance.
        rounds, batch: of training on devices, at least 1.
        guide: share, above 0 and below 1, of the device's training samples that the guide is fitted on where a profile
            has one; the device trains on the others.
        shift: augmentation on the device.
    """

    file: Path
    foe: float = 0.4
    rest: int | None = None
    signal: bool = False
    group: str | None = None
    merge: tuple[str, ...] = ()
    rounds: int = 1000
    batch: int = 64
    guide: float = 0.3
    shift: int = 0

    def __post_init__(self) -> None:
        for name, share in (("foe", self.foe), ("guide", self.guide)):
            if not 0 < share < 1:
                raise ConfigError(f"{name} is {share:g}: choose a share above 0 and below 1")
        _at_least(1, rounds=self.rounds, batch=self.batch)
        _at_least(0, shift=self.shift, rest=self.rest or 0)
        if len(self.merge) % 2:
            raise ConfigError("merge names pairs of arrays, samples and their labels: give an even number")


@dataclass(frozen=True)
class ProfileOptions:
    """What one profile of a plan is.

    Attributes:
        profile: a name of ``PROFILES``.
        recipe: fields of ``Recipe`` that differ from what suits the data, for a front that is trained at export time.
        noise, perturb, epsilon: in place of the profile's, as in ``BuildOptions``.
    """

    profile: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    noise: float | None = None
    perturb: str | None = None
    epsilon: float | None = None

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise ConfigError(f"there is no profile {self.profile!r}: use one of {', '.join(PROFILES)}")
        if self.noise is not None and not (math.isfinite(self.noise) and self.noise >= 0):
            raise ConfigError(f"noise is {self.noise:g}: give a number of at least 0")
        if self.perturb not in (None, "none", *get_args(Normalisation)):
            raise ConfigError(f"perturb is {self.perturb!r}: it is none, {' or '.join(get_args(Normalisation))}")
        if self.epsilon is not None and not 0 <= self.epsilon <= 1:
            raise ConfigError(f"epsilon is {self.epsilon:g}: it is 0 to 1, in units of the input's range")
        if "compute" in self.recipe:
            raise ConfigError("where a recipe trains is no part of a plan: use --compute")
        if self.recipe and not PROFILES[self.profile].frozen:
            raise ConfigError(f"devices train the front of {self.profile!r}: a recipe is for one that is trained here")
        _options(Recipe, self.recipe, "recipe")


@dataclass(frozen=True)
class Stage:
    """Cells that come before those of later stages: every combination of what is named.

    Attributes:
        profiles, data, attacks: by name.
        seeds: 0 to this, less one.
    """

    profiles: tuple[str, ...]
    data: tuple[str, ...]
    attacks: tuple[str, ...]
    seeds: int = 3

    def __post_init__(self) -> None:
        _at_least(1, seeds=self.seeds)
        if not (self.profiles and self.data and self.attacks):
            raise ConfigError("nothing to do: name at least one of profiles, data and attacks each")


@dataclass(frozen=True)
class Plan:
    """A sweep.

    Attributes:
        data, profiles: by the names that stages use.
        stages: in their order.
        attack: options of the attacks.
    """

    data: Mapping[str, DataOptions]
    profiles: Mapping[str, ProfileOptions]
    stages: tuple[Stage, ...]
    attack: AttackOptions


def read_plan(path: Path) -> Plan:
    """Read a plan; paths of data files are taken from the plan's folder.

    Raises:
        ConfigError: no such file, no TOML, or a name or value that does not exist, said with its place.
    """
    try:
        text = tomllib.loads(path.read_text())
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not TOML: {exc}") from exc
    try:
        return _plan(text, path.parent)
    except PsglError as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def _plan(text: Mapping[str, Any], folder: Path) -> Plan:
    known = {"data", "profile", "stage", "attack"}
    unknown = sorted(set(text) - known)
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no part of a plan: use {', '.join(sorted(known))}")
    data = {name: _options(DataOptions, part, f"data.{name}") for name, part in _tables(text, "data").items()}
    data = {name: replace(each, file=folder / each.file) for name, each in data.items()}
    profiles = {name: ProfileOptions(name) for name in PROFILES}
    for name, part in _tables(text, "profile").items():
        profiles[name] = _options(ProfileOptions, {"profile": name, **part}, f"profile.{name}")
    written = text.get("stage")
    if not isinstance(written, list) or not written:
        raise ConfigError("there is no [[stage]]: name profiles, data and attacks in at least one")
    stages = tuple(_options(Stage, part, f"stage {number}") for number, part in enumerate(written, start=1))
    for number, stage in enumerate(stages, start=1):
        for kind, names, there in (
            ("data", stage.data, data),
            ("profile", stage.profiles, profiles),
            ("attack", stage.attacks, dict.fromkeys(ATTACKS)),
        ):
            for name in names:
                if name not in there:
                    raise ConfigError(f"stage {number} names {kind} {name!r}: there are {', '.join(there) or 'none'}")
    return Plan(data, profiles, stages, _options(AttackOptions, text.get("attack", {}), "attack"))


def _tables(text: Mapping[str, Any], kind: str) -> Mapping[str, Mapping[str, Any]]:
    """``[kind.name]`` of a plan, by name; names become folders."""
    tables = text.get(kind, {})
    if not isinstance(tables, dict) or not all(isinstance(part, dict) for part in tables.values()):
        raise ConfigError(f"{kind} holds no tables: write [{kind}.NAME], and what it is below")
    for name in tables:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{kind} {name!r} cannot be named so: use letters, digits, - and _")
    return tables


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{name} is {value}: give at least {least}")


def _options(kind: type[Any], part: Any, place: str) -> Any:
    """A dataclass out of a table, each value of the type that its annotation says."""
    if not isinstance(part, Mapping):
        raise ConfigError(f"{place} is no table")
    types = {each.name: str(each.type) for each in fields(kind)}
    wrong = sorted(set(part) - set(types))
    if wrong:
        raise ConfigError(f"{place} has no {wrong[0]!r}: it has {', '.join(types)}")
    try:
        return kind(**{name: _value(value, types[name], f"{place}.{name}") for name, value in part.items()})
    except TypeError as exc:
        missing = ", ".join(name for name in types if f"'{name}'" in str(exc))
        raise ConfigError(f"{place} is incomplete: give {missing}") from exc
    except PsglError as exc:
        raise ConfigError(f"{place}: {exc}") from exc


def _value(value: Any, expected: str, name: str) -> Any:
    if expected.startswith("tuple") and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(value)
    if expected == "Path" and isinstance(value, str):
        return Path(value)
    if expected.startswith("float") and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected.startswith("Mapping") and isinstance(value, dict):
        return value
    if expected.split()[0] != type(value).__name__:
        raise ConfigError(f"{name} is {value!r}: it must be {expected}")
    return value
