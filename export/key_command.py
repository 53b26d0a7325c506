"""``psgl-export keygen``: a key pair for signed bundles."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edge_sdk.console import add_debug
from edge_sdk.signing import generate

__all__ = ["EXAMPLES", "add_keygen", "keygen"]

EXAMPLES = """\
  psgl-export keygen -o key.pem                                       (and key.pub.pem, for the devices)
"""


def add_keygen(commands: Any) -> None:
    """Add the subcommand to ``psgl-export``."""
    parser = commands.add_parser(
        "keygen",
        help="make a key pair to sign bundles with",
        description="Make an Ed25519 key pair (needs psgl[secure]): the private key signs bundles (psgl-export build\n"
        "--sign-key) and stays on the build machine, readable by its owner alone; the public key goes to\n"
        "the devices (psgl-edge --public-key). Whoever has the private key decides what devices run.",
        epilog="examples:\n" + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help="file of the private key; the public one goes beside it"
    )
    add_debug(parser)


def keygen(arguments: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    public = generate(arguments.out)
    print(f"{arguments.out}  private: signs bundles, stays here\n{public}  public: for the devices")
    return 0
