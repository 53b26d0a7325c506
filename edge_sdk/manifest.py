"""The manifest of a bundle: what it says of itself, as JSON, and what of that can be. docs/bundle.md describes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np

from edge_sdk.errors import BundleError, ConfigError
from edge_sdk.interface import BATCH_AXIS, Cost, Interface, parse_cost, parse_interface
from edge_sdk.noise import NOISE_KINDS
from edge_sdk.packing import BITS, Packing

__all__ = ["FORMAT", "FORMAT_VERSION", "Manifest", "document_of", "parse_manifest"]

FORMAT = "psgl-bundle"
FORMAT_VERSION = 2

_INFER = ("infer",)
_TRAINING = ("train", "infer", "prepare", "backward")
_GUIDE = ("guide",)

_Choice = TypeVar("_Choice", str, int)
_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        profile: its name, for instance ``paper`` or ``hardened``.
        input_shape: (C, H, W) or (C, T) of one sample, float32 in [0, 1].
        classes: name of each class, in label order.
        cut_shape: shape of one sample's activations; one number for a vector.
        optimizer: ``sgd`` or ``adam``, built into the backward graph.
        learning_rate: its base rate; each reply of the server scales it by a factor in [0, 1].
        normalisation: of the perturbation's map, ``sign`` or ``max``; None where the profile has no perturbation.
        epsilon: L-infinity budget of the perturbation, in units of the input's range.
        perturb_towards: ``guide``: the guide's own decision says which class the perturbation attacks, in training as
            at test; ``label``: the true label does, where the device has it.
        noise: standard deviation of the noise that the device adds to its activations, 0 for none.
        noise_kind: its distribution, ``gaussian`` or ``laplace``.
        frozen: the front is never trained: of the front the bundle holds the ``infer`` graph alone.
        bits: of an activation on the wire, 1, 2, 4 or 8; 0 sends floats as the device's codec says.
        span: lowest and highest value that ``bits`` can say, exactly float32; None: those of each message.
        bound: no activation is larger than this in magnitude before the noise, 0 for no bound.
        max_batch: largest number of samples in one step.
        input_range: sensor values that become 0 and 1, for samples that are signed integers; None: such are refused.
        interfaces: inputs, outputs and opset of each graph.
        costs: of one run of each graph on one sample.
        server: what only the server needs (model reference, streams, hash of the back's weights).
        versions: of the tools that made it.
    """

    profile: str
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    cut_shape: tuple[int, ...]
    optimizer: str
    learning_rate: float
    normalisation: str | None = None
    epsilon: float = 0.0
    perturb_towards: str = "guide"
    noise: float = 0.0
    noise_kind: str = "gaussian"
    frozen: bool = False
    bits: int = 0
    span: tuple[float, float] | None = None
    bound: float = 0.0
    max_batch: int = 256
    input_range: tuple[float, float] | None = None
    interfaces: Mapping[str, Interface] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)
    server: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs that the bundle holds."""
        return (_INFER if self.frozen else _TRAINING) + tuple(name for name in _GUIDE if name in self.interfaces)

    @property
    def decides_alone(self) -> bool:
        """Whether a device can decide without a server: by the perturbation's guide, or by one that only decides."""
        return self.normalisation is not None or _GUIDE[0] in self.interfaces

    @property
    def packing(self) -> Packing | None:
        """How activations are packed, or None where they go as floats.

        Raises:
            ConfigError: ``bits`` and ``span`` are none that can be.
        """
        if not self.bits:
            return None
        return Packing(self.bits) if self.span is None else Packing(self.bits, *self.span)


