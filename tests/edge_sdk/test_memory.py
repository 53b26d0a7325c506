"""Memory is measured for this process alone, and freed blocks stay with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
STEPS = """
import resource, sys
import numpy as np
from edge_sdk.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(60):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(400_000, np.float32) for _ in range(8)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_peak_memory_is_this_process_alone() -> None:
    ballast = np.ones(300_000_000 // 8)
    code = (
        "import numpy as np; from edge_sdk.memory import peak_rss_mb; before = peak_rss_mb(); "
        "block = np.ones(80_000_000 // 8); print(before, peak_rss_mb())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    before, after = map(float, done.stdout.split())
    assert ballast[0] == 1 and before < 100, "the parent's memory is not the child's"
    assert 70 < after - before < 90


def test_kept_memory_is_not_faulted_in_again() -> None:
    faults = {}
    for how in ("keep", "plain"):
        done = subprocess.run(
            [sys.executable, "-c", STEPS, how], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        faults[how] = int(done.stdout)
    assert faults["keep"] < 1000 and faults["keep"] <= faults["plain"]
