"""Two parts compute the very bits of the whole, and the early part needs nothing that is late."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.errors import ExportError
from export.partition import before_inputs, for_outputs


def model(side_in_y: bool = False) -> bytes:
    """early: a = x * w, side = a + w; late: y = a * g (or side * g), plus a constant."""
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["a"], name="n0"),
        helper.make_node("Add", ["a", "w"], ["side"], name="n1"),
        helper.make_node("Mul", ["side" if side_in_y else "a", "g"], ["ag"], name="n2"),
        helper.make_node("Add", ["ag", "c"], ["y"], name="n3"),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 2]) for name in ("x", "w", "g")]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 2]) for name in ("side", "y")]
    constant = helper.make_tensor("c", TensorProto.FLOAT, [2], [1.0, 2.0])
    graph = helper.make_graph(nodes, "psgl", value, outputs, [constant])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    serialised: bytes = made.SerializeToString()
    return serialised


def test_both_parts_are_the_whole(run) -> None:
    generator = np.random.default_rng(0)
    feeds = {name: generator.standard_normal((3, 2)).astype(np.float32) for name in ("x", "w", "g")}
    whole = run(model(), feeds)
    early, rest = before_inputs(model(), {"g"}, "r.")
    first = run(early, {"x": feeds["x"], "w": feeds["w"]})
    assert set(first) == {"side", "r.0"}
    second = run(rest, {"g": feeds["g"], "r.0": first["r.0"]})
    assert np.array_equal(first["side"], whole["side"]) and np.array_equal(second["y"], whole["y"])


def test_each_part_holds_only_what_it_needs() -> None:
    early, rest = (onnx.load_from_string(part).graph for part in before_inputs(model(), {"g"}, "r."))
    assert [node.op_type for node in early.node] == ["Mul", "Add"] and not early.initializer
    assert [value.name for value in rest.input] == ["g", "r.0"]
    assert [tensor.name for tensor in rest.initializer] == ["c"]


def test_a_view_is_made_where_it_is_used(run) -> None:
    """early: a = x * w; a reshaped is used late, x reshaped early."""
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["a"], name="n0"),
        helper.make_node("Reshape", ["a", "flat"], ["row"], name="n1"),
        helper.make_node("Reshape", ["x", "flat"], ["seen"], name="n2"),
        helper.make_node("Neg", ["seen"], ["less"], name="n3"),
        helper.make_node("Mul", ["row", "g"], ["b"], name="n4"),
        helper.make_node("Add", ["b", "less"], ["y"], name="n5"),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 2]) for name in ("x", "w")]
    late = helper.make_tensor_value_info("g", TensorProto.FLOAT, ["M"])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M"])
    graph = helper.make_graph(
        nodes, "psgl", [*value, late], [output], [helper.make_tensor("flat", TensorProto.INT64, [1], [-1])]
    )
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    parts = before_inputs(whole, {"g"}, "r.")
    early, rest = ([node.op_type for node in onnx.load_from_string(part).graph.node] for part in parts)
    assert (early, rest) == (["Mul", "Reshape", "Neg"], ["Reshape", "Mul", "Add"])
    generator = np.random.default_rng(0)
    feeds = {name: generator.standard_normal((3, 2)).astype(np.float32) for name in ("x", "w")}
    gradient = {"g": generator.standard_normal(6).astype(np.float32)}
    expected = run(whole, feeds | gradient)["y"]
    assert np.array_equal(run(parts[1], gradient | run(parts[0], feeds))["y"], expected)


def test_what_some_outputs_need_comes_first(run) -> None:
    generator = np.random.default_rng(0)
    feeds = {name: generator.standard_normal((3, 2)).astype(np.float32) for name in ("x", "w", "g")}
    first, rest = for_outputs(model(), {"side"}, "f.")
    got = run(first, feeds)
    assert set(got) == {"side", "f.0"}
    assert np.array_equal(run(rest, feeds | got)["y"], run(model(), feeds)["y"])


def test_an_output_that_both_parts_need_keeps_its_name(run) -> None:
    first, rest = for_outputs(model(side_in_y=True), {"side"}, "f.")
    assert [value.name for value in onnx.load_from_string(rest).graph.input] == ["g", "side"]
    feeds = {name: np.ones((1, 2), np.float32) for name in ("x", "w", "g")}
    assert np.array_equal(run(rest, feeds | run(first, feeds))["y"], [[3.0, 4.0]])


def test_a_late_input_that_is_not_there() -> None:
    with pytest.raises(ExportError, match="no inputs"):
        before_inputs(model(), {"gradient"}, "r.")
    with pytest.raises(ExportError, match="no outputs"):
        for_outputs(model(), {"z"}, "f.")
