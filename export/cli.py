"""psgl-export: make bundles from the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from edge_sdk.console import new_parser, run
from export import build_command, models_command, sweep_command

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``psgl-export``; returns the exit code."""
    parser = new_parser(
        "psgl-export",
        "Make bundles of ONNX graphs for devices.",
        build_command.EXAMPLES + models_command.EXAMPLES + sweep_command.EXAMPLES,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    build_command.add_build(commands)
    models_command.add_models(commands)
    sweep_command.add_sweep(commands)
    arguments = parser.parse_args(argv)
    known = {"build": build_command.build, "models": models_command.models, "sweep": sweep_command.sweep_command}
    return run(lambda: known[arguments.command](arguments), debug=getattr(arguments, "debug", False))


if __name__ == "__main__":
    sys.exit(main())
