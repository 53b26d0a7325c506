"""What a root file system weighs, line by line: Debian, Python, each distribution of the edge's closure, the SDK."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path

__all__ = ["main", "sizes"]

_SITE = "usr/local/lib/python3.11/dist-packages"
_OWN = "psgl"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path, help="the root file system")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write them here, too")
    arguments = parser.parse_args()
    if not (arguments.root / _SITE).is_dir():
        print(f"{arguments.root} has no {_SITE}: build it with build.sh", file=sys.stderr)
        return 2
    found = sizes(arguments.root)
    width = max(map(len, found))
    for name, size in found.items():
        print(f"{name:<{width}} {size:8.1f} MB")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({name: round(size, 3) for name, size in found.items()}, indent=1) + "\n")
    return 0


def sizes(root: Path) -> dict[str, float]:
    """Sizes in MB of 10^6 bytes: sums of file lengths, each file once; the lines before ``total`` add up to it.

    A Debian package belongs to the base if a required one or apt depends on it, else to Python if python3 does, else
    to ca-certificates; what no package owns is the base's.
    """
    everything = _bytes(path for path in root.rglob("*"))
    closure = {
        f"{one.name} {one.version}": _bytes(Path(str(file.locate())) for file in one.files or [])
        for one in distributions(path=[str(root / _SITE)])
    }
    own = {name: size for name, size in closure.items() if name.partition(" ")[0] == _OWN}
    others = {name: size for name, size in closure.items() if name not in own}
    packages = _packages(root)
    base = _needed(packages, {name for name, fields in packages.items() if fields["Priority"] == "required"} | {"apt"})
    python = _needed(packages, {"python3"}) - base
    shares = {
        "python3 and its libraries": _owned(root, python),
        "ca-certificates": _owned(root, set(packages) - base - python),
        **dict(sorted(others.items(), key=lambda item: -item[1])),
        **own,
    }
    lines = {"Debian base": everything - sum(shares.values()), **shares, "total": everything}
    return {name: size / 1e6 for name, size in lines.items()}


def _bytes(paths: Iterable[Path]) -> int:
    seen = {}
    for path in paths:
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            seen[status.st_dev, status.st_ino] = status.st_size
    return sum(seen.values())


def _packages(root: Path) -> dict[str, dict[str, str]]:
    """The installed packages' fields, by name."""
    found = {}
    for stanza in (root / "var/lib/dpkg/status").read_text().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if re.match(r"\S+: ", line))
        if "Package" in fields:
            found[fields["Package"]] = fields
    return found


def _needed(packages: dict[str, dict[str, str]], wanted: set[str]) -> set[str]:
    """Installed packages that those need, and they themselves."""
    found: set[str] = set()
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        if name in found or name not in packages:
            continue
        found.add(name)
        for field in ("Pre-Depends", "Depends"):
            waiting += re.findall(r"(?:^|[,|])\s*([a-z0-9][a-z0-9+.-]*)", packages[name].get(field, ""))
    return found


def _owned(root: Path, packages: set[str]) -> int:
    listed = root / "var/lib/dpkg/info"
    # One of several architectures is named as package:architecture.list.
    lists = [path for path in listed.glob("*.list") if path.name[: -len(".list")].partition(":")[0] in packages]
    return _bytes(root / line[1:] for path in lists for line in path.read_text().splitlines())


if __name__ == "__main__":
    raise SystemExit(main())
