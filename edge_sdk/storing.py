"""Samples of a frozen front are handed over, once each: many may wait for their reply at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import OutboxFullError, RefusedError
from edge_sdk.exchange import Reply
from edge_sdk.state import OutboxStep
from edge_sdk.station import Station

__all__ = ["flush", "store"]


def store(
    station: Station, batch: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], *, first: int, total: int
) -> None:
    """Hand a checked batch over. See ``EdgeClient.store``."""
    front = station.state.front
    forward = station.front.forward(front, batch, None, training=False, epsilon=station.train_epsilon)
    fields = {"front": front.version, "first": first, "total": total}
    message = station.message("store", fields, {"activations": forward.activations, "labels": labels})
    outbox = OutboxStep(message.step, "store", station.frames(message))
    counters = {
        "sent": first + len(batch),
        **station.told(batch),
        "samples": station.count("samples") + len(batch),
        "sample_bytes": station.count("sample_bytes") + outbox.frames_size,
        "unperturbed": station.count("unperturbed") + forward.unperturbed,
    }
    while True:
        try:
            station.exchange.forget(station.state.begin(outbox, counters))
            break
        except OutboxFullError:
            if station.state.limits.when_full != "block" or not station.state.outbox:
                raise
            _send_left(station)
            _collect(station, 1.0)
    station.exchange.send(outbox)
    _collect(station, 0.0)


def flush(station: Station) -> None:
    """Wait until everything that was stored has its reply. See ``EdgeClient.flush``."""
    _send_left(station)
    while station.state.outbox:
        _collect(station, 1.0)


def _send_left(station: Station) -> None:
    """Send what an earlier life of this device left in the outbox."""
    for outbox in station.state.outbox:
        if outbox.step not in station.exchange.waiting:
            station.exchange.send(outbox)


def _collect(station: Station, timeout_s: float) -> None:
    """Take the replies that have come; waits for one at most this long."""
    reply = station.exchange.reply(timeout_s)
    while reply is not None:
        _finish(station, reply)
        reply = station.exchange.reply(0.0)


def _finish(station: Station, reply: Reply) -> None:
    if all(each.step != reply.step for each in station.state.outbox):
        return  # it gave way to newer ones while it was under way
    station.state.finish(reply.step)
    if reply.message.kind == "refused":
        fields = reply.message.fields
        raise RefusedError(
            str(fields["reason"]), f"the server refused samples ({fields['reason']}): {fields.get('detail', '')}"
        )
