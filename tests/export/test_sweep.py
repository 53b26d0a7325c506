"""What a sweep does with units that fail or are killed, and the arithmetic of its figures."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from export import sweep as sweep_module
from export.errors import ExportError
from export.sweep import figures_of
from export.unit import Unit


def cell(seed: int, accuracy: float, shown: float = 0.0, **changed: Any) -> dict[str, Any]:
    return {
        "seed": seed,
        "protocols": {"P1": {"accuracy": accuracy, "auc": accuracy + 0.05}},
        "excess": {"ssim": shown, "correlation": 0.5, "nmse_deficit": 0.1},
        "attacks": {"decoder_mlp": {"mse": 0.02 * (seed + 1)}},
        "worst_attack": "decoder_mlp",
        "floor": {"ssim": 0.25, "correlation": 0.4},
        "follow_when_wrong_without_perturbation": None,
        "exposure": {"bits_per_sample": 16.0},
        "payload_per_sample": 16,
        "bytes_per_sample": 40.0,
        **changed,
    }


def test_figures_are_means_over_seeds_and_losses_against_the_same_seeds() -> None:
    found = {
        ("d", "vanilla"): [cell(0, 0.9, 0.3), cell(1, 0.8, 0.5)],
        ("d", "hardened"): [cell(1, 0.79, 0.02), cell(2, 0.5, 0.04)],
        ("other", "hardened"): [cell(0, 0.7, 0.1)],
    }
    figures = figures_of(found)
    expected = {
        "seeds": 2,
        "worst_ssim_excess": 0.03,
        "worst_attack_mse": 0.05,
        "floor": 0.25,
        "accuracy": 0.645,
        "auc": 0.695,
        "accuracy_lost_points": 1.0,
        "auc_lost_points": 1.0,
        "bits_per_sample": 16,
        "bytes_per_sample": 16,
        "wire_bytes_per_sample": 40,
    }
    mine = {name.split(".")[3]: value for name, value in figures.items() if name.startswith("audit.d.hardened.")}
    assert mine == pytest.approx(expected), "seed 2 has no undefended cell to lose against"
    assert figures["audit.d.vanilla.accuracy_lost_points"] == 0
    assert "audit.other.hardened.accuracy_lost_points" not in figures


def test_signals_and_profiles_without_a_bound_have_figures_of_their_own() -> None:
    signal_cell = cell(
        0,
        0.9,
        excess={"ssim": None, "correlation": 0.2, "nmse_deficit": 0.3},
        floor={"ssim": None, "correlation": 0.6},
        exposure={"bits_per_sample": None},
        protocols={"P1": {"accuracy": 0.9, "auc": None, "follow_when_wrong": 0.1}},
        follow_when_wrong_without_perturbation=0.05,
    )
    figures = figures_of({("ecg", "vanilla"): [signal_cell]})
    mine = {name.removeprefix("audit.ecg.vanilla."): value for name, value in figures.items()}
    assert (mine["worst_corr_excess"], mine["worst_nmse_deficit"], mine["floor"]) == (0.2, 0.3, 0.6)
    assert (mine["follow_when_wrong"], mine["follow_when_wrong_without_perturbation"]) == (0.1, 0.05)
    assert not {"worst_ssim_excess", "auc", "auc_lost_points", "bits_per_sample"} & set(mine)


@dataclass(frozen=True)
class Pretended:
    """Does what its name says, in whatever process it runs."""

    name: str
    folder: Path

    def run(self, attacks: tuple[str, ...], say: object) -> None:
        if self.name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.name == "refused":
            raise ExportError("no\nluck")
        if self.name == "broken":
            raise MemoryError("too large")
        if self.name == "long":
            (self.folder / "pid").write_text(str(os.getpid()))
            signal.pause()
        (self.folder / self.name).touch()


def results(names: tuple[str, ...], folder: Path, jobs: int) -> Iterator[tuple[Unit, str | None]]:
    units = cast(list[Unit], [Pretended(name, folder) for name in names])
    if jobs == 1:
        return sweep_module._in_turn(units, (), lambda line: None)
    return sweep_module._side_by_side(units, (), jobs)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_unit_that_fails_stops_no_other(jobs: int, tmp_path: Path) -> None:
    names = ("refused", "broken", *(["killed"] * (jobs > 1)), "fine")
    found = {unit.name: why for unit, why in results(names, tmp_path, jobs)}
    assert (found["refused"], found["fine"]) == ("no luck", None), found
    assert found["broken"] == "unexpected MemoryError: too large"
    assert (tmp_path / "fine").exists()
    if jobs > 1:
        assert found["killed"] is not None and "was killed (exit code -9)" in found["killed"]


def test_whoever_stops_ends_every_process(tmp_path: Path) -> None:
    running = results(("long", "fine"), tmp_path, 2)
    unit, why = next(running)
    assert (unit.name, why) == ("fine", None)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        signal.sigtimedwait([], 0.05)
    pid = int((tmp_path / "pid").read_text())
    cast(Any, running).close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
