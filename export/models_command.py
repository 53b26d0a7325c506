"""``psgl-export models``: the reference models, with what they cost."""

from __future__ import annotations

import argparse
import math
from typing import Any

from edge_sdk.console import add_debug, require

__all__ = ["EXAMPLES", "add_models", "models"]

EXAMPLES = """\
  psgl-export models
  psgl-export build ecg256 --data ecg.npz --signal --profile paper -o ecg.psgl
"""


def add_models(commands: Any) -> None:
    """Add the subcommand to ``psgl-export``."""
    parser = commands.add_parser(
        "models",
        help="list the reference models",
        description="Reference models for psgl-export build, with parameters and products (MACs) of one sample in\n"
        "front and back, and what crosses at the cut. Each takes samples of other sizes too.",
        epilog="examples:\n" + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_debug(parser)


def models(arguments: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    require("export", "torch")
    from server_sdk.reference.zoo import ZOO, count

    heads = ("model", "input", "front", "MACs", "back", "MACs", "cut", "values", "for")
    rows = [heads]
    for name, model in ZOO.items():
        spec = model.spec()
        found = count(spec, model.input_shape)
        crosses = f"{spec.cut} {'x'.join(map(str, found.cut_shape))}"
        costs = (f"{found.front:,}", f"{found.front_macs:,}", f"{found.back:,}", f"{found.back_macs:,}")
        shape = "x".join(map(str, model.input_shape))
        rows.append((name, shape, *costs, crosses, str(math.prod(found.cut_shape)), model.about))
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    for row in rows:
        cells = [
            cell.rjust(width) if 1 < column < 6 or column == 7 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    return 0
