"""The sweep: every cell of a plan, in the plan's order, kept as it is found; what it comes to, and what is missing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch

from edge_sdk.errors import PsglError
from export.plan import Plan, Stage
from export.unit import Unit

__all__ = ["Collection", "Found", "Gap", "collect", "figures_of", "gaps", "sweep", "units_of"]

Say = Callable[[str], None]
Results = Generator[tuple[Unit, str | None]]
_GRACE_S = 5.0  # for a process to end what it started
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


def sweep(plan: Plan, folder: Path, *, compute: str, jobs: int, say: Say, note: Say) -> dict[str, str]:
    """Make every cell that is missing, stage after stage.

    A unit that fails does not stop the others. An exception, Ctrl-C among them, ends every process; what was found
    stays.

    Args:
        folder: where cells are kept; one sweep at a time works there.
        compute: ``cpu`` or ``cuda``.
        jobs: processes that work side by side, each with its share of the cores.
        say: called with what is under way, one line that replaces the last.
        note: called with what is over, one line at a time.

    Returns:
        Why units failed, by their names.

    Raises:
        BatchError: a data file of the plan is missing.
    """
    failures: dict[str, str] = {}
    for number, stage in enumerate(plan.stages, start=1):
        left = [unit for unit in units_of(plan, stage, folder, compute) if unit.missing(stage.attacks)]
        if not left:
            continue
        note(f"stage {number} of {len(plan.stages)}: {len(left)} units")
        results = _in_turn(left, stage.attacks, say) if jobs == 1 else _side_by_side(left, stage.attacks, jobs)
        with closing(results):
            for unit, failed in results:
                failures |= {} if failed is None else {unit.name: failed}
                note(f"{unit.name}: {'done' if failed is None else f'failed: {failed}'}")
    return failures


def _in_turn(units: Sequence[Unit], attacks: Sequence[str], say: Say) -> Results:
    for unit in units:
        say(unit.name)
        yield unit, _work(unit, attacks, say)


def _side_by_side(units: Sequence[Unit], attacks: Sequence[str], jobs: int) -> Results:
    """A process for each unit, so that one that is killed takes no other along."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    waiting = list(reversed(units))
    running: dict[Connection, tuple[SpawnProcess, Unit]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                unit = waiting.pop()
                mine, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_serve, args=(theirs, unit, attacks, threads), daemon=True)
                running[mine] = process, unit
                process.start()
                theirs.close()
            for mine in cast(list[Connection], wait(list(running))):
                process, unit = running[mine]
                yield unit, _result(mine, process)
                del running[mine]
    finally:
        started = [process for process, _ in running.values() if process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.join(_GRACE_S)
            if process.is_alive():
                process.kill()
                process.join()


def _result(mine: Connection, process: SpawnProcess) -> str | None:
    try:
        failed: str | None = mine.recv()
    except EOFError:
        process.join()
        return (
            f"its process was killed (exit code {process.exitcode}), perhaps for want of memory: run again, or with "
            "fewer --jobs"
        )
    finally:
        mine.close()
    process.join()
    return failed


def _serve(theirs: Connection, unit: Unit, attacks: Sequence[str], threads: int) -> None:
    """In a process of its own: SIGTERM, and the end of the parent, end it with all that it started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's, which sends SIGTERM
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(threads)
    theirs.send(_work(unit, attacks, _silent))


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _silent(line: str) -> None:
    """Progress of a process that has no terminal of its own."""


def _work(unit: Unit, attacks: Sequence[str], say: Say) -> str | None:
    """Why the unit failed, or None."""
    try:
        unit.run(attacks, say)
    except PsglError as exc:
        return " ".join(str(exc).split())
    except Exception as exc:  # the boundary of a unit: days of others must not end with it
        return f"unexpected {type(exc).__name__}: {' '.join(str(exc).split())[:200]}"
    return None


def units_of(plan: Plan, stage: Stage, folder: Path, compute: str = "cpu") -> Iterator[Unit]:
    """The units of a stage: data by data, seed by seed, profile by profile."""
    for data in stage.data:
        options = plan.data[data]
        for seed in range(stage.seeds):
            for profile in stage.profiles:
                yield Unit(folder, (data, options), (profile, plan.profiles[profile]), seed, plan.attack, compute)


def gaps(plan: Plan, folder: Path, failures: Mapping[str, str]) -> list[Gap]:
    """Which cells of the plan are missing, and why.

    Args:
        failures: by the unit's name: from ``sweep``, and what ``collect`` could not read.
    """
    missing = []
    for stage in plan.stages:
        for unit in units_of(plan, stage, folder):
            why = failures.get(unit.name, "not yet")
            missing += [Gap(unit.name, attack, why) for attack in stage.attacks if not unit.has(attack)]
    return list(dict.fromkeys(missing))


@dataclass
class Collection:
    """What was found so far.

    Attributes:
        found: the cells.
        first: of each (data, profile) the unit of the first seed that was found.
        broken: why units whose cells are there cannot be read, by their names.
    """

    found: dict[tuple[str, str], list[Mapping[str, Any]]] = field(default_factory=dict)
    first: dict[tuple[str, str], Unit] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def collect(plan: Plan, folder: Path) -> Collection:
    """Read every cell of the plan that is there.

    Raises:
        BatchError: a data file of the plan is missing.
    """
    units: dict[str, Unit] = {}
    attacks: dict[str, dict[str, None]] = {}
    for stage in plan.stages:
        for unit in units_of(plan, stage, folder):
            units.setdefault(unit.name, unit)
            attacks.setdefault(unit.name, {}).update(dict.fromkeys(stage.attacks))
    all_found = Collection()
    for name, unit in units.items():
        try:
            cell = unit.cell(tuple(attacks[name]))
        except PsglError as exc:
            all_found.broken[name] = " ".join(str(exc).split())
            continue
        if cell is not None:
            key = unit.data[0], unit.profile[0]
            all_found.found.setdefault(key, []).append(cell)
            all_found.first.setdefault(key, unit)
    return all_found


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
