"""psgl-export: make bundles from the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from edge_sdk.console import new_parser, run
from export import build_command, key_command, models_command, report_command, sweep_command

__all__ = ["main"]

_PARTS = (build_command, models_command, report_command, key_command, sweep_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``psgl-export``; returns the exit code."""
    parser = new_parser(
        "psgl-export", "Make bundles of ONNX graphs for devices.", "".join(part.EXAMPLES for part in _PARTS)
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    build_command.add_build(commands)
    models_command.add_models(commands)
    report_command.add_report(commands)
    key_command.add_keygen(commands)
    sweep_command.add_sweep(commands)
    arguments = parser.parse_args(argv)
    command = {
        "build": build_command.build,
        "models": models_command.models,
        "report": report_command.report,
        "keygen": key_command.keygen,
        "sweep": sweep_command.sweep_command,
    }[arguments.command]
    return run(lambda: command(arguments), debug=getattr(arguments, "debug", False))


if __name__ == "__main__":
    sys.exit(main())
