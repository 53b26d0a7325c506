"""``psgl-edge verify`` with a foreign root file system under qemu-user, and a stricter limit; arm64.sh calls this."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

__all__ = ["main"]

_TOLERANCE = 1e-5
_PATIENCE_S = 600.0
_PROCESSOR = "import platform; print(platform.machine(), 'Python', platform.python_version())"


def main() -> int:
    """Verify each bundle; returns 0 if every graph agrees to 1e-5 of its outputs' largest values."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path, help="aarch64 root file system with the SDK, and proc/cpuinfo")
    parser.add_argument("bundles", type=Path, nargs="+", help="to verify")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what verify prints here, too")
    arguments = parser.parse_args()
    print(_emulated(arguments.root, "-c", _PROCESSOR).strip(), flush=True)
    program = arguments.root / "usr/local/bin/psgl-edge"
    found: dict[str, Any] = {}
    for bundle in arguments.bundles:
        began = time.monotonic()
        command = [str(program.resolve()), "verify", str(bundle.resolve()), "--runs", "1", "--json"]
        done = json.loads(_emulated(arguments.root, *command))
        found[bundle.stem] = {**done, "seconds": round(time.monotonic() - began, 1)}
        for check in done["checks"]:
            error = check["worst_error"]
            told = "by way of backward" if error is None else f"worst difference {error:.1e} in {check['worst_output']}"
            print(f"{bundle.stem:<10} {check['graph']:<9} {told}", flush=True)
        print(f"{bundle.stem:<10} onnxruntime {done['onnxruntime']}, {found[bundle.stem]['seconds']} s", flush=True)
    errors = [check["worst_error"] or 0.0 for each in found.values() for check in each["checks"]]
    passed = all(each["passed"] for each in found.values()) and max(errors) <= _TOLERANCE
    print(f"{'pass' if passed else 'FAIL'}: worst difference {max(errors):.1e}, asked for at most {_TOLERANCE:g}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if passed else 1


def _emulated(root: Path, *arguments: str) -> str:
    """Run the root's Python on arguments; returns what it printed.

    Raises:
        SystemExit: it failed; what it said is the message.
    """
    root = root.resolve()
    command = ["qemu-aarch64", "-L", str(root), str(root / "usr/bin/python3.11"), *arguments]
    home = {"HOME": os.environ["TMPDIR"]} if "TMPDIR" in os.environ else {}
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **home}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=_PATIENCE_S)
    # 1 is verify's verdict, which its JSON says more exactly.
    if done.returncode not in (0, 1) or not done.stdout:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
