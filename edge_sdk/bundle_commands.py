"""``psgl-edge verify``, ``install`` and ``rollback``: bundles on the machine that is to run them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edge_sdk.bundle import load_bundle
from edge_sdk.bundle_store import BundleStore
from edge_sdk.console import add_debug, add_public_key, public_key_of
from edge_sdk.errors import ConfigError
from edge_sdk.verification import Verification, verify

__all__ = ["COMMANDS", "EXAMPLES", "add_bundle_commands", "run_bundle_command"]

COMMANDS = ("verify", "install", "rollback")
EXAMPLES = """\
  psgl-edge verify net.psgl                                           (does this machine compute what was exported?)
  psgl-edge verify net.psgl --public-key key.pub.pem --json
  psgl-edge install net.psgl --store /var/lib/psgl --public-key key.pub.pem
  psgl-edge rollback --store /var/lib/psgl
"""
_MOST_RUNS = 100_000


def add_bundle_commands(commands: Any) -> None:
    """Add the subcommands to ``psgl-edge``."""
    check = _command(
        commands,
        "verify",
        "replay what a bundle records on this machine, and time it",
        "Check a bundle to the last byte, run its graphs on the inputs that were recorded at export, compare\n"
        "what they give with what was recorded, and time each graph on one thread. Exit code 0: this machine\n"
        "computes the same; 1: it does not; 2: the bundle cannot be used here, one line says why.",
    )
    check.add_argument("bundle", type=Path, help="bundle made by psgl-export build")
    check.add_argument("--runs", type=int, default=50, help="timed repetitions of each graph (default %(default)s)")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    add_public_key(check)
    install = _command(
        commands,
        "install",
        "verify a bundle and make it the current one of a store",
        "Verify a bundle (signature, hashes, parity vectors) and make it the current one of a store, in one step\n"
        "that a crash cannot split. The one before stays there for rollback. DIR/current is what to run.",
    )
    install.add_argument("bundle", type=Path, help="bundle made by psgl-export build")
    add_public_key(install)
    back = _command(
        commands,
        "rollback",
        "make the bundle before the current one again",
        "Make the bundle that was current before the last install current again; a second rollback undoes the first.",
    )
    for parser in (install, back):
        parser.add_argument("--store", type=Path, required=True, metavar="DIR", help="folder of the store")


def run_bundle_command(arguments: argparse.Namespace) -> int:
    """Run one of them; returns the exit code."""
    if arguments.command == "verify":
        return _verify(arguments)
    store = BundleStore(arguments.store)
    if arguments.command == "install":
        installed = store.install(arguments.bundle, public_key=public_key_of(arguments))
        print(f"{store.current}: bundle {installed.id}")
    else:
        print(f"{store.current}: bundle {store.rollback().id}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if not 1 <= arguments.runs <= _MOST_RUNS:
        raise ConfigError(f"--runs is 1 to {_MOST_RUNS}")
    found = verify(load_bundle(arguments.bundle, public_key=public_key_of(arguments)), runs=arguments.runs)
    print(json.dumps({"passed": found.passed, **asdict(found)}) if arguments.json else _table(found))
    return 0 if found.passed else 1


def _table(found: Verification) -> str:
    lines = [f"bundle {found.bundle}, onnxruntime {found.onnxruntime}"]
    for check in found.checks:
        verdict = "pass" if check.passed else "FAIL"
        error = (
            "by way of backward" if check.worst_error is None else f"{check.worst_error:.1e} in {check.worst_output}"
        )
        lines.append(
            f"{check.graph:<9} {verdict}  {check.median_ms:8.3f} ms median {check.p95_ms:8.3f} ms p95   "
            f"worst difference {error}"
        )
    batch = found.checks[0].batch
    lines.append(
        f"{'pass' if found.passed else 'FAIL'}: tolerance {found.tolerance:g} of an output's largest value; times of "
        f"{found.runs} runs, {batch} samples each, one thread"
    )
    return "\n".join(lines)


def _command(commands: Any, name: str, short: str, description: str) -> argparse.ArgumentParser:
    examples = "".join(f"{line}\n" for line in EXAMPLES.splitlines() if f"psgl-edge {name} " in line)
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=short,
        description=description,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_debug(parser)
    return parser
