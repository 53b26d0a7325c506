"""What is said: the kinds of messages, and what each must carry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import WireError
from edge_sdk.limits import DEFAULT_LIMITS, Limits

__all__ = ["KINDS", "Kind", "Message", "TensorRule", "check_identity", "check_message", "check_names"]

Array = npt.NDArray[Any]

_MAX_STEP = 2**63 - 1
_MAX_ID = 128  # characters of a run or a session


@dataclass(frozen=True)
class TensorRule:
    """What a tensor of a message must be.

    Attributes:
        dtype: ``float32`` (finite), ``int64`` (not negative) or ``uint8`` (bytes of a file).
        ndim: fewest and most dimensions.
        batched: its first dimension is N, the number of samples, which all such tensors of a message share.
        least: how many tensors of a name with ``*`` there must be.
        packable: it may travel in few bits a value (``packing``).
    """

    dtype: str
    ndim: tuple[int, int]
    batched: bool = True
    least: int = 1
    packable: bool = False


@dataclass(frozen=True)
class Kind:
    """What a message of one kind must carry.

    Attributes:
        direction: ``up`` (device to server) or ``down``.
        required: field name -> type; float accepts an integer, and an integer must not be negative. Other
            fields may be present.
        optional: the same for fields that may be absent.
        tensors: tensor name -> rule. All must be present, and no other may be. A name that ends in ``*``
            stands for the rule's ``least`` tensors or more whose names begin so.
    """

    direction: str
    required: Mapping[str, type] = field(default_factory=dict)
    optional: Mapping[str, type] = field(default_factory=dict)
    tensors: Mapping[str, TensorRule] = field(default_factory=dict)


_FEATURES = TensorRule("float32", (2, 6))
_ACTIVATIONS = TensorRule("float32", (2, 6), packable=True)
_CLASSES = TensorRule("int64", (1, 1))
_FRONT = TensorRule("float32", (0, 6), batched=False, least=0)
_BYTES = TensorRule("uint8", (1, 1), batched=False)

KINDS: Mapping[str, Kind] = {
    "train": Kind("up", {"front": int}, {"samples": int}, {"activations": _ACTIVATIONS, "labels": _CLASSES}),
    "store": Kind(
        "up",
        {"front": int, "first": int, "total": int},
        tensors={"activations": _ACTIVATIONS, "labels": _CLASSES},
    ),
    "front": Kind("up", {"front": int}, {"samples": int}, {"*": _FRONT}),
    "infer": Kind("up", {"front": int}, tensors={"activations": _ACTIVATIONS}),
    "fetch": Kind("up", {"bundle": str, "first": int, "most": int}),
    "state": Kind(
        "up",
        {"status": str, "manifest": str},
        {
            "versions": dict,
            "speaks": list,
            "update": str,
            "round": int,
            "bytes_per_sample": float,
            "evaluation": dict,
            "clean": dict,
        },
    ),
    "gradient": Kind(
        "down",
        {"front": int, "rate": float, "loss": float, "round": int},
        {"synchronise": bool},
        {"gradient": _FEATURES},
    ),
    "stored": Kind("down", {"samples": int}),
    "synchronised": Kind("down", {"front": int, "round": int}, tensors={"*": _FRONT}),
    "decision": Kind(
        "down",
        optional={"front": int},
        tensors={"probabilities": TensorRule("float32", (2, 2)), "class.*": _CLASSES},
    ),
    "part": Kind("down", {"bundle": str, "first": int, "total": int}, tensors={"part": _BYTES}),
    "refused": Kind("down", {"reason": str}, {"detail": str}),
    "missing": Kind("down", {"chunks": list}),
    "model": Kind(
        "down",
        {"bundle": str, "status": str, "rounds": int, "evaluate_every": int, "batch": int},
        {"round": int, "front": int, "fronts": str, "server": str, "speaks": list, "versions": dict},
    ),
}


@dataclass(frozen=True, eq=False, repr=False)
class Message:
    """One message; (run, session, step) is what it is about.

    Attributes:
        kind: a key of ``KINDS``.
        run: id of the training run, printable ASCII, 0-128 characters.
        session: id of one life of the device's database, printable ASCII, 0-128 characters.
        step: counts up within the session, 0 to 2^63-1.
        fields: plain data: text, numbers, booleans, None, and lists and maps of these.
        tensors: name -> array, as ``KINDS`` demands. Decoded arrays are read-only.
    """

    kind: str
    run: str
    session: str
    step: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Array] = field(default_factory=dict)

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        """Equal in everything, tensors element by element (dtype, shape and values)."""
        if not isinstance(other, Message):
            return NotImplemented
        return (
            (self.kind, self.run, self.session, self.step) == (other.kind, other.run, other.session, other.step)
            and self.fields == other.fields
            and self.tensors.keys() == other.tensors.keys()
            and all(
                mine.dtype == other.tensors[name].dtype and np.array_equal(mine, other.tensors[name])
                for name, mine in self.tensors.items()
            )
        )

    def __repr__(self) -> str:
        """One line; tensors by dtype and shape, long fields cut."""
        fields = ", ".join(f"{name}={_short(value)}" for name, value in self.fields.items())
        tensors = ", ".join(f"{name}={array.dtype}{list(array.shape)}" for name, array in self.tensors.items())
        identity = f"{self.kind!r}, run={self.run!r}, session={self.session!r}, step={self.step}"
        return f"Message({identity}, fields=({fields}), tensors=({tensors}))"


def check_identity(kind: object, run: object, session: object, step: object) -> tuple[str, str, str, int]:
    """Return the four if they can head a message.

    Raises:
        WireError: reason ``kind`` or ``schema``.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise WireError("kind", f"unknown message kind {_short(kind)}: this side knows {', '.join(KINDS)}")
    if not _is_id(run) or not _is_id(session):
        raise WireError("schema", f"run and session of {kind!r} must be printable ASCII, at most {_MAX_ID} characters")
    if type(step) is not int or not 0 <= step <= _MAX_STEP:
        raise WireError("schema", f"step of {kind!r} must be an integer from 0 to 2^63-1")
    return kind, str(run), str(session), step


