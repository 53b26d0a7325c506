"""The bundle's file leaves the server part by part, whatever a device asks for."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from edge_sdk import topics
from edge_sdk.memory_transport import MemoryBroker, MemoryTransport
from edge_sdk.wire import Message, encode
from server_sdk.parts import MOST_PART_BYTES, BundleParts, Part, Unavailable
from server_sdk.plan import TrainingPlan
from server_sdk.rates import RateLimits, Rates
from server_sdk.service import TrainingService
from tests.server_sdk.test_service import Device

DATA = np.random.default_rng(1).bytes(2 * MOST_PART_BYTES + 7)


def asked(first: int, most: int, bundle: str = "b") -> dict[str, Any]:
    return {"bundle": bundle, "first": first, "most": most}


@pytest.mark.parametrize("most", [1000, MOST_PART_BYTES, 2**63 - 1])
def test_parts_are_the_file(most: int) -> None:
    parts, found = BundleParts("b", DATA, Rates(RateLimits(1e9, 1e9))), b""
    while len(found) < len(DATA):
        part = parts.find("d", asked(len(found), most))
        assert isinstance(part, Part) and 1 <= len(part.data) <= min(most, MOST_PART_BYTES)
        assert part.fields == {"bundle": "b", "first": len(found), "total": len(DATA)}
        found += part.data.tobytes()
    assert found == DATA


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (asked(0, 10, "other"), "bundle"),
        (asked(len(DATA), 10), "range"),
        (asked(2**63 - 1, 2**63 - 1), "range"),
        (asked(0, 0), "range"),
    ],
)
def test_what_there_is_not_is_refused(fields: dict[str, Any], reason: str) -> None:
    found = BundleParts("b", DATA).find("d", fields)
    assert isinstance(found, Unavailable) and found.reason == reason


def test_a_server_without_the_file_hands_out_nothing() -> None:
    found = BundleParts("b", None).find("d", asked(0, 10))
    assert isinstance(found, Unavailable) and found.reason == "bundle"


def test_a_device_that_asks_for_too_much_is_left_unanswered_and_the_others_are_not() -> None:
    parts = BundleParts("b", DATA, Rates(RateLimits(1e3, 1000.0, 1.0), lambda: 0.0))
    assert parts.find("d", asked(0, 600)) is not None and parts.find("d", asked(600, 600)) is None
    assert parts.find("e", asked(600, 600)) is not None


class Behind(Device):
    """A device with another bundle than the server's."""

    def fetch(self, step: int, bundle: str, first: int = 0) -> Message:
        for frame in encode(Message("fetch", self.run, "s", step, asked(first, 5, bundle))):
            self.transport.publish(topics.up_step("ward", self.name), frame)
        return self.receive()


def test_a_device_with_another_bundle_may_fetch_and_nothing_else(built: dict[str, Any]) -> None:
    broker, made = MemoryBroker(), built["vanilla"]
    service = TrainingService(
        made.bundle,
        made.trainer(1),
        MemoryTransport(broker, "server"),
        TrainingPlan(devices=1, rounds=1, batch=3),
        fleet="ward",
        idle_s=20,
        bundle_file=DATA,
    )
    thread = threading.Thread(target=service.run)
    thread.start()
    device = Behind(broker, made)
    device.tell("online", "another")
    for _ in range(2):
        part = device.fetch(1, made.bundle.id, 7)
        assert part.kind == "part" and part.tensors["part"].tobytes() == DATA[7:12], "asked again, answered again"
        assert part.fields == {"bundle": made.bundle.id, "first": 7, "total": len(DATA)}
    for step, bundle, first, reason in ((2, "another", 0, "bundle"), (3, made.bundle.id, len(DATA), "range")):
        refused = device.fetch(step, bundle, first)
        assert refused.kind == "refused" and refused.fields["reason"] == reason
    device.send(4, "infer")
    assert device.receive().fields["reason"] == "bundle"
    assert service._run.position == 1, "of all this the run has no record"
    service.stop()
    thread.join(20)
    assert not thread.is_alive()
    device.transport.close()
