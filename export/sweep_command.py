"""``psgl-export sweep``: work through a plan, say what it comes to and what is missing."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.console import add_debug, require
from edge_sdk.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from export.plan import Plan
    from export.sweep import Collection, Found

__all__ = ["EXAMPLES", "add_sweep", "sweep_command"]

_SHOWN_GAPS = 12
EXAMPLES = """\
  psgl-export sweep plan.toml
  psgl-export sweep plan.toml --status                 (what is there, what is missing; nothing is made)
  psgl-export sweep plan.toml --jobs 8 --compute cuda --figures docs/figures/audit.json
"""


def add_sweep(commands: Any) -> None:
    """Add the subcommand to ``psgl-export``."""
    parser = commands.add_parser(
        "sweep",
        help="audit many profiles on many data sets with many seeds",
        description="Work through the cells of a plan (data, profile, attack, seed). Each is kept in --out under the\n"
        "hash of its configuration, with the version of the code that found it; what is there is not\n"
        "made again, so an interrupted sweep goes on where it was and loses one cell at most. The plan\n"
        "is TOML; examples/audit/plan.toml explains it.",
        epilog="examples:\n" + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", type=Path, help="TOML file")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/sweep"), help="folder of the cells (default %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side (default %(default)s)")
    parser.add_argument("--compute", choices=("cpu", "cuda"), default="cpu", help="(default %(default)s)")
    parser.add_argument("--status", action="store_true", help="make nothing, show what is there")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="write the figures here (JSON)")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object last")
    add_debug(parser)


def sweep_command(arguments: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code: 0 when every cell is there and can be read, else 1."""
    require("export", "torch", "onnx", "onnxscript", "rich", "torchmetrics", "jinja2", "PIL")
    if arguments.jobs < 1:
        raise ConfigError("--jobs must be at least 1")
    import torch
    from rich.console import Console
    from rich.markup import escape

    from export.plan import read_plan
    from export.sweep import collect, figures_of, gaps, sweep
    from server_sdk.audit.report import write

    if arguments.compute == "cuda" and not torch.cuda.is_available():
        raise ConfigError("this torch sees no CUDA device: use --compute cpu or install a CUDA build of torch")
    plan = read_plan(arguments.plan)
    console = Console(stderr=True)
    failures: dict[str, str] = {}
    if not arguments.status:
        with console.status("beginning") as shown:

            def note(line: str) -> None:
                _print(console, f"{datetime.now():%H:%M:%S} {line}")

            failures = sweep(
                plan,
                arguments.out,
                compute=arguments.compute,
                jobs=arguments.jobs,
                say=lambda line: shown.update(escape(line)),
                note=note,
            )
    collection = collect(plan, arguments.out)
    found, broken = collection.found, collection.broken
    figures = figures_of(found)
    missing = gaps(plan, arguments.out, failures | broken)
    _table(found, figures, Console())
    for gap in missing[:_SHOWN_GAPS]:
        _print(console, f"missing: {gap.unit}, {gap.attack}: {gap.why}")
    if len(missing) > _SHOWN_GAPS:
        _print(console, f"and {len(missing) - _SHOWN_GAPS} more cells are missing")
    for name, why in broken.items():
        _print(console, f"cannot be read: {name}: {why}")
    versions = {cell["code"] for cells in found.values() for cell in cells}
    if len(versions) > 1:
        _print(console, f"note: {len(versions)} versions of the code found these cells; their samples name them")
    report = _report(found, figures, arguments)
    if arguments.figures is not None:
        write(arguments.figures, report)
    _pages(plan, arguments.out, collection)
    if arguments.json:
        print(json.dumps(report))
    return 1 if missing or broken else 0


def _print(console: Console, line: str) -> None:
    """As it is: brackets in a file's name or an error are no markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _report(found: Found, figures: dict[str, float], arguments: argparse.Namespace) -> dict[str, Any]:
    """The object that benchmarks print, with each seed's values as samples."""
    tools = ("numpy", "onnxruntime", "torch", "torchmetrics")
    samples: dict[str, Any] = {}
    for (data, profile), cells in found.items():
        for cell in cells:
            samples[f"{data}.{profile}.{cell['seed']}"] = {
                "excess": cell["excess"],
                "worst_attack": cell["worst_attack"],
                "attacks": {name: each["excess"] for name, each in cell["attacks"].items()},
                "floor": {name: cell["floor"][name] for name in ("ssim", "correlation", "nmse")},
                "protocols": cell["protocols"],
                "samples": cell["samples"],
                "code": cell["code"],
            }
    return {
        "figures": figures,
        "command": shlex.join(["psgl-export", *sys.argv[1:]]),
        "plan": arguments.plan.read_text(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "machine": platform.machine(),
            "python": platform.python_version(),
            **{name: version(name) for name in tools},
        },
        "samples": samples,
    }


def _table(found: Found, figures: dict[str, float], console: Console) -> None:
    from rich import box
    from rich.table import Table

    excess = "excess: SSIM (of signals correlation) beyond what the decision alone tells; lost: points"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=excess, caption_justify="left")
    for heading in ("data", "profile", "seeds", "acc.", "AUC", "lost", "AUC\nlost", "excess", "bytes", "bits"):
        name = heading in ("data", "profile")
        table.add_column(heading, justify="left" if name else "right", no_wrap=not name, overflow="fold")
    for data, profile in found:

        def of(name: str, form: str, scale: float = 1.0, key: str = f"audit.{data}.{profile}") -> str:
            value = figures.get(f"{key}.{name}")
            return "-" if value is None else format(scale * value, form)

        signal = f"audit.{data}.{profile}.worst_ssim_excess" not in figures
        table.add_row(
            data,
            profile,
            of("seeds", ".0f"),
            of("accuracy", ".1f", 100),
            of("auc", ".1f", 100),
            of("accuracy_lost_points", "+.2f"),
            of("auc_lost_points", "+.2f"),
            of("worst_corr_excess" if signal else "worst_ssim_excess", "+.4f"),
            of("bytes_per_sample", ",.0f"),
            of("bits_per_sample", ",.1f"),
        )
    console.print(table)


def _pages(plan: Plan, folder: Path, collection: Collection) -> None:
    """One page for each data set: the last profile of the plan's first stage is the audited one."""
    from edge_sdk.batch import as_batch
    from edge_sdk.bundle import load_bundle
    from server_sdk.audit.page import render, rows_of, write_page
    from server_sdk.audit.report import compose

    audited = plan.stages[0].profiles[-1]
    found, first = collection.found, collection.first
    for data in plan.data:
        here = [profile for name, profile in found if name == data]
        if not here:
            continue
        order = sorted(here, key=lambda profile: profile != audited)
        cells = [list(found[data, profile]) for profile in order]
        report = compose(cells, data=data, command=shlex.join(["psgl-export", *sys.argv[1:]]))
        units = [first[data, profile] for profile in order]
        x, y = units[0].victims()
        manifest = load_bundle(units[0].path / "net.psgl").manifest
        x = as_batch(x, manifest.input_shape, max_batch=len(x), input_range=manifest.input_range)
        arrays = [unit.arrays(cells[n][0]["worst_attack"]) for n, unit in enumerate(units)]
        write_page(folder / f"{data}.html", render(report, rows_of(x, y, report, arrays)))