def check_message(message: Message, limits: Limits = DEFAULT_LIMITS) -> Message:
    """Return the message with its fields as plain data, if ``KINDS`` and ``limits`` allow it.

    Raises:
        WireError: reasons ``kind``, ``schema``, ``limit``, ``dtype``, ``shape``, ``nonfinite``, ``range``.
    """
    identity = check_identity(message.kind, message.run, message.session, message.step)
    rules = KINDS[message.kind]
    fields = _plain(message.fields, limits.max_depth)
    if not isinstance(fields, dict):
        raise WireError("schema", f"fields of {message.kind!r} must be a map")
    for name, expected in {**rules.required, **rules.optional}.items():
        if name in fields:
            fields[name] = _field(message.kind, name, fields[name], expected)
        elif name in rules.required:
            raise WireError("schema", f"a {message.kind!r} message needs the field {name!r}")
    if message.kind == "missing":
        _check_chunk_list(fields["chunks"], limits)
    _check_tensors(message.kind, message.tensors, limits)
    return Message(*identity, fields, dict(message.tensors))


def check_names(kind: str, present: Mapping[str, object], limits: Limits = DEFAULT_LIMITS) -> None:
    """Check the names of a message's tensors, before any of them is built.

    Raises:
        WireError: reason ``schema`` (one is missing or unknown) or ``limit``.
    """
    rules = KINDS[kind].tensors
    if len(present) > limits.max_tensors:
        raise WireError("limit", f"{len(present)} tensors are above max_tensors={limits.max_tensors}")
    for name in present:
        if not isinstance(name, str) or _rule(rules, name) is None:
            raise WireError("schema", f"a {kind!r} message has no tensor {_short(name)}: it has {list(rules)}")
    for pattern, rule in rules.items():
        if sum(_rule({pattern: rule}, name) is not None for name in present) < rule.least:
            raise WireError("schema", f"a {kind!r} message needs the tensor {pattern!r}")


