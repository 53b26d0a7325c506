"""The sweep: every cell of a plan, in the plan's order, kept as it is found; what it comes to, and what is missing."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from edge_sdk.errors import PsglError
from export.plan import Plan, Stage
from export.unit import Unit

__all__ = ["Found", "Gap", "collect", "figures_of", "gaps", "sweep", "units_of"]

Say = Callable[[str], None]
Found = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
"""By (data, profile): a cell of each seed that was found, as ``Unit.cell`` gives it."""


@dataclass(frozen=True)
class Gap:
    """A cell that is not there.

    Attributes:
        unit: data, profile, seed.
        attack: its name.
        why: what went wrong, or "not yet".
    """

    unit: str
    attack: str
    why: str = "not yet"


def sweep(plan: Plan, folder: Path, *, compute: str, jobs: int, say: Say) -> dict[str, str]:
    """Make every cell that is missing, stage after stage.

    A unit that fails does not stop the others.

    Args:
        folder: where cells are kept.
        compute: ``cpu`` or ``cuda``.
        jobs: processes that work side by side, each with its share of the cores.
        say: called with one line of progress at a time.

    Returns:
        Why units failed, by their names.
    """
    failures: dict[str, str] = {}
    for number, stage in enumerate(plan.stages, start=1):
        left = [unit for unit in units_of(plan, stage, folder, compute) if not all(map(unit.has, stage.attacks))]
        if not left:
            continue
        say(f"stage {number} of {len(plan.stages)}: {len(left)} units")
        if jobs == 1:
            for unit in left:
                failed = _work(unit, stage.attacks, say)
                failures |= {} if failed is None else {unit.name: failed}
                say(f"{unit.name}: {failed or 'done'}")
            continue
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
            running = {pool.submit(_work, unit, stage.attacks, _silent): unit for unit in left}
            try:
                for done in concurrent.futures.as_completed(running):
                    failed = done.result()
                    failures |= {} if failed is None else {running[done].name: failed}
                    say(f"{running[done].name}: {failed or 'done'}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return failures


def _silent(line: str) -> None:
    """Progress of a process that has no terminal of its own."""


def _work(unit: Unit, attacks: tuple[str, ...], say: Say) -> str | None:
    """Why the unit failed, or None."""
    try:
        unit.run(attacks, say)
    except PsglError as exc:
        return " ".join(str(exc).split())
    return None


def units_of(plan: Plan, stage: Stage, folder: Path, compute: str = "cpu") -> Iterator[Unit]:
    """The units of a stage: data by data, seed by seed, profile by profile."""
    for data in stage.data:
        options = plan.data[data]
        for seed in range(stage.seeds if options.seeds is None else options.seeds):
            for profile in stage.profiles:
                yield Unit(folder, (data, options), (profile, plan.profiles[profile]), seed, plan.attack, compute)


def gaps(plan: Plan, folder: Path, failures: Mapping[str, str]) -> list[Gap]:
    """Which cells of the plan are missing, and why."""
    missing = []
    for stage in plan.stages:
        for unit in units_of(plan, stage, folder):
            missing += [
                Gap(unit.name, attack, failures.get(unit.name, "not yet"))
                for attack in stage.attacks
                if not unit.has(attack)
            ]
    return list(dict.fromkeys(missing))


def collect(plan: Plan, folder: Path) -> tuple[Found, dict[tuple[str, str], Unit]]:
    """What was found so far, and of each (data, profile) the unit of the first seed."""
    attacks: dict[str, Unit] = {}
    named: dict[str, list[str]] = {}
    for stage in plan.stages:
        for unit in units_of(plan, stage, folder):
            attacks.setdefault(unit.name, unit)
            named.setdefault(unit.name, []).extend(name for name in stage.attacks if unit.has(name))
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    first: dict[tuple[str, str], Unit] = {}
    for name, unit in attacks.items():
        cell = unit.cell(tuple(dict.fromkeys(named[name]))) if named[name] else None
        if cell is not None:
            key = unit.data[0], unit.profile[0]
            found.setdefault(key, []).append(cell)
            first.setdefault(key, unit)
    return found, first


def figures_of(found: Found, undefended: str = "vanilla") -> dict[str, float]:
    """``audit.<data>.<profile>.<figure>``: means over the seeds, of the worst attack of each.

    Accuracy and AUC are lost against the undefended profile on the same data and seeds; a figure that a kind of data or
    profile does not have is left out.
    """
    figures: dict[str, float] = {}
    for (data, profile), cells in found.items():
        base = {cell["seed"]: cell for cell in found.get((data, undefended), ())}
        pairs = [(base[cell["seed"]], cell) for cell in cells if cell["seed"] in base]
        values: dict[str, list[float | None]] = {
            "seeds": [float(len(cells))],
            "worst_ssim_excess": [cell["excess"]["ssim"] for cell in cells],
            "worst_corr_excess": [cell["excess"]["correlation"] for cell in cells if cell["excess"]["ssim"] is None],
            "worst_nmse_deficit": [cell["excess"]["nmse_deficit"] for cell in cells if cell["excess"]["ssim"] is None],
            "worst_attack_mse": [cell["attacks"][cell["worst_attack"]]["mse"] for cell in cells],
            "floor": [
                cell["floor"]["correlation"] if cell["floor"]["ssim"] is None else cell["floor"]["ssim"]
                for cell in cells
            ],
            "accuracy": [_first(cell, "accuracy") for cell in cells],
            "auc": [_first(cell, "auc") for cell in cells],
            "accuracy_lost_points": [_lost(a, b, "accuracy") for a, b in pairs],
            "auc_lost_points": [_lost(a, b, "auc") for a, b in pairs],
            "follow_when_wrong": [_first(cell, "follow_when_wrong") for cell in cells],
            "follow_when_wrong_without_perturbation": [
                cell["follow_when_wrong_without_perturbation"] for cell in cells
            ],
            "bits_per_sample": [cell["exposure"]["bits_per_sample"] for cell in cells],
            "bytes_per_sample": [cell["payload_per_sample"] for cell in cells],
            "wire_bytes_per_sample": [cell["bytes_per_sample"] for cell in cells],
        }
        for name, each in values.items():
            numbers = [value for value in each if value is not None]
            if numbers and len(numbers) == len(each):
                figures[f"audit.{data}.{profile}.{name}"] = round(fmean(numbers), 5)
    return figures


def _first(cell: Mapping[str, Any], name: str) -> float | None:
    value: float | None = cell["protocols"]["P1"].get(name)
    return value


def _lost(base: Mapping[str, Any], cell: Mapping[str, Any], name: str) -> float | None:
    before, after = _first(base, name), _first(cell, name)
    return None if before is None or after is None else 100 * (before - after)
