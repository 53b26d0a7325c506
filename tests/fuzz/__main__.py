"""Hostile bytes by the hundred thousand: ``python -m tests.fuzz --runs 200000`` from the root of the repository.

Each target is searched by a process of its own. The exit code is 1 where an input broke an invariant, took too long
or too much memory; that input is kept under runs/fuzz and can be run again:
``python -m tests.fuzz --target NAME --replay FILE``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.fuzz.defects import DEFECTS
from tests.fuzz.targets import TARGETS

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parent.parent.parent
_LAST_LINES = 25
_REPLAY_BYTES = 4 << 30

Report = dict[str, Any]


def main() -> int:
    """Fuzz, or run one input again; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=200_000, help="inputs, of all targets together (%(default)s)")
    parser.add_argument("--target", choices=TARGETS, help="this one alone (default: all)")
    parser.add_argument("--seed", type=int, help="of the search, 1 to 2^31-1 (default: a new one, printed)")
    parser.add_argument("--timeout-s", type=int, default=10, help="longest time of one input (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (default: cores)")
    parser.add_argument("--out", type=Path, default=_ROOT / "runs" / "fuzz", help="where inputs that break it are kept")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run this input once (needs --target)")
    parser.add_argument("--plant", choices=DEFECTS, help="a defect for the search to find, as a test of the search")
    arguments = parser.parse_args()
    if arguments.replay:
        if not arguments.target:
            parser.error("--replay needs --target NAME")
        return _replay(arguments)
    if importlib.util.find_spec("atheris") is None:
        print("error: the fuzzer needs atheris (Linux): pip install 'psgl[dev]'", file=sys.stderr)
        return 2
    seed = arguments.seed or secrets.randbelow(2**31 - 1) + 1
    names = [arguments.target] if arguments.target else list(TARGETS)
    total_share = sum(TARGETS[name].share for name in names)
    runs = {name: max(1, round(arguments.runs * TARGETS[name].share / total_share)) for name in names}
    with tempfile.TemporaryDirectory(prefix="psgl-fuzz-") as folder:
        reports = _search(arguments, runs, seed, Path(folder))
    violations = sum("violation" in report for report in reports.values())
    _print(reports, seed)
    if arguments.json:
        figures = {"fuzz.inputs": sum(report["inputs"] for report in reports.values()), "fuzz.violations": violations}
        print(json.dumps({"figures": figures, "seed": seed, "targets": reports}))
    return 1 if violations else 0


def _search(arguments: argparse.Namespace, runs: Mapping[str, int], seed: int, folder: Path) -> dict[str, Report]:
    """One process for each target, at most ``--jobs`` at a time; reports in the order of ``runs``."""
    waiting, active = list(runs), dict[str, subprocess.Popen[bytes]]()
    reports: dict[str, Report] = {}
    try:
        while waiting or active:
            while waiting and len(active) < max(1, arguments.jobs):
                name = waiting.pop(0)
                active[name] = _start(arguments, name, runs[name], seed, folder / name)
            for name, process in list(active.items()):
                if process.poll() is not None:
                    del active[name]
                    reports[name] = _outcome(arguments.out, name, runs[name], process.returncode, folder / name)
            time.sleep(0.05)
    finally:
        for process in active.values():
            process.kill()
            process.wait()
    return {name: reports[name] for name in runs}


def _start(arguments: argparse.Namespace, name: str, runs: int, seed: int, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir()
    command = [sys.executable, "-m", "tests.fuzz.worker", name, str(folder), "--runs", str(runs), "--seed", str(seed)]
    command += ["--timeout-s", str(arguments.timeout_s)]
    command += ["--plant", arguments.plant] if arguments.plant else []
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, cwd=_ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def _outcome(out: Path, name: str, runs: int, code: int, folder: Path) -> Report:
    """The process's own report; with ``violation`` where it did not end well, and the input that it left."""
    file = folder / "report.json"
    report: Report = json.loads(file.read_text()) if file.exists() else {"inputs": 0}
    if code == 0 and report["inputs"] >= runs:
        return report
    log = (folder / "log").read_text(errors="replace").splitlines()
    report["violation"] = f"exit code {code} after {report['inputs']} of {runs} inputs"
    report["log"] = [line[:400] for line in log if not line.startswith("INFO")][:_LAST_LINES]
    for found in folder.glob("found-*"):
        out.mkdir(parents=True, exist_ok=True)
        kept = out / f"{name}-{found.name.removeprefix('found-')[:24]}"
        shutil.copyfile(found, kept)
        report["input"] = str(kept)
    return report


def _print(reports: Mapping[str, Report], seed: int) -> None:
    print(f"seed {seed}", file=sys.stderr)
    for name, report in reports.items():
        rejected = ", ".join(f"{reason} {count}" for reason, count in report.get("rejected", {}).items())
        peaks = ", ".join(f"{what} took at most {kib} KiB" for what, kib in report.get("peak_kib", {}).items())
        print(
            f"{name:10} {report['inputs']:7} inputs in {report.get('seconds', 0):.0f} s, "
            f"{report.get('accepted', 0)} accepted, slowest {report.get('slowest_ms', 0)} ms, "
            f"the process {report.get('process_mib', 0)} MiB, {peaks or 'nothing measured'}; refused: {rejected}",
            file=sys.stderr,
        )
        if "violation" in report:
            print("\n".join([f"{name}: {report['violation']}", *report["log"]]), file=sys.stderr)
            again = f"python -m tests.fuzz --target {name} --replay {report.get('input', 'FILE')}"
            print(f"{name}: run it again with {again}", file=sys.stderr)


def _replay(arguments: argparse.Namespace) -> int:
    """Run one input in this process, under the same limits."""
    try:
        data = arguments.replay.read_bytes()
    except OSError as exc:
        print(f"error: {arguments.replay} cannot be read ({exc.strerror}): name a file of runs/fuzz", file=sys.stderr)
        return 2
    if arguments.plant:
        DEFECTS[arguments.plant]()
    resource.setrlimit(resource.RLIMIT_AS, (_REPLAY_BYTES, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(arguments.timeout_s)
    tracemalloc.start()
    try:
        outcomes = TARGETS[arguments.target].run(data)
    except Exception:  # whatever it is, it is what the search found
        traceback.print_exc()
        return 1
    print(f"{arguments.target}: {', '.join(outcomes) or 'nothing in it'}")
    return 0


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError("the input takes too long")


if __name__ == "__main__":
    sys.exit(main())
