"""The plan of a sweep, read from TOML: which data, which profiles, which attacks, how many seeds, in which order."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from edge_sdk.errors import ConfigError
from server_sdk.audit.attacks import Attack, Averaging, LearnedDecoder, WhiteBox
from server_sdk.reference.profiles import PROFILES

__all__ = ["ATTACKS", "AttackOptions", "DataOptions", "Plan", "ProfileOptions", "Stage", "read_plan"]

ATTACKS = ("decoder_mlp", "decoder_convolution", "white_box", "averaging_decoder_mlp", "averaging_decoder_convolution")
"""Attacks that a plan may name; all but the decoders on a single send are slow or seldom the worst."""


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

    def make(self, name: str, compute: str) -> Attack:
        """The attack of that name."""
        if name == "white_box":
            return WhiteBox(self.steps)
        decoder = LearnedDecoder(
            "mlp" if name.endswith("mlp") else "convolution", self.epochs, self.width, device=compute
        )
        return Averaging(decoder, self.sends) if name.startswith("averaging_") else decoder


@dataclass(frozen=True)
class DataOptions:
    """A data file and how it is used.

    Attributes:
        file: .npz as ``load_dataset`` reads it, or one of its names.
        foe: the foe's share of the training samples.
        rest: None, or the class that all others are told from: labels become 0 (this class) and 1 (any other).
        signal: samples are signals.
        group: name of the array in the file that says which patient or record a training sample is of, or None.
        merge: names of the arrays of further training samples and of their labels, a validation set for instance.
        rounds, batch: of training on devices.
        guide: share of the device's training samples that the guide is fitted on where a profile has one; the device
            trains on the others.
        shift: augmentation on the device.
        seeds: in place of a stage's, or None.
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
    seeds: int | None = None


@dataclass(frozen=True)
class ProfileOptions:
    """What one profile of a plan is.

    Attributes:
        profile: a name of ``PROFILES``.
        recipe: fields of ``Recipe`` that differ from what suits the data, for a front that is trained at export time.
        noise: in place of the profile's.
    """

    profile: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    noise: float | None = None


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
    known = {"data", "profile", "stage", "attack"}
    if not set(text) <= known:
        raise ConfigError(
            f"{path}: {sorted(set(text) - known)[0]!r} is no part of a plan: use {', '.join(sorted(known))}"
        )
    data = {name: _options(DataOptions, part, f"data.{name}") for name, part in text.get("data", {}).items()}
    data = {name: replace(each, file=path.parent / each.file) for name, each in data.items()}
    profiles = {name: ProfileOptions(name) for name in PROFILES}
    for name, part in text.get("profile", {}).items():
        profiles[name] = _options(ProfileOptions, {"profile": name, **part}, f"profile.{name}")
        if profiles[name].profile not in PROFILES:
            raise ConfigError(f"{path}: profile.{name} is of no profile: use one of {', '.join(PROFILES)}")
    stages = tuple(_options(Stage, part, f"stage {n}") for n, part in enumerate(text.get("stage", []), start=1))
    for number, stage in enumerate(stages, start=1):
        for kind, names, there in (
            ("data", stage.data, data),
            ("profile", stage.profiles, profiles),
            ("attack", stage.attacks, dict.fromkeys(ATTACKS)),
        ):
            for name in names:
                if name not in there:
                    raise ConfigError(f"{path}: stage {number} names {kind} {name!r}: there are {', '.join(there)}")
    if not stages:
        raise ConfigError(f"{path} has no [[stage]]: name profiles, data and attacks in at least one")
    return Plan(data, profiles, stages, _options(AttackOptions, text.get("attack", {}), "attack"))


def _options(kind: type[Any], part: Any, place: str) -> Any:
    """A dataclass out of a table, each value of the type that its default or annotation has."""
    if not isinstance(part, dict):
        raise ConfigError(f"{place} of the plan is no table")
    names = {each.name: each for each in fields(kind)}
    wrong = sorted(set(part) - set(names))
    if wrong:
        raise ConfigError(f"{place} of the plan has no {wrong[0]!r}: it has {', '.join(names)}")
    given = {}
    for name, value in part.items():
        expected = str(names[name].type)
        if isinstance(value, list) and expected.startswith("tuple") and all(isinstance(each, str) for each in value):
            value = tuple(value)
        elif expected == "Path" and isinstance(value, str):
            value = Path(value)
        elif expected.startswith("float") and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif expected.split()[0] not in (type(value).__name__, "Mapping[str,"):
            raise ConfigError(f"{place}.{name} of the plan is {value!r}: it must be {expected}")
        given[name] = value
    try:
        return kind(**given)
    except TypeError as exc:
        raise ConfigError(f"{place} of the plan is incomplete: {exc}") from exc
