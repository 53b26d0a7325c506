"""What a profile switches on, on the device and on the server; a bundle names its profile.

Nothing here or elsewhere asks for a profile by name: what makes one different from another stands in its entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal, cast

from server_sdk.errors import ModelError
from server_sdk.fusion import BASE_WEIGHTS
from server_sdk.reference.perturbation import Perturbation
from server_sdk.reference.specification import ModelSpec
from server_sdk.streams import STREAMS

__all__ = ["PROFILES", "REFERENCE", "Profile", "ServerPart"]

REFERENCE = "server_sdk.reference.networks:reference_network"
"""The network of every profile that names no other."""


@dataclass(frozen=True)
class ServerPart:
    """What the server does with a bundle's activations; it travels in the manifest under ``server``.

    Attributes:
        model: the whole network, split as on export.
        seed: of the initial weights of front and back.
        back_sha256: hash of the safetensors file with the back's initial weights.
        streams: subset of ``attacked``, ``recovered``, ``fused``.
        gradient_from: ``fused`` (paper) or ``all``: whose gradient goes back to the device.
        threshold: of the recovery, relative to the largest singular value.
        base_weights: of the decision fusion, by stream.
        map_channel: where the device perturbs, its front sees the map as one more channel.
        downsample: of the front's input, as in ``front_input``; None: what its first convolution takes.
    """

    model: ModelSpec
    seed: int
    back_sha256: str
    streams: tuple[str, ...]
    gradient_from: Literal["fused", "all"] = "fused"
    threshold: float = 0.1
    base_weights: Mapping[str, float] = field(default_factory=lambda: dict(BASE_WEIGHTS))
    map_channel: bool = True
    downsample: int | None = None

    def as_manifest(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_manifest(cls, part: Mapping[str, Any]) -> ServerPart:
        """From the JSON values of a bundle that was read.

        Raises:
            ModelError: a value is missing or of another type.
        """
        try:
            model = part["model"]
            found = cls(
                model=ModelSpec(str(model["factory"]), dict(model["arguments"]), str(model["cut"])),
                seed=int(part["seed"]),
                back_sha256=str(part["back_sha256"]),
                streams=tuple(str(name) for name in part["streams"]),
                gradient_from=cast(Literal["fused", "all"], part["gradient_from"]),
                threshold=float(part["threshold"]),
                base_weights={str(name): float(weight) for name, weight in part["base_weights"].items()},
                map_channel=bool(part.get("map_channel", True)),
                downsample=None if (blocks := part.get("downsample")) is None else int(blocks),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise ModelError(f"the bundle does not say how to train its back ({exc}): export it again") from exc
        if found.downsample not in (None, 1, 2):
            raise ModelError(f"the bundle halves its grid {found.downsample} times: export it again")
        if found.gradient_from not in ("fused", "all") or not set(found.streams) <= set(STREAMS):
            raise ModelError("the bundle names streams that this server does not have: upgrade psgl or export it again")
        return found


@dataclass(frozen=True)
class Profile:
    """A named set of switches.

    Attributes:
        perturbation: what the device does to its input, or None.
        streams: what the server trains.
        about: one sentence for ``--help``.
        noise: standard deviation of the noise that the device adds to its activations.
        noise_kind: its distribution, ``gaussian`` or ``laplace``.
        bits: of an activation on the wire, 0 for floats. Where the front is trained, its gradient passes the rounding
            as if it were not there (straight-through: Bengio, Leonard and Courville, arXiv 1308.3432).
        bound: no activation is larger in magnitude before the noise, 0 for no bound.
        frozen: the front is trained before it is exported, and never on the device.
        defence: what it is trained with then, a name of ``export.defences.DEFENCES``.
        factory, cut: the network where none is given, as in ``ModelSpec``; the factory takes ``in_channels``, ``grid``,
            ``classes`` and what ``arguments`` say.
        arguments: further ones of the factory.
    """

    perturbation: Perturbation | None
    streams: tuple[str, ...]
    about: str
    noise: float = 0.0
    noise_kind: str = "gaussian"
    bits: int = 0
    bound: float = 0.0
    frozen: bool = False
    defence: str = "none"
    factory: str = REFERENCE
    cut: str = "relu2"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def span(self) -> tuple[float, float] | None:
        """What few bits can say: bounded activations and twice their noise; None: what each message needs."""
        reach = self.bound + 2 * self.noise
        return (-reach, reach) if self.bits and self.bound else None


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "vanilla": Profile(None, ("attacked",), "plain split learning, the baseline of every table"),
        "gaussian": Profile(None, ("attacked",), "Gaussian noise on the activations, a baseline", noise=1.0),
        "laplace": Profile(
            None, ("attacked",), "Laplace noise on the activations, a baseline", noise=1.0, noise_kind="laplace"
        ),
        "quantised": Profile(None, ("attacked",), "activations in 4 bits each, a baseline", bits=4),
        "lowrank": Profile(
            None,
            ("attacked",),
            "activations through a filter of rank 4, a baseline",
            cut="filter",
            arguments={"rank": 4},
        ),
        "nopeek": Profile(
            None,
            ("attacked",),
            "a front trained against distance correlation and frozen, a baseline",
            frozen=True,
            defence="nopeek",
        ),
        "adversarial": Profile(
            None,
            ("attacked",),
            "a front trained against a decoder (ResSFL) and frozen, a baseline",
            frozen=True,
            defence="adversarial",
        ),
        "paper": Profile(
            Perturbation("sign", 0.2),
            STREAMS,
            "reversed JSMA on the device, recovery and fusion on the server",
        ),
        "hardened": Profile(
            None,
            ("attacked",),
            "a frozen front with a short, bounded, noisy code in 4 bits a value",
            noise=1.0,
            bits=4,
            bound=1.0,
            frozen=True,
            defence="bottleneck",
            factory="server_sdk.reference.networks:hardened_network",
            cut="tanh",
        ),
    }
)