def _is_id(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_ID and value.isascii() and value.isprintable()


def _short(value: object) -> str:
    if isinstance(value, (list, dict, tuple)):
        return f"<{type(value).__name__} of {len(value)}>"
    shown = repr(value[:61] if isinstance(value, (str, bytes)) else value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _plain(value: object, depth: int) -> object:
    """Copy plain data; numpy scalars become Python's, tuples lists."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise WireError("schema", "an integer field is beyond 64 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise WireError("nonfinite", "a field holds NaN or infinity")
        return float(value)
    if depth <= 0:
        raise WireError("limit", "fields are nested too deep")
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth - 1) for item in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise WireError("schema", "the keys of a map in the fields must be text")
        return {str(key): _plain(item, depth - 1) for key, item in value.items()}
    raise WireError("schema", f"a field holds a {type(value).__name__}: use text, numbers, booleans, lists and maps")


def _field(kind: str, name: str, value: object, expected: type) -> object:
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise WireError("schema", f"field {name!r} of {kind!r} must be {expected.__name__}, not {_short(value)}")
    if isinstance(value, int) and value < 0:
        raise WireError("range", f"field {name!r} of {kind!r} is negative")
    return value


def _check_chunk_list(chunks: object, limits: Limits) -> None:
    if not isinstance(chunks, list) or not 0 < len(chunks) <= limits.max_chunks:
        raise WireError("schema", "'chunks' of 'missing' must list at least one chunk and at most max_chunks")
    if not all(type(index) is int and 0 <= index < limits.max_chunks for index in chunks):
        raise WireError("range", "'chunks' of 'missing' must hold chunk numbers, counted from 0")


def _rule(rules: Mapping[str, TensorRule], name: str) -> TensorRule | None:
    for pattern, rule in rules.items():
        if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1]) and len(name) >= len(pattern)):
            return rule
    return None


def _check_tensors(kind: str, tensors: Mapping[str, Array], limits: Limits) -> None:
    check_names(kind, tensors, limits)
    batch: int | None = None
    for name, array in tensors.items():
        rule = _rule(KINDS[kind].tensors, name)
        if rule is None or not isinstance(array, np.ndarray) or array.dtype != np.dtype(rule.dtype):
            wanted = rule.dtype if rule else "absent"
            found = getattr(array, "dtype", type(array).__name__)
            raise WireError("dtype", f"tensor {name!r} of {kind!r} is {found}: make it a {wanted} array")
        low, high = rule.ndim
        if not low <= array.ndim <= high or not array.size:
            raise WireError(
                "shape",
                f"tensor {name!r} of {kind!r} has shape {array.shape}: {low}-{high} dimensions, none 0",
            )
        if array.ndim > limits.max_dims or array.size > limits.max_elements:
            raise WireError("limit", f"tensor {name!r} of shape {array.shape} is above max_dims or max_elements")
        if rule.batched:
            batch = array.shape[0] if batch is None else batch
        if rule.batched and array.shape[0] != batch:
            raise WireError("shape", f"tensors of {kind!r} differ in batch size: {batch} and {array.shape[0]}")
        if rule.dtype == "float32" and not np.isfinite(array).all():
            raise WireError("nonfinite", f"tensor {name!r} of {kind!r} holds NaN or infinity")
        if rule.dtype == "int64" and array.min() < 0:
            raise WireError("range", f"tensor {name!r} of {kind!r} holds a negative class")
    if kind == "decision":
        classes = tensors["probabilities"].shape[1]
        for name, array in tensors.items():
            if name != "probabilities" and array.max() >= classes:
                raise WireError("range", f"tensor {name!r} of 'decision' holds a class of {classes} or above")
