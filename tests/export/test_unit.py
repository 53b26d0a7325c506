"""A unit's folder: named by all that decides what is found, whole files or none, damaged ones made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.batch import Samples
from edge_sdk.dataset import save_dataset
from edge_sdk.errors import BatchError
from export import unit as unit_module
from export.errors import ExportError
from export.plan import AttackOptions, DataOptions, ProfileOptions
from export.unit import Unit, code_version, read_data
from server_sdk.audit.metrics import likeness
from server_sdk.audit.outcome import Outcome

Draw = Callable[[int, int], Samples]


@pytest.fixture
def unit(tmp_path: Path, samples: Draw) -> Unit:
    save_dataset(tmp_path / "data.npz", samples(60, 1), samples(20, 2))
    return Unit(
        tmp_path / "sweep",
        ("patterns", DataOptions(tmp_path / "data.npz")),
        ("vanilla", ProfileOptions("vanilla")),
        0,
        AttackOptions(),
    )


def outcome(count: int = 300) -> Outcome:
    x = np.random.default_rng(0).random((count, 1, 8, 8)).astype(np.float32)
    return Outcome("decoder_mlp", likeness(x, x), likeness(x[::-1], x), 0.5, x)


def changed(unit: Unit, **options: Any) -> Unit:
    return replace(unit, data=(unit.data[0], replace(unit.data[1], **options)))


def test_all_that_decides_names_the_folder(unit: Unit, tmp_path: Path, samples: Draw) -> None:
    save_dataset(tmp_path / "other.npz", samples(60, 3), samples(20, 2))
    others = [
        replace(unit, seed=1),
        changed(unit, file=tmp_path / "other.npz"),
        *(
            changed(unit, **{name: value})
            for name, value in {
                "foe": 0.3,
                "rest": 1,
                "signal": True,
                "group": "g",
                "merge": ("a", "b"),
                "rounds": 5,
                "batch": 5,
                "guide": 0.5,
                "shift": 1,
            }.items()
        ),
        replace(unit, profile=("vanilla", ProfileOptions("gaussian"))),
        replace(unit, profile=("vanilla", ProfileOptions("vanilla", noise=0.5))),
        replace(unit, profile=("vanilla", ProfileOptions("vanilla", perturb="max"))),
        replace(unit, profile=("vanilla", ProfileOptions("vanilla", perturb="max", epsilon=0.1))),
        replace(unit, profile=("vanilla", ProfileOptions("hardened"))),
        replace(unit, profile=("vanilla", ProfileOptions("hardened", recipe={"strength": 1.0}))),
    ]
    names = [each.path.name for each in (unit, *others)]
    assert len(set(names)) == len(names)


def test_nothing_else_does(unit: Unit, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.npz"
    moved.write_bytes((tmp_path / "data.npz").read_bytes())
    harder = replace(unit, attack=AttackOptions(5, 5, 5, 5))
    for other in (replace(unit, compute="cuda"), harder, changed(unit, file=moved)):
        assert other.path == unit.path
    assert replace(unit, data=("alias", unit.data[1])).path.name == unit.path.name


@pytest.mark.parametrize(
    ("name", "decided_by"),
    [
        ("floor", {"epochs", "width"}),
        ("decoder_mlp", {"epochs", "width"}),
        ("decoder_convolution", {"epochs", "width"}),
        ("averaging_decoder_mlp", {"epochs", "width", "sends"}),
        ("white_box", {"steps"}),
    ],
)
def test_a_cell_is_named_by_the_options_that_decide_it(unit: Unit, name: str, decided_by: set[str]) -> None:
    unit._keep(name, outcome(5))
    for option in ("epochs", "width", "steps", "sends"):
        other = replace(unit, attack=replace(unit.attack, **{option: 5}))
        assert other.has(name) is (option not in decided_by)


def test_the_profiles_settings_are_part_of_the_name(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    profiles = dict(unit_module.PROFILES)
    before = unit.path
    monkeypatch.setattr(unit_module, "PROFILES", {**profiles, "vanilla": replace(profiles["vanilla"], bits=4)})
    assert replace(unit, compute="cpu").path != before


def test_a_data_file_that_is_missing_is_named(unit: Unit, tmp_path: Path) -> None:
    with pytest.raises(BatchError, match=r"none\.npz cannot be read \(No such file or directory\)"):
        _ = changed(unit, file=tmp_path / "none.npz").path


def test_a_cell_is_there_whole_or_not_at_all(unit: Unit) -> None:
    assert unit.missing(("decoder_mlp", "white_box")) == ["floor", "decoder_mlp", "white_box"]
    unit._keep("decoder_mlp", outcome())
    unit._keep("white_box", None)
    assert unit.missing(("decoder_mlp", "white_box")) == ["floor"]
    cell, pictures, other = sorted(unit.path.iterdir())
    assert (cell, pictures) == (unit._cell("decoder_mlp"), unit._pictures("decoder_mlp"))
    assert other == unit._cell("white_box")
    kept = json.loads(cell.read_text())
    assert kept["code"] == code_version() and kept["victims"] == 300
    with np.load(pictures) as archive:
        assert archive["reconstructions"].shape == (256, 1, 8, 8)


@pytest.mark.parametrize("damage", ["", '{"fits": tr', "[]", "{}", "\0\0\0"])
def test_a_damaged_cell_is_made_again(unit: Unit, damage: str) -> None:
    unit._keep("decoder_mlp", outcome())
    unit._cell("decoder_mlp").write_text(damage)
    assert not unit.has("decoder_mlp")


def test_a_cell_without_its_pictures_is_made_again_and_damaged_ones_are_named(unit: Unit) -> None:
    for name in ("floor", "decoder_mlp"):
        unit._keep(name, outcome(5))
    assert set(unit.arrays("decoder_mlp")) == {"worst", "floor"}
    unit._pictures("decoder_mlp").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(ExportError, match=r"decoder_mlp-\w{6}\.npz is missing or damaged: delete it"):
        unit.arrays("decoder_mlp")
    unit._pictures("decoder_mlp").unlink()
    assert not unit.has("decoder_mlp")


def test_a_disk_that_refuses_leaves_no_half_file(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, **arrays: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unit_module.np, "savez_compressed", full)
    with pytest.raises(ExportError, match=r"decoder_mlp-\w{6}\.npz cannot be written: No space left on device"):
        unit._keep("decoder_mlp", outcome(5))
    assert not list(unit.path.iterdir()) and not unit.has("decoder_mlp")


def test_nothing_is_found_before_floor_and_a_real_attack(unit: Unit) -> None:
    assert unit.cell(("decoder_mlp",)) is None
    unit._keep("decoder_mlp", outcome(5))
    assert unit.cell(("decoder_mlp",)) is None, "no floor, no training"
    unit._keep("floor", outcome(5))
    unit._keep("averaging_decoder_mlp", replace(outcome(5), supposed=True))
    unit._write(unit._facts, {"protocols": {}, "samples": {}, "code": "x"})
    assert unit.cell(("averaging_decoder_mlp",)) is None, "what is supposed is no verdict"
    with pytest.raises(ExportError, match=r"\(delete .*, and the unit is made again\)"):
        unit.cell(("decoder_mlp",))


def test_the_guides_samples_are_not_the_devices(unit: Unit) -> None:
    guide, division = replace(unit, profile=("paper", ProfileOptions("paper")))._shares()
    assert guide is not None
    rows = {each.tobytes() for each in guide.x}
    assert len(guide) and not rows & {each.tobytes() for each in division.train.x}
    assert len(guide) + len(division.train) + len(division.auxiliary) == 60
    watched = replace(unit, profile=("watched", ProfileOptions("hardened", perturb="sign", epsilon=0.0)))
    theirs, others = watched._shares()
    assert theirs is not None and (theirs.x == guide.x).all() and (others.train.x == division.train.x).all()
    for unguided in (unit, replace(unit, profile=("hardened", ProfileOptions("hardened")))):
        none, whole = unguided._shares()
        assert none is None and len(whole.train) + len(whole.auxiliary) == 60


def test_data_is_read_as_the_plan_says(tmp_path: Path, samples: Draw) -> None:
    train, more, test = samples(30, 1), samples(9, 2), samples(12, 3)
    np.savez(
        tmp_path / "raw.npz",
        x_train=train.x[:, 0],
        y_train=train.y,
        x_test=test.x[:, 0],
        y_test=test.y,
        x_val=more.x[:, 0],
        y_val=more.y,
        who=np.arange(39) % 7,
    )
    options = DataOptions(tmp_path / "raw.npz", rest=0, merge=("x_val", "y_val"), group="who")
    found = read_data(options, tmp_path / "kept")
    assert len(found.train) == 39 and found.classes == 2
    assert np.array_equal(found.train.y, (np.concatenate([train.y, more.y]) != 0).astype(np.int64))
    assert found.train.groups is not None and np.array_equal(found.train.groups, np.arange(39) % 7)
    (copy,) = (tmp_path / "kept").iterdir()
    before = copy.stat().st_mtime_ns
    read_data(options, tmp_path / "kept")
    assert [path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()] == [before]


def test_what_the_file_says_of_itself_counts(tmp_path: Path) -> None:
    x = np.zeros((8, 16), np.int16)
    y = np.arange(8) % 2
    extras = {"kind": "signal", "input_range": [-5.0, 5.0], "group_train": np.arange(8)}
    np.savez(tmp_path / "ecg.npz", x_train=x, y_train=y, x_test=x, y_test=y, **extras)  # type: ignore[arg-type]
    found = read_data(DataOptions(tmp_path / "ecg.npz"), tmp_path / "kept")
    assert found.input_shape == (1, 16) and found.input_range == (-5.0, 5.0)
    assert found.train.groups is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"merge": ("x_val", "y_val")}, "x_val"),
        ({"group": "who"}, "who"),
        ({"rest": 7}, "single class"),
    ],
)
def test_data_that_cannot_be_used_so(unit: Unit, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BatchError, match=words):
        read_data(replace(unit.data[1], **options), unit.folder)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 half"])
def test_a_damaged_data_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "raw.npz").write_bytes(content)
    with pytest.raises(BatchError, match=r"raw\.npz cannot be used as the plan says"):
        read_data(DataOptions(tmp_path / "raw.npz"), tmp_path / "kept")


def test_nan_in_data_is_refused(tmp_path: Path, samples: Draw) -> None:
    good = samples(30, 1)
    bad = np.full((30, 8, 8), np.nan, np.float32)
    np.savez(tmp_path / "raw.npz", x_train=bad, y_train=good.y, x_test=bad, y_test=good.y)
    with pytest.raises(BatchError, match="NaN"):
        read_data(DataOptions(tmp_path / "raw.npz"), tmp_path / "kept")
