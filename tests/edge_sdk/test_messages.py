from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_sdk.errors import WireError
from edge_sdk.limits import Limits
from edge_sdk.messages import KINDS, Message, TensorRule, check_message

ACTIVATIONS = np.linspace(0, 1, 2 * 3 * 4 * 4, dtype=np.float32).reshape(2, 3, 4, 4)
LABELS = np.array([0, 4])
PROBABILITIES = np.array([[0.25, 0.75], [1.0, 0.0]], np.float32)
FRONT = {
    "p.conv.weight": ACTIVATIONS,
    "b.norm.mean": np.zeros(3, np.float32),
    "s.steps": np.array(7, np.float32),
}
VALID: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "train": ({"front": 3}, {"activations": ACTIVATIONS, "labels": LABELS}),
    "store": ({"front": 0, "first": 0, "total": 5000}, {"activations": ACTIVATIONS, "labels": LABELS}),
    "front": ({"front": 3, "samples": 700}, FRONT),
    "infer": ({"front": 3}, {"activations": ACTIVATIONS}),
    "fetch": ({"bundle": "ab12", "first": 0, "most": 61440}, {}),
    "state": ({"status": "online", "manifest": "ab12", "versions": {"wire": 1}}, {}),
    "gradient": ({"front": 3, "rate": 0.01, "loss": 2.5, "round": 4}, {"gradient": ACTIVATIONS}),
    "stored": ({"samples": 2}, {}),
    "synchronised": ({"front": 4, "round": 40}, FRONT),
    "decision": ({}, {"probabilities": PROBABILITIES, "class.fused": np.array([1, 0])}),
    "refused": ({"reason": "run"}, {}),
    "part": ({"bundle": "ab12", "first": 0, "total": 3}, {"part": np.arange(3, dtype=np.uint8)}),
    "missing": ({"chunks": [0, 2]}, {}),
    "model": (
        {"bundle": "ab12", "front": 0, "rounds": 20, "evaluate_every": 5, "batch": 32, "status": "open"},
        {},
    ),
}


