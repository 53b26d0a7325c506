"""Memory of a long-running process: how much it peaked at, and keeping what each step frees for the next one."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

__all__ = ["keep_freed_memory", "peak_rss_mb"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory(max_bytes: int = 64 << 20) -> None:
    """Let the C library keep freed blocks instead of giving them back to the system after each step.

    A step allocates the same few megabytes again and again, and getting fresh pages for them costs more than filling
    them. The peak does not grow by it. Does nothing where the C library has no ``mallopt``.

    Args:
        max_bytes: free memory that the process keeps at most.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_TRIM_THRESHOLD, max_bytes)
        library.mallopt(_MMAP_THRESHOLD, min(max_bytes, 16 << 20))


def peak_rss_mb() -> float:
    """The largest resident memory of this process so far, in MB of 10^6 bytes."""
    with contextlib.suppress(OSError, ValueError):
        # getrusage would also count what the parent had before this program replaced it.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1.0 if sys.platform == "darwin" else 1024.0) / 1e6
