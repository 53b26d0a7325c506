"""What the devices of a fleet say of themselves, and the run's figures that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_sdk.errors import WireError
from edge_sdk.training import Evaluation
from edge_sdk.wire import Message, version_conflict
from server_sdk.streams import STREAMS

__all__ = ["Roster", "summary"]

_LONGEST_TEXT = 300  # characters


def summary(reports: Sequence[Evaluation]) -> dict[str, Any]:
    """The counts of several devices as shares of all their samples."""
    samples = max(sum(report.samples for report in reports), 1)
    names = [name for name in STREAMS if any(name in report.streams for report in reports)]
    shares: dict[str, Any] = {
        "samples": sum(report.samples for report in reports),
        "accuracy": sum(report.fused for report in reports) / samples,
        "streams": {name: sum(r.streams.get(name, 0) for r in reports) / samples for name in names},
    }
    if reports and all(report.has_guide for report in reports):
        right = sum(report.guide_right for report in reports)
        wrong = samples - right
        shares["guide_accuracy"] = right / samples
        shares["guide_agreement"] = sum(report.guide_agreed for report in reports) / samples
        shares["follow_when_wrong"] = sum(r.guide_followed for r in reports) / wrong if wrong else 0.0
    return shares


@dataclass
class _Device:
    """What a device said last."""

    bundle: str = ""
    status: str = "online"
    round: int = 0
    member: bool = False
    bytes_per_sample: float = 0.0
    update: str = ""
    reports: dict[str, Evaluation] = field(default_factory=dict)


class Roster:
    """The devices of a run.

    Args:
        max_devices: devices beyond this number are not noted.
    """

    def __init__(self, max_devices: int) -> None:
        self._max_devices = max_devices
        self._devices: dict[str, _Device] = {}
        self._evaluated = 0

    def note(self, name: str, message: Message) -> dict[str, Any]:
        """Note a device's state message.

        Returns:
            The event that an operator sees; ``update`` in it is news of why the device does not follow a bundle.

        Raises:
            WireError: reason ``devices``: one more than are listened to; ``schema``: a report that is no map of counts;
                ``version``: the device does not speak this server's version of the protocol.
        """
        fields = message.fields
        conflict = version_conflict(fields.get("speaks", []), here="server", there="device")
        if conflict is not None:
            raise WireError("version", f"{name}: {conflict}")
        if name not in self._devices and len(self._devices) >= self._max_devices:
            raise WireError("devices", f"more than {self._max_devices} devices")
        reports = {kind: Evaluation.from_fields(fields[kind]) for kind in ("evaluation", "clean") if kind in fields}
        device = self._devices.setdefault(name, _Device())
        device.bundle = str(fields["manifest"])
        device.status = str(fields["status"])
        device.round = int(fields.get("round", 0))
        device.bytes_per_sample = float(fields.get("bytes_per_sample", 0.0))
        device.reports = reports
        event = {"event": "device", "device": name, "status": device.status, "round": device.round}
        before, device.update = device.update, _for_a_terminal(str(fields.get("update", "")))
        return event if device.update in ("", before) else event | {"update": device.update}

    def join(self, name: str) -> None:
        """A device takes part in the run."""
        self._devices.setdefault(name, _Device()).member = True

    def bundle(self, name: str) -> str:
        """Id of the bundle that a device has, empty while it did not say."""
        return self._devices[name].bundle if name in self._devices else ""

    @property
    def members(self) -> tuple[str, ...]:
        """Who takes part, by name."""
        return tuple(sorted(name for name, device in self._devices.items() if device.member))

    @property
    def done(self) -> bool:
        """Whether every device that takes part has said that it is done."""
        return bool(self.members) and all(self._devices[name].status == "done" for name in self.members)

    def evaluation(self) -> dict[str, Any] | None:
        """The shares of an evaluation that has just become complete, with its ``round``; each is given once."""
        members = [self._devices[name] for name in self.members]
        at = {device.round for device in members if "evaluation" in device.reports}
        if len(at) != 1 or not all("evaluation" in device.reports for device in members):
            return None
        (number,) = at
        if number <= self._evaluated:
            return None
        self._evaluated = number
        return {"round": number, **summary([device.reports["evaluation"] for device in members])}

    def figures(self) -> dict[str, Any]:
        """Bytes of a sample (mean over the devices), who took part, and the last reports of those who are done."""
        costs = [device.bytes_per_sample for device in self._devices.values() if device.bytes_per_sample]
        figures: dict[str, Any] = {
            "bytes_per_sample": round(sum(costs) / max(len(costs), 1), 1),
            "devices": list(self.members),
        }
        done = [device for _, device in sorted(self._devices.items()) if device.status == "done"]
        for kind in ("evaluation", "clean"):
            reports = [device.reports[kind] for device in done if kind in device.reports]
            if reports:
                figures[kind] = summary(reports)
        return figures


def _for_a_terminal(text: str) -> str:
    """What a device wrote, without what could steer a terminal."""
    return "".join(filter(str.isprintable, text))[:_LONGEST_TEXT]