def message(kind: str, fields: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> Message:
    default_fields, default_tensors = VALID[kind]
    return Message(
        kind,
        "run",
        "session",
        7,
        default_fields if fields is None else fields,
        default_tensors if tensors is None else tensors,
    )


def refusal(bad: Message, limits: Limits | None = None) -> str:
    with pytest.raises(WireError) as caught:
        check_message(bad, limits or Limits())
    assert "\n" not in str(caught.value)
    return caught.value.reason


def without(mapping: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}


def test_every_kind_has_a_valid_example() -> None:
    assert VALID.keys() == KINDS.keys()
    for kind in KINDS:
        assert check_message(message(kind)) == message(kind)


@pytest.mark.parametrize("kind", list(KINDS))
def test_required_fields_and_tensors_are_required(kind: str) -> None:
    fields, tensors = VALID[kind]
    for name in KINDS[kind].required:
        assert refusal(message(kind, without(fields, name))) == "schema"
    for name in KINDS[kind].optional:
        check_message(message(kind, without(fields, name)))
    for name in tensors:
        if KINDS[kind].tensors.get("*", TensorRule("float32", (0, 0))).least:
            assert refusal(message(kind, tensors=without(tensors, name))) == "schema"
        else:
            check_message(message(kind, tensors=without(tensors, name)))


@pytest.mark.parametrize("kind", list(KINDS))
def test_unknown_fields_pass_and_unknown_tensors_do_not(kind: str) -> None:
    fields, tensors = VALID[kind]
    later = check_message(message(kind, {**fields, "later": [1, {"a": None}]}))
    assert later.fields["later"] == [1, {"a": None}]
    extra = {"": LABELS} if "*" in KINDS[kind].tensors else {"extra": LABELS}
    assert refusal(message(kind, tensors={**tensors, **extra})) == "schema"
    if kind == "decision":
        assert refusal(message(kind, tensors={**tensors, "class.": LABELS})) == "schema"


@pytest.mark.parametrize("kind", ["front", "synchronised"])
def test_a_front_has_any_tensors_or_none(kind: str) -> None:
    check_message(message(kind, tensors={}))
    six = np.zeros((1, 2, 1, 2, 1, 2), np.float32)
    for array in (np.array(7, np.float32), np.zeros(5, np.float32), six):
        check_message(message(kind, tensors={"p.a": array, "p.b": ACTIVATIONS}))
    for array, reason in (
        (six[None], "shape"),
        (np.zeros(0, np.float32), "shape"),
        (np.array(7), "dtype"),
        (np.float32(7), "dtype"),
        (np.array(np.nan, np.float32), "nonfinite"),
    ):
        assert refusal(message(kind, tensors={"p.a": array})) == reason
    many = {f"p.{i}": np.zeros(1, np.float32) for i in range(3)}
    assert refusal(message(kind, tensors=many), Limits(max_tensors=2)) == "limit"


def test_only_batched_tensors_share_their_first_dimension() -> None:
    check_message(message("front", tensors={"p.a": np.zeros(2, np.float32), "p.b": np.zeros(3, np.float32)}))
    for kind in ("train", "store"):
        assert refusal(message(kind, tensors={"activations": ACTIVATIONS, "labels": LABELS[:1]})) == "shape"


@pytest.mark.parametrize("kind", list(KINDS))
def test_known_fields_have_their_type(kind: str) -> None:
    fields, _ = VALID[kind]
    rules = {**KINDS[kind].required, **KINDS[kind].optional}
    samples: list[Any] = ["a", 1, 1.5, True, None, [0], {"a": 1}]
    for name, expected in rules.items():
        for sample in samples:
            if type(sample) is expected or (expected is float and type(sample) is int):
                check_message(message(kind, {**fields, name: sample}))
            else:
                assert refusal(message(kind, {**fields, name: sample})) == "schema", (name, sample)
        if expected is int:
            assert refusal(message(kind, {**fields, name: -1})) == "range"
        if expected is float:
            for value in (float("nan"), float("inf"), -float("inf"), np.float32("nan")):
                assert refusal(message(kind, {**fields, name: value})) == "nonfinite"


def test_numpy_scalars_and_tuples_become_plain() -> None:
    fields = {
        "front": np.int64(3),
        "rate": np.float32(0.5),
        "loss": 2,
        "round": 1,
        "more": (np.bool_(True), 1),
    }
    plain = check_message(message("gradient", fields)).fields
    assert plain == {"front": 3, "rate": 0.5, "loss": 2.0, "round": 1, "more": [True, 1]}
    assert [type(value) for value in plain.values()] == [int, float, float, int, list]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"bytes", "schema"),
        (2**63, "schema"),
        (-(2**63) - 1, "schema"),
        ({1: "a"}, "schema"),
        ({"a": {b"b": 1}}, "schema"),
        (np.zeros(2), "schema"),
        (object(), "schema"),
        ({1, 2}, "schema"),
        (1 + 2j, "schema"),
        ([float("nan")], "nonfinite"),
    ],
)
def test_fields_hold_plain_data_alone(value: Any, reason: str) -> None:
    assert refusal(message("state", {"status": "online", "more": value})) == reason


def test_a_field_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert refusal(message("state", {"status": "online", "more": loop})) == "limit"


@pytest.mark.parametrize("chunks", [[], list(range(5000)), [True], ["0"], [-1], [4096], [1.0]])
def test_a_chunk_list_is_checked(chunks: list[Any]) -> None:
    assert refusal(message("missing", {"chunks": chunks})) in {"schema", "range"}


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("activations", ACTIVATIONS.astype(np.float64), "dtype"),
        ("activations", ACTIVATIONS.astype(np.float16), "dtype"),
        ("activations", ACTIVATIONS.astype(np.int64), "dtype"),
        ("activations", ACTIVATIONS.astype(">f4"), "dtype"),
        ("activations", ACTIVATIONS.tolist(), "dtype"),
        ("activations", ACTIVATIONS.reshape(-1)[:2], "shape"),
        ("activations", ACTIVATIONS.reshape(2, 1, 1, 1, 1, 1, -1), "shape"),
        ("activations", ACTIVATIONS[:, :0], "shape"),
        ("activations", ACTIVATIONS[:1], "shape"),
        ("activations", np.where(ACTIVATIONS > 0.5, np.float32("nan"), ACTIVATIONS), "nonfinite"),
        ("activations", np.where(ACTIVATIONS > 0.5, np.float32("inf"), ACTIVATIONS), "nonfinite"),
        ("activations", np.where(ACTIVATIONS > 0.5, -np.float32("inf"), ACTIVATIONS), "nonfinite"),
        ("labels", LABELS.astype(np.int32), "dtype"),
        ("labels", LABELS.astype(np.uint64), "dtype"),
        ("labels", LABELS.astype(np.float32), "dtype"),
        ("labels", LABELS[:, None], "shape"),
        ("labels", np.array([0, 1, 2]), "shape"),
        ("labels", np.array([0, -1]), "range"),
    ],
)
def test_tensors_are_checked(name: str, array: Any, reason: str) -> None:
    assert refusal(message("train", tensors={**VALID["train"][1], name: array})) == reason


