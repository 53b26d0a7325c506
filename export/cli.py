"""psgl-export: make bundles from the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from edge_sdk.console import new_parser, run
from export.build_command import EXAMPLES, add_build, build

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``psgl-export``; returns the exit code."""
    parser = new_parser("psgl-export", "Make bundles of ONNX graphs that train on a device.", EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_build(commands)
    arguments = parser.parse_args(argv)
    return run(lambda: build(arguments), debug=getattr(arguments, "debug", False))


if __name__ == "__main__":
    sys.exit(main())
