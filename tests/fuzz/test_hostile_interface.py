"""What a manifest says of graphs, and ONNX files that somebody made to harm: refused, or kept as they are."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edge_sdk.bundle import Bundle, Manifest, load_bundle, write_bundle
from edge_sdk.codec import pack_tensors
from edge_sdk.errors import BundleError
from edge_sdk.interface import DTYPES, Interface, TensorType, check_file, parse_cost, parse_interface
from edge_sdk.manifest import document_of, parse_manifest
from tests.fuzz.seeds import described

MANIFEST = described(Manifest("paper", (1, 8, 8), ("a", "b"), (4, 2, 2), "sgd", 0.1, noise=1.0))
DOCUMENT = json.loads(json.dumps(document_of(MANIFEST, {})))
GRAPHS = tuple(DOCUMENT["interfaces"])
PARITY = pack_tensors({"infer.activations": np.ones((2, 4, 2, 2), np.float32)})
INITIAL = pack_tensors({"p.w": np.ones((2, 2), np.float32)})

in_one_folder = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


def parsed(document: dict[str, Any]) -> Manifest | None:
    """The manifest, or None where it is refused in one line."""
    try:
        return parse_manifest(document, "net.psgl")
    except BundleError as exc:
        assert str(exc).isprintable() and len(str(exc)) < 1000 and "export the bundle again" in str(exc)
        return None


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


PLACES = [place for field in ("interfaces", "costs") for place in places(DOCUMENT[field], (field,))]


def put(document: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed: Any = json.loads(json.dumps(document))
    target = changed
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return dict(changed)


def test_the_manifest_that_is_changed_here_is_valid() -> None:
    assert parsed(DOCUMENT) == MANIFEST


@given(st.sampled_from(PLACES), JSON)
@example(("interfaces", "infer", "inputs", 0, "shape"), ["N", 1, 8, 9])
@example(("interfaces", "infer", "inputs", 0, "shape"), ["N", 1, 8, 8.0])
@example(("interfaces", "infer", "inputs", 0, "shape"), [True, 1, 8, 8])
@example(("interfaces", "infer", "inputs", 0, "dtype"), "int64")
@example(("interfaces", "infer", "inputs", 0, "dtype"), ["float32"])
@example(("interfaces", "infer", "opset"), True)
@example(("interfaces", "infer", "opset"), 10**30)
@example(("interfaces", "infer", "inputs", 0, "name"), "noise")
@example(("costs", "infer", "macs"), -1)
@example(("costs", "infer", "macs"), 10**400)
@settings(deadline=None, max_examples=400)
def test_any_value_anywhere_is_refused_or_kept(place: tuple[Any, ...], value: Any) -> None:
    document = put(DOCUMENT, place, value)
    manifest = parsed(document)
    if manifest is not None:
        assert json.loads(json.dumps(asdict(manifest)))[place[0]] == document[place[0]]


@given(st.sampled_from(PLACES), st.booleans())
@settings(deadline=None, max_examples=200)
def test_a_part_that_is_missing_or_too_many_is_refused(place: tuple[Any, ...], more: bool) -> None:
    *above, last = place
    changed: Any = json.loads(json.dumps(DOCUMENT))
    target = changed
    for key in above:
        target = target[key]
    if more and isinstance(target[last], dict):
        target[last]["more"] = target[last].get("infer", 1)
    elif isinstance(target, dict):
        del target[last]
    else:
        return
    assert parsed(changed) is None


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("interfaces", "infer", "inputs", 0, "shape"), ["N", 1, 4, 4], "x of infer is float32"),
        (("interfaces", "train", "outputs", 0, "shape"), ["N", 4], "activations of train is float32"),
        (("interfaces", "infer", "outputs", 0, "name"), "other", "infer gives no activations"),
        (("interfaces", "train", "inputs", 1, "name"), "other", "train takes no noise"),
        (("interfaces", "backward", "inputs", 1, "name"), "other", "backward takes no rate"),
        (("interfaces", "backward", "inputs", 0, "dtype"), "float64", "gradient of backward is float64"),
        (("interfaces", "infer", "opset"), 12, "opset 12 is not one of 13 to 99"),
        (("interfaces", "infer", "inputs", 0, "dtype"), "complex64", "dtype 'complex64' of 'x' is none of"),
        (("interfaces", "infer", "inputs", 0, "shape"), [1, "N", 8, 8], "'N' of 'x' is not an extent"),
        (("interfaces", "infer", "inputs", 0, "shape"), ["N", None, 8, 8], "None of 'x' is not an extent"),
        (("interfaces", "infer", "inputs"), [], "not a list of tensors"),
        (("costs", "infer", "macs"), 1.5, "macs 1.5 is not a number of something"),
        (("costs",), {}, "of other graphs than"),
    ],
)
def test_what_the_refusal_says(place: tuple[Any, ...], value: Any, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        parse_manifest(put(DOCUMENT, place, value), "net.psgl")


def saved(folder: Path, manifest: Manifest, **files: bytes) -> Bundle:
    named = {name.replace("_", "."): data for name, data in files.items()}
    graphs = {f"{name}.onnx": b"graph" for name in GRAPHS}
    whole = {"initial.cbor": INITIAL, "parity.cbor": PARITY, **graphs, **named}
    write_bundle(folder / "net.psgl", manifest, whole)
    return load_bundle(folder / "net.psgl")


def test_initial_tensors_must_be_those_that_the_graphs_take(tmp_path: Path) -> None:
    weight = TensorType("p.w", "float32", (2, 2))
    infer = MANIFEST.interfaces["infer"]
    taking = replace(infer, inputs=(*infer.inputs, weight))
    manifest = replace(MANIFEST, interfaces={**MANIFEST.interfaces, "infer": taking})
    assert saved(tmp_path, manifest).initial["p.w"].shape == (2, 2)
    for tensors in ({"p.w": np.ones((2, 3), np.float32)}, {"p.v": np.ones((2, 2), np.float32)}):
        with pytest.raises(BundleError, match=r"initial\.cbor has no 'p\.w' of the shape that its graphs take"):
            saved(tmp_path, manifest, initial_cbor=pack_tensors(tensors))


@given(st.binary(max_size=200))
@in_one_folder
def test_any_bytes_as_parity_vectors_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(BundleError, match=r"parity\.cbor is not readable") as caught:
        saved(tmp_path, MANIFEST, parity_cbor=data)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


# ---------------------------------------------------------------- ONNX files


def model() -> onnx.ModelProto:
    make = onnx.helper
    value = make.make_tensor_value_info
    inner = make.make_graph([make.make_node("Identity", ["w"], ["t"])], "inner", [], [value("t", 1, [2])])
    branch = make.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner, name="choice")
    weight = onnx.numpy_helper.from_array(np.ones(2, np.float32), "w")
    outer = make.make_graph([branch], "outer", [value("c", 9, [])], [value("y", 1, [2])], [weight])
    return make.make_model(outer, opset_imports=[make.make_opsetid("", 18)], ir_version=10)


STATED = Interface(18, (), ())


def external(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret")


def hide(where: str) -> onnx.ModelProto:
    """A weight in another file, wherever ONNX has a place for weights."""
    made = model()
    tensor = onnx.numpy_helper.from_array(np.ones(2, np.float32), "hidden")
    external(tensor)
    branch = made.graph.node[0].attribute[0].g
    if where == "initializer":
        made.graph.initializer.append(tensor)
    elif where == "branch":
        branch.initializer.append(tensor)
    elif where == "constant":
        branch.node.append(onnx.helper.make_node("Constant", [], ["k"], value=tensor))
    elif where == "tensors":
        made.graph.node[0].attribute.add(name="ts", type=onnx.AttributeProto.TENSORS).tensors.append(tensor)
    elif where == "graphs":
        made.graph.node[0].attribute.add(name="gs", type=onnx.AttributeProto.GRAPHS).graphs.add().initializer.append(
            tensor
        )
    elif where == "sparse":
        made.graph.sparse_initializer.add().values.CopyFrom(tensor)
    else:
        made.graph.node[0].attribute.add(
            name="s", type=onnx.AttributeProto.SPARSE_TENSOR
        ).sparse_tensor.indices.CopyFrom(tensor)
    return made


def test_an_honest_file_passes() -> None:
    check_file("infer", model().SerializeToString(), STATED)


@pytest.mark.parametrize(
    "where", ["initializer", "branch", "constant", "tensors", "graphs", "sparse", "sparse attribute"]
)
def test_a_weight_in_another_file_is_found_wherever_it_hides(where: str) -> None:
    with pytest.raises(BundleError, match="wants to read another file: do not use it"):
        check_file("infer", hide(where).SerializeToString(), STATED)


def test_a_field_number_in_a_longer_form_does_not_hide_it() -> None:
    """Protobuf takes any integer with leading zeros: 0x8A 0x00 is 0x0A."""
    made = model()
    weight = made.graph.initializer[0]
    external(weight)
    plain = weight.SerializeToString()
    (entry,) = weight.external_data
    inner = entry.SerializeToString()
    key = bytes([13 << 3 | 2, len(inner)])
    assert key + inner in plain
    longer = plain.replace(key + inner, bytes([13 << 3 | 2 | 0x80, 0x80, 0x00, len(inner) | 0x80, 0x00]) + inner)
    assert onnx.TensorProto.FromString(longer) == weight
    bare = model()
    del bare.graph.initializer[:]
    graph = bare.graph.SerializeToString() + bytes([5 << 3 | 2, len(longer)]) + longer
    data = bare.SerializeToString() + bytes([7 << 3 | 2, len(graph) & 127 | 128, len(graph) >> 7]) + graph
    with pytest.raises(BundleError, match="another file"):
        check_file("infer", data, STATED)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made: made.opset_import.add(domain="com.example", version=1), "operators of its own"),
        (lambda made: made.functions.add(name="f", domain="local"), "operators of its own"),
        (lambda made: made.training_info.add(), "operators of its own"),
        (lambda made: setattr(made.opset_import[0], "version", 19), "another opset than 18"),
        (lambda made: made.opset_import.add(domain="ai.onnx", version=18), "another opset than 18"),
        (lambda made: made.ClearField("opset_import"), "another opset than 18"),
    ],
)
def test_operators_that_are_not_as_stated(change: Any, words: str) -> None:
    made = model()
    change(made)
    with pytest.raises(BundleError, match=words):
        check_file("infer", made.SerializeToString(), STATED)


def test_graphs_in_graphs_have_an_end() -> None:
    made = model()
    for _ in range(40):
        outer = model()
        outer.graph.node[0].attribute[0].g.CopyFrom(made.graph)
        made = outer
    with pytest.raises(BundleError, match="is not an ONNX file"):
        check_file("infer", made.SerializeToString(), STATED)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_changed_bytes_hide_no_file(draw: st.DataObject) -> None:
    """What onnx's own parser finds in a changed file, the walk finds too."""
    where = draw.draw(st.sampled_from(["initializer", "branch", "constant"]))
    changed = bytearray(hide(where).SerializeToString())
    for _ in range(draw.draw(st.integers(1, 3))):
        changed[draw.draw(st.integers(0, len(changed) - 1))] = draw.draw(st.integers(0, 255))
    data = bytes(changed)
    try:
        read = onnx.load_from_string(data)
    except Exception:
        read = None
    try:
        check_file("infer", data, STATED)
    except BundleError as exc:
        assert str(exc).isprintable()
    else:
        assert read is None or not any(tensor.external_data for tensor in every_tensor(read.graph))


def every_tensor(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    found = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            found += [attribute.t, *attribute.tensors]
            for inner in (attribute.g, *attribute.graphs):
                found += every_tensor(inner) if inner.ByteSize() else []
    return found


@given(JSON)
@settings(deadline=None)
def test_entries_on_their_own_are_refused_with_a_value_error(value: Any) -> None:
    for parse in (parse_interface, parse_cost):
        with pytest.raises(ValueError, match="does not have exactly"):
            parse(value)


def test_the_types_are_numpys() -> None:
    assert all(np.dtype(name).name == name for name in DTYPES)