def test_a_part_is_bytes() -> None:
    data = np.arange(4, dtype=np.uint8)
    for array, reason in ((data.astype(np.int64), "dtype"), (data[None], "shape"), (data[:0], "shape")):
        assert refusal(message("part", tensors={"part": array})) == reason
    assert refusal(message("part", tensors={"part": data}), Limits(max_elements=3)) == "limit"


def test_tensors_are_bounded() -> None:
    assert refusal(message("train"), Limits(max_elements=ACTIVATIONS.size - 1)) == "limit"
    assert refusal(message("train"), Limits(max_dims=3)) == "limit"
    assert refusal(message("train"), Limits(max_tensors=1)) == "limit"
    check_message(message("train"), Limits(max_elements=ACTIVATIONS.size, max_dims=4, max_tensors=2))


def test_a_decision_names_classes_that_have_a_probability() -> None:
    good = {**VALID["decision"][1], "class.attacked": np.array([0, 1])}
    check_message(message("decision", tensors=good))
    assert refusal(message("decision", tensors={**good, "class.attacked": np.array([0, 2])})) == "range"
    assert refusal(message("decision", tensors={"probabilities": PROBABILITIES})) == "schema"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "pickle"}, "kind"),
        ({"kind": 3}, "kind"),
        ({"kind": ["train"]}, "kind"),
        ({"run": "a\nb"}, "schema"),
        ({"run": "a" * 129}, "schema"),
        ({"run": "ä"}, "schema"),
        ({"run": b"run"}, "schema"),
        ({"session": None}, "schema"),
        ({"session": "\x1b[2J"}, "schema"),
        ({"step": -1}, "schema"),
        ({"step": 2**63}, "schema"),
        ({"step": 1.0}, "schema"),
        ({"step": True}, "schema"),
        ({"fields": [1]}, "schema"),
    ],
)
def test_identity_is_checked(change: dict[str, Any], reason: str) -> None:
    values = {"kind": "refused", "run": "r", "session": "s", "step": 0, "fields": {"reason": "run"}, **change}
    assert refusal(Message(**values)) == reason


def test_repr_shows_no_data() -> None:
    big = Message(
        "train",
        "run",
        "session",
        7,
        {"front": 3, "note": "x" * 10_000, "list": list(range(10_000))},
        {"activations": np.zeros((64, 32, 14, 14), np.float32), "labels": np.arange(64)},
    )
    shown = repr(big)
    assert len(shown) < 400
    assert "\n" not in shown
    assert "activations=float32[64, 32, 14, 14]" in shown
    assert "front=3" in shown


def test_equality_looks_into_tensors() -> None:
    first, second = (
        message("train"),
        message("train", tensors={k: v.copy() for k, v in VALID["train"][1].items()}),
    )
    assert first == second
    other = ACTIVATIONS.copy()
    other[0, 0, 0, 0] += 1
    for tensors in (
        {"activations": other, "labels": LABELS},
        {"activations": ACTIVATIONS.astype(np.float64), "labels": LABELS},
        {"activations": ACTIVATIONS.reshape(2, -1), "labels": LABELS},
        {"activations": ACTIVATIONS},
    ):
        assert first != message("train", tensors=tensors)
    assert first != message("train", {"front": 4})
    assert first != Message("train", "run", "session", 8, *VALID["train"])
    assert first != "train"
    with pytest.raises(TypeError):
        hash(first)
