"""What was recorded at export is computed here too, or it is said what is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from edge_sdk.bundle import Bundle
from edge_sdk.errors import BundleError, ConfigError, WireError
from edge_sdk.interface import DTYPES
from edge_sdk.vectors import MOST_VALUES, pack_vectors, thinned, unpack_vectors
from edge_sdk.verification import TOLERANCE, verify


def changed(bundle: Bundle, graph: str, change: Any) -> Bundle:
    model = onnx.load_from_string(bundle.graphs[graph])
    change(model)
    return replace(bundle, graphs={**bundle.graphs, graph: model.SerializeToString()})


@pytest.mark.parametrize("profile", ["paper", "hardened", "vanilla", "gaussian"])
def test_every_profile_verifies(profile: str, built: dict[str, Any]) -> None:
    found = verify(built[profile].bundle, runs=3)
    assert found.passed and found.tolerance == TOLERANCE and found.bundle == built[profile].bundle.id
    assert {check.graph for check in found.checks} == set(built[profile].bundle.graphs)
    for check in found.checks:
        assert check.batch == 2 and 0 < check.median_ms <= check.p95_ms
        assert (check.worst_error is None) == (check.graph == "prepare")


@pytest.mark.parametrize("name", ["p.conv1.weight", "p.bn2.bias", "b.bn1.running_var"])
def test_a_front_that_differs_by_a_hundredth_is_found(name: str, built: dict[str, Any]) -> None:
    bundle = built["paper"].bundle
    off = {**bundle.initial, name: bundle.initial[name] + np.float32(0.01)}
    found = verify(replace(bundle, initial=off), runs=1)
    assert not found.passed
    assert not next(check for check in found.checks if check.graph == "infer").passed


def test_a_backward_pass_that_differs_is_found(built: dict[str, Any]) -> None:
    bundle = built["vanilla"].bundle
    parity = {**bundle.parity, "given.gradient": bundle.parity["given.gradient"] * np.float32(1.01)}
    found = {check.graph: check for check in verify(replace(bundle, parity=parity), runs=1).checks}
    assert found["train"].passed and not found["backward"].passed


def test_what_is_not_a_number_is_a_failure(built: dict[str, Any]) -> None:
    bundle = built["hardened"].bundle
    off = {**bundle.initial, "p.code.weight": bundle.initial["p.code.weight"] * np.float32(np.nan)}
    found = verify(replace(bundle, initial=off), runs=1)
    assert not found.passed and found.checks[0].worst_error == 1e30, "JSON has no infinity"


def test_vectors_that_do_not_fit(built: dict[str, Any]) -> None:
    bundle = built["hardened"].bundle
    for parity, words in (
        ({"infer.activations": np.ones(3, np.float32)}, "lack 'x'"),
        ({**bundle.parity, "infer.activations": np.ones(3, np.float32)}, "'infer.activations' fits no output"),
        ({**bundle.parity, "infer.more": np.ones(3, np.float32)}, "'infer.more' fits no output"),
        ({**bundle.parity, "given.x": np.ones((2, 1, 4, 4), np.float32)}, "fails in the bundle's 'infer' graph"),
    ):
        with pytest.raises(BundleError, match=words):
            verify(replace(bundle, parity=parity), runs=1)
    with pytest.raises(ConfigError, match="at least once"):
        verify(bundle, runs=0)


def test_another_onnxruntime_is_told_from_a_damaged_bundle(built: dict[str, Any]) -> None:
    bundle = built["hardened"].bundle
    stated = bundle.manifest.interfaces["infer"]
    newer = changed(bundle, "infer", lambda model: setattr(model.opset_import[0], "version", 60))
    with pytest.raises(BundleError, match="another opset than 18, which its manifest says"):
        verify(newer)
    said = replace(newer.manifest, interfaces={"infer": replace(stated, opset=60)})
    with pytest.raises(BundleError, match=r"exported for opset 60, this onnxruntime knows them up to \d+: upgrade"):
        verify(replace(newer, manifest=said))
    unknown = changed(bundle, "infer", lambda model: setattr(model.graph.node[0], "op_type", "Frobnicate"))
    with pytest.raises(BundleError, match="no operator Frobnicate: upgrade onnxruntime"):
        verify(unknown)


def outside(model: onnx.ModelProto) -> None:
    """A weight that lies in a file."""
    tensor = model.graph.initializer.add(name="w", data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="../../etc/hostname")


def deep_outside(model: onnx.ModelProto) -> None:
    """The same, hidden in a branch of a node."""
    inner = onnx.GraphProto(name="g")
    inner.initializer.add(name="w", data_type=1, dims=[1], data_location=1).external_data.add(key="location", value="x")
    node = model.graph.node.add(op_type="If")
    node.attribute.append(onnx.helper.make_attribute("then_branch", inner))


def own_operator(model: onnx.ModelProto) -> None:
    model.opset_import.add(domain="com.example", version=1)


def renamed(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = model.graph.node[-1].output[0] = "other"


def retyped(model: onnx.ModelProto) -> None:
    next(one for one in model.graph.input if one.name == "x").type.tensor_type.shape.dim[1].dim_value = 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (outside, "wants to read another file: do not use it"),
        (deep_outside, "wants to read another file: do not use it"),
        (own_operator, "operators of its own: do not use it"),
        (renamed, "other outputs than its manifest says"),
        (retyped, "cannot run|input 'x' of another type or shape"),
    ],
)
def test_a_graph_that_is_not_as_the_manifest_says(change: Any, words: str, built: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=words):
        verify(changed(built["hardened"].bundle, "infer", change))


def test_vectors_come_back_and_are_checked() -> None:
    given = {"given.x": np.zeros((2, 3), np.float32), "given.rate": np.array(1, np.float32)}
    whole = {**given, "infer.y": np.arange(4, dtype=np.float32)}
    back = unpack_vectors(pack_vectors(whole))
    assert back.keys() == whole.keys() and back["given.rate"].shape == ()
    for wrong, words in (
        (given, "nothing that a graph gave"),
        ({**whole, "other.y": np.ones(1, np.float32)}, "no parity vector"),
        ({**whole, "infer.": np.ones(1, np.float32)}, "no parity vector"),
        ({**whole, "infer.z": np.array([np.inf], np.float32)}, "not finite"),
    ):
        with pytest.raises(WireError, match=words):
            unpack_vectors(pack_vectors(wrong))


def test_large_outputs_are_thinned_evenly() -> None:
    array = np.arange(MOST_VALUES * 3).reshape(3, -1)
    assert thinned(array).tolist() == list(range(0, MOST_VALUES * 3, 3))
    assert thinned(array[:1]) is not array and thinned(array[:1]).shape == (1, MOST_VALUES)


def test_types_are_named_as_onnxruntime_names_them() -> None:
    assert DTYPES["float32"] == "tensor(float)" and DTYPES["int64"] == "tensor(int64)"
