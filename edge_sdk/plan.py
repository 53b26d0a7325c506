"""What a server announces to its fleet, and whether this device can follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_sdk.errors import RefusedError
from edge_sdk.wire import Message, version_conflict

__all__ = ["Plan", "plan_of", "refuse_version"]


@dataclass(frozen=True)
class Plan:
    """What the server announced (retained, so that a device that joins late has it too).

    Attributes:
        run: id of the training run; a message of another run is refused.
        bundle: id of the bundle that the server trains.
        status: ``waiting`` for devices, ``training``, ``evaluating`` (every round is done), ``paused`` (the server
            was stopped and can go on) or ``finished``.
        rounds: rounds of the whole run.
        evaluate_every: rounds between two evaluations, 0 for none before the end.
        batch: samples of each device in one step.
        fronts: ``own``, ``shared``, ``relay`` or ``frozen``.
        front: version of the synchronised front, 0 before the first.
        server: id of one life of the server.
    """

    run: str
    bundle: str
    status: str
    rounds: int
    evaluate_every: int
    batch: int
    fronts: str = "own"
    front: int = 0
    server: str = ""


def plan_of(message: Message) -> Plan:
    """The plan in a ``model`` message.

    Raises:
        RefusedError: reason ``version``: the server does not speak this version of the protocol.
    """
    fields = message.fields
    refuse_version(fields.get("speaks", []))
    return Plan(
        run=message.run,
        bundle=str(fields["bundle"]),
        status=str(fields["status"]),
        rounds=int(fields["rounds"]),
        evaluate_every=int(fields["evaluate_every"]),
        batch=int(fields["batch"]),
        fronts=str(fields.get("fronts", "own")),
        front=int(fields.get("front", 0)),
        server=str(fields.get("server", "")),
    )


def refuse_version(theirs: Sequence[object]) -> None:
    """Refuse a server that speaks none of this device's versions.

    Raises:
        RefusedError: reason ``version``.
    """
    conflict = version_conflict(theirs, here="device", there="server")
    if conflict is not None:
        raise RefusedError("version", conflict)
