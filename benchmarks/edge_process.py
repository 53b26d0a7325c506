"""One process of ``benchmarks.edge``: it imports or runs so much, and prints what that took as one JSON line.

``imports``: what a device depends on, and nothing of ours. ``own``: then edge_sdk, timed. ``device BUNDLE BATCH``: then
a device with its database, its MQTT client and its front, which runs every graph of the bundle.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from pathlib import Path

_STEPS = 20


def main() -> int:
    """Do what the command line says."""
    import sqlite3
    import ssl

    import cbor2
    import numpy
    import onnxruntime
    import paho.mqtt.client

    needed = (sqlite3, ssl, cbor2, numpy, onnxruntime, paho.mqtt.client)
    found: dict[str, object] = {"modules": len(needed)}
    if sys.argv[1] != "imports":
        began = time.perf_counter()
        import edge_sdk

        found |= {"own_s": time.perf_counter() - began, "version": edge_sdk.__version__}
    if sys.argv[1] == "device":
        _device(sys.argv[2], int(sys.argv[3]))
    print(json.dumps({**found, "peak_rss_mb": _peak_rss_mb(), "torch_loaded": "torch" in sys.modules}))
    return 0


def _device(path: str, batch: int) -> None:
    import tempfile

    import numpy as np

    from edge_sdk.bundle import load_bundle
    from edge_sdk.front import Front, FrontState
    from edge_sdk.memory import keep_freed_memory
    from edge_sdk.paho_transport import PahoTransport
    from edge_sdk.sqlite_state import SqliteState
    from edge_sdk.state import OutboxStep
    from edge_sdk.transport import Connection

    keep_freed_memory()
    bundle = load_bundle(path)
    start = FrontState(0, dict(bundle.initial))
    transport = PahoTransport(Connection("127.0.0.1"), client_id="bench")
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(
            SqliteState(Path(folder) / "state", start, bundle=bundle.id, fleet="f", device="d", on_note=print)
        ) as state,
    ):
        state.begin_run("bench", start)
        front = Front(bundle, noise_key=state.noise_key)
        x = np.random.default_rng(0).random((batch, *bundle.manifest.input_shape), dtype=np.float32)
        for step in range(1, _STEPS + 1):
            front.forward(state.front, x, None, training=False)
            forward = front.forward(state.front, x, None, training=True)
            state.begin(OutboxStep(step, "train", (forward.activations.tobytes(),), x, None), {})
            prepared = front.prepare(state.front, forward)
            gradient = np.ones_like(forward.activations)
            state.finish(step, front.backward(state.front, prepared, gradient, rate=1e-3), {})
    transport.close()


def _peak_rss_mb() -> float:
    """As ``edge_sdk.memory`` has it, without an import of edge_sdk."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    raise SystemExit(main())