def document_of(manifest: Manifest, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON document of a bundle.

    Args:
        files: size (``bytes``) and ``sha256`` of each file beside the manifest, by name.
    """
    return {"format": FORMAT, "version": FORMAT_VERSION, **asdict(manifest), "files": dict(files)}


def parse_manifest(document: Mapping[str, Any], source: object) -> Manifest:
    """Read a JSON document whose format and version are right.

    Args:
        source: what errors call the bundle.

    Raises:
        BundleError: something is missing, is of another type or out of range, or contradicts something else.
    """
    try:
        manifest = Manifest(
            profile=_text(document["profile"]),
            input_shape=_shape(document["input_shape"]),
            classes=tuple(_text(name) for name in _list(document["classes"])),
            cut_shape=_shape(document["cut_shape"]),
            optimizer=_text(document["optimizer"]),
            learning_rate=_number(document["learning_rate"]),
            normalisation=None if document["normalisation"] is None else _text(document["normalisation"]),
            epsilon=_number(document["epsilon"]),
            perturb_towards=_text(document["perturb_towards"]),
            noise=_number(document["noise"]),
            noise_kind=_one_of(document["noise_kind"], NOISE_KINDS),
            frozen=_flag(document["frozen"]),
            bits=_one_of(document["bits"], (0, *BITS)),
            span=_span(document["span"]),
            bound=_number(document["bound"]),
            max_batch=_count(document["max_batch"]),
            input_range=_range(document.get("input_range")),
            interfaces=_each(document["interfaces"], parse_interface),
            costs=_each(document["costs"], parse_cost),
            server=_map(document["server"]),
            versions=_map(document["versions"]),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise BundleError(f"{source}: the manifest is incomplete ({_short(exc)}): export the bundle again") from exc
    if len(manifest.classes) < 2:
        raise BundleError(f"{source}: a bundle needs at least two classes: export it again")
    try:
        _ = manifest.packing
    except ConfigError as exc:
        raise BundleError(f"{source}: activations cannot be packed so ({exc}): export the bundle again") from exc
    try:
        _check_graphs(manifest)
    except ValueError as exc:
        raise BundleError(
            f"{source}: its graphs do not fit its shapes ({_short(exc)}): export the bundle again"
        ) from exc
    return manifest


def _check_graphs(manifest: Manifest) -> None:
    """Each graph is described, and takes and gives what the manifest's shapes say."""
    names = set(manifest.graphs)
    if set(manifest.interfaces) != names or set(manifest.costs) != names:
        raise ValueError(f"interfaces and costs are of other graphs than {', '.join(sorted(names))}")
    stated = {"x": manifest.input_shape, "noise": manifest.cut_shape, "gradient": manifest.cut_shape}
    if manifest.normalisation is not None and "guide" in names:
        raise ValueError("there is a guide that perturbs and another that only decides")
    for graph, interface in manifest.interfaces.items():
        inputs = {tensor.name: tensor for tensor in interface.inputs}
        outputs = {tensor.name: tensor for tensor in interface.outputs}
        needed = {"backward": {"gradient", "rate"}, "prepare": set[str]()}.get(graph, {"x"})
        if graph in ("infer", "train"):
            needed |= {"noise"} if manifest.noise else set()
            if "activations" not in outputs:
                raise ValueError(f"{graph} gives no activations")
        if graph == "guide" and [(each.name, each.dtype, each.shape) for each in interface.outputs] != [
            ("guide", "float32", (BATCH_AXIS, len(manifest.classes)))
        ]:
            raise ValueError("guide does not give one float32 logit for each class and no more")
        for name in sorted(needed - inputs.keys()):
            raise ValueError(f"{graph} takes no {name}")
        batched = {name: inputs[name] for name in stated if name in inputs}
        batched |= {name: outputs[name] for name in ("activations",) if name in outputs}
        for name, tensor in batched.items():
            shape = (BATCH_AXIS, *stated.get(name, manifest.cut_shape))
            if tensor.shape != shape or tensor.dtype != "float32":
                raise ValueError(f"{name} of {graph} is {tensor.dtype} {tensor.shape}, not float32 {shape}")


def _short(value: object) -> str:
    return " ".join(str(value).split())[:200]


def _each(value: object, parse: Callable[[object], _Entry]) -> dict[str, _Entry]:
    entries = _map(value)
    if len(entries) > len(_TRAINING + _GUIDE):
        raise ValueError(f"{len(entries)} graphs are more than there are")
    return {name: parse(entry) for name, entry in entries.items()}


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is not a text")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list")
    return value


def _map(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not a map")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is not a number")
    return _exactly(value)


def _exactly(value: int | float) -> float:
    """As a float; an integer that no float says would silently become another number."""
    if float(value) != value:
        raise ValueError(f"{value!r} has more digits than a float64")
    return float(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")
    return value


def _one_of(value: object, choices: tuple[_Choice, ...]) -> _Choice:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    raise ValueError(f"{value!r} is none of {choices}")


def _span(value: object) -> tuple[float, float] | None:
    if value is None:
        return None
    low, high = _list(value)
    if type(low) is not float or type(high) is not float:
        raise ValueError(f"{value!r} is not a span")
    return low, high


def _range(value: object) -> tuple[float, float] | None:
    if value is None:
        return None
    numbers = [each for each in _list(value) if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(numbers) != 2 or len(_list(value)) != 2 or not np.isfinite(numbers).all() or numbers[0] >= numbers[1]:
        raise ValueError(f"{value!r} is not a range")
    return _exactly(numbers[0]), _exactly(numbers[1])


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
        raise ValueError(f"{value!r} is not a count")
    return value


def _shape(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= 4:
        raise ValueError(f"{value!r} is not a shape")
    return tuple(_count(size) for size in value)
