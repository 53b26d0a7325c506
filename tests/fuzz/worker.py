"""One target under the coverage-guided fuzzer (atheris, libFuzzer), in a process of its own with limits on it.

libFuzzer ends the process itself when an input breaks something: it leaves the input in the folder, and the report
stands as it was last written.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=[f"edge_sdk.{name}" for name in ("cbor", "codec", "body", "chunks", "messages", "bundle", "topics")]
):
    from tests.fuzz import targets
from tests.fuzz.defects import DEFECTS
from tests.fuzz.targets import TARGETS, Target

__all__ = ["main"]

_EXTRA_BYTES = 2 << 30
_REPORT_EVERY_S = 1.0


class _Watched:
    """A target with its counts."""

    def __init__(self, target: Target, runs: int, report: Path) -> None:
        self._target = target
        self._runs = runs
        self._report = report
        self._inputs = 0
        self._slowest_s = 0.0
        self._outcomes: Counter[str] = Counter()
        self._started = self._reported = time.monotonic()

    def __call__(self, data: bytes) -> None:
        started = time.perf_counter()
        self._inputs += 1
        try:
            self._outcomes.update(self._target.run(data))
        except BaseException:
            self.write()
            raise
        self._slowest_s = max(self._slowest_s, time.perf_counter() - started)
        if self._inputs >= self._runs:
            self.write()
            os._exit(0)
        if time.monotonic() - self._reported > _REPORT_EVERY_S:
            self.write()

    def write(self) -> None:
        """Write the counts so far."""
        self._reported = time.monotonic()
        accepted = self._outcomes[targets.ACCEPTED]
        report = {
            "inputs": self._inputs,
            "accepted": accepted,
            "rejected": {name: count for name, count in self._outcomes.most_common() if name != targets.ACCEPTED},
            "slowest_ms": round(1000 * self._slowest_s, 2),
            "peak_kib": {what: round(peak / 1024, 1) for what, peak in targets.PEAKS.items()},
            "process_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "seconds": round(self._reported - self._started, 2),
            "cpu_seconds": round(time.process_time(), 2),
        }
        temporary = self._report.with_suffix(".new")
        temporary.write_text(json.dumps(report))
        temporary.replace(self._report)


def main() -> None:
    """Fuzz one target; the process ends with 0 after its inputs, or as libFuzzer ends it."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.worker")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--timeout-s", type=int, required=True)
    parser.add_argument("--plant", choices=DEFECTS)
    arguments = parser.parse_args()
    target = TARGETS[arguments.target]
    corpus = arguments.folder / "corpus"
    corpus.mkdir(parents=True)
    for number, data in enumerate(target.seeds()):
        (corpus / f"seed-{number:03}").write_bytes(data)
    if arguments.plant:
        DEFECTS[arguments.plant]()
    tracemalloc.start()
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + _EXTRA_BYTES, resource.RLIM_INFINITY))

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        return target.mutate(data, max_size, seed, atheris.Mutate)

    options = {
        "seed": arguments.seed,
        "timeout": arguments.timeout_s,
        "max_len": target.max_bytes,
        "rss_limit_mb": 2048,
        "detect_leaks": 0,
        "verbosity": 0,
        "artifact_prefix": f"{arguments.folder}/found-",
    }
    flags = [f"-{name}={value}" for name, value in options.items()]
    watched = _Watched(target, arguments.runs, arguments.folder / "report.json")
    atheris.Setup([sys.argv[0], *flags, str(corpus)], watched, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
