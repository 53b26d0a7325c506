"""MQTT topics of the protocol: who speaks where.

    psgl/v1/<fleet>/up/<device>/state     retained; birth and last will
    psgl/v1/<fleet>/up/<device>/step      training steps and inference requests
    psgl/v1/<fleet>/down/<device>/step    the server's reply to that step
    psgl/v1/<fleet>/down/all/model        retained announcement of the model

A broker's access list for one device is the three patterns that hold its name, plus the announcement.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edge_sdk.errors import ConfigError, WireError

__all__ = [
    "EVERYONE",
    "ROOT",
    "Topic",
    "check_name",
    "down_model",
    "down_step",
    "every_state",
    "every_step",
    "parse",
    "up_state",
    "up_step",
]

ROOT = "psgl/v1"
EVERYONE = "all"  # stands for every device; no fleet or device may be called so

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CHANNELS = {"up": ("state", "step"), "down": ("step",)}


@dataclass(frozen=True)
class Topic:
    """The parts of a topic.

    Attributes:
        fleet: name of the fleet.
        direction: ``up`` (device to server) or ``down``.
        device: name of the device; ``all`` for the announcement.
        channel: ``state``, ``step`` or ``model``.
    """

    fleet: str
    direction: str
    device: str
    channel: str


def check_name(name: str) -> str:
    """Return ``name`` if a fleet or a device may be called so.

    Raises:
        ConfigError: not 1-64 of the characters A-Z a-z 0-9 _ -, or the reserved name ``all``.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = repr(name)[:80]
        raise ConfigError(f"{shown} cannot name a fleet or a device: use 1-64 of the characters A-Z a-z 0-9 _ -")
    if name == EVERYONE:
        raise ConfigError(f"the name {EVERYONE!r} is reserved for messages to every device: choose another")
    return name


def up_state(fleet: str, device: str) -> str:
    """Topic on which ``device`` says that it is there, and its broker that it is gone."""
    return f"{ROOT}/{check_name(fleet)}/up/{check_name(device)}/state"


def up_step(fleet: str, device: str) -> str:
    """Topic on which ``device`` sends its steps."""
    return f"{ROOT}/{check_name(fleet)}/up/{check_name(device)}/step"


def down_step(fleet: str, device: str) -> str:
    """Topic on which the server answers ``device``."""
    return f"{ROOT}/{check_name(fleet)}/down/{check_name(device)}/step"


def down_model(fleet: str) -> str:
    """Topic of the retained announcement to every device of ``fleet``."""
    return f"{ROOT}/{check_name(fleet)}/down/{EVERYONE}/model"


def every_state(fleet: str) -> str:
    """Subscription pattern of the server: the state of every device of ``fleet``."""
    return f"{ROOT}/{check_name(fleet)}/up/+/state"


def every_step(fleet: str) -> str:
    """Subscription pattern of the server: the steps of every device of ``fleet``."""
    return f"{ROOT}/{check_name(fleet)}/up/+/step"


def parse(topic: str) -> Topic:
    """Take a topic apart; whatever ``parse`` accepts, one of the functions above can build.

    Raises:
        WireError: reason ``topic``: not a topic of this protocol.
    """
    prefix, _, rest = topic.partition(f"{ROOT}/")
    parts = rest.split("/")
    if prefix or len(parts) != 4:
        raise WireError("topic", f"{topic[:200]!r} is no topic of this protocol: expected {ROOT}/<fleet>/...")
    fleet, direction, device, channel = parts
    try:
        check_name(fleet)
        if (direction, device, channel) != ("down", EVERYONE, "model"):
            check_name(device)
            if channel not in _CHANNELS.get(direction, ()):
                raise WireError("topic", f"{topic[:200]!r} names no channel of this protocol")
    except ConfigError as exc:
        raise WireError("topic", f"{topic[:200]!r} is no topic of this protocol: {exc}") from exc
    return Topic(fleet, direction, device, channel)
