"""The firmware report: what it counts can be counted by hand, and what it writes can be run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edge_sdk.batch import Samples
from edge_sdk.bundle import load_bundle
from edge_sdk.dataset import Dataset, load_dataset, save_dataset
from edge_sdk.interface import Cost
from edge_sdk.ledger import bits_per_sample
from export.cli import main
from export.costs import cost_of, interface_of
from export.errors import ExportError
from export.firmware import CONFIG, write_firmware
from export.quantise import bake, to_int8
from export.report import report_on

Draw = Callable[[int, int], Samples]


def small_graph() -> bytes:
    """y = relu(conv(x, w)) @ m, and x at the same time as y."""
    make = onnx.helper
    nodes = [
        make.make_node("Conv", ["x", "p.w"], ["c"], pads=[1, 1, 1, 1], name="conv"),
        make.make_node("Relu", ["c"], ["r"], name="relu"),
        make.make_node("Flatten", ["r"], ["f"], name="flatten"),
        make.make_node("MatMul", ["f", "m"], ["y"], name="product"),
    ]
    value = make.make_tensor_value_info
    inputs = [value("x", 1, ["N", 1, 4, 4]), value("p.w", 1, [2, 1, 3, 3])]
    weights = onnx.numpy_helper.from_array(np.ones((32, 5), np.float32), "m")
    graph = make.make_graph(nodes, "g", inputs, [value("y", 1, ["N", 5])], [weights])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=10)
    serialised: bytes = model.SerializeToString()
    return serialised


def test_costs_that_can_be_counted_by_hand() -> None:
    feed = {"x": np.ones((1, 1, 4, 4), np.float32), "p.w": np.ones((2, 1, 3, 3), np.float32)}
    macs = 2 * 16 * 9 + 32 * 5
    peak = 4 * (32 + 32)  # the convolution's output and the ReLU's
    assert cost_of(small_graph(), feed) == Cost(macs, 18 + 160, peak)
    with pytest.raises(ExportError, match="cannot be run to count"):
        cost_of(small_graph(), {**feed, "x": np.ones((1, 2, 4, 4), np.float32)})


def test_the_interface_is_read_off_the_file() -> None:
    found = interface_of(small_graph())
    assert found.opset == 18 and [(one.name, one.shape) for one in found.inputs] == [
        ("x", ("N", 1, 4, 4)),
        ("p.w", (2, 1, 3, 3)),
    ]
    assert [(one.name, one.dtype, one.shape) for one in found.outputs] == [("y", "float32", ("N", 5))]


@pytest.mark.parametrize("profile", ["paper", "hardened"])
def test_what_firmware_gets_can_be_run(profile: str, built: dict[str, Any], tmp_path: Path) -> None:
    bundle = built[profile].bundle
    made = write_firmware(bundle.graphs, tmp_path)
    assert set(made.files) == {CONFIG, *(f"{name}.ort" for name in bundle.graphs)}
    assert {path.name for path in tmp_path.iterdir()} == set(made.files)
    config = (tmp_path / CONFIG).read_text().splitlines()
    assert all(line.startswith(("#", "ai.onnx;")) for line in config) and str(tmp_path) not in config[0]
    assert ("Conv" in made.operators and "Tanh" in made.operators) or profile == "paper"
    x = np.random.default_rng(0).random((2, 1, 8, 8), dtype=np.float32)
    given = {"x": x, "label": np.full(2, -1), "epsilon": np.array(0.2, np.float32), **bundle.initial}
    given["noise"] = np.zeros((2, *bundle.manifest.cut_shape), np.float32)
    found = []
    for graph in (bundle.graphs["infer"], str(tmp_path / "infer.ort")):
        session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        found.append(session.run(["activations"], {one.name: given[one.name] for one in session.get_inputs()})[0])
    assert np.allclose(*found, atol=1e-5)
    again = write_firmware(bundle.graphs, tmp_path / "again")
    assert again == made and (tmp_path / "again" / CONFIG).read_bytes() == (tmp_path / CONFIG).read_bytes()


def test_operators_of_somebody_else_are_refused(tmp_path: Path) -> None:
    model = onnx.load_from_string(small_graph())
    model.opset_import.add(domain="com.microsoft", version=1)
    relu = next(node for node in model.graph.node if node.name == "relu")
    relu.op_type, relu.domain = "Gelu", "com.microsoft"
    with pytest.raises(ExportError, match=r"beyond ai\.onnx"):
        write_firmware({"infer": model.SerializeToString()}, tmp_path)


@pytest.fixture
def data(samples: Draw, tmp_path: Path) -> Path:
    save_dataset(tmp_path / "x.npz", samples(60, 3), samples(30, 4))
    return tmp_path / "x.npz"


def test_a_report_of_a_frozen_front(built: dict[str, Any], data: Path, tmp_path: Path) -> None:
    made = built["hardened"]
    found = report_on(made.path, tmp_path / "out", data=load_dataset(data), int8=True)
    wire = {one.name: one for one in found.wire}
    assert [one.bytes_per_sample for one in found.wire] == [128, 64, 32, 16, 8, 4]
    assert [name for name, one in wire.items() if one.shipped] == ["4 bits"]
    assert all(one.accuracy is not None and 0 <= one.accuracy <= 1 for one in found.wire) and found.held_out == 30
    assert found.bits_per_sample == bits_per_sample(made.bundle.manifest) and found.note is None
    assert found.graphs["infer"].cost == made.bundle.manifest.costs["infer"]
    assert found.graphs["infer"].operators["Conv"] == 4
    assert found.int8 is not None and found.int8.cosine > 0.98 and found.int8_accuracy is not None


def test_fewer_bits_cost_accuracy_where_the_code_needs_them(
    built: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the back that is right of class 0 where the first value is one that 2 bits can say, else never."""

    class Decided:
        def __init__(self, seen: Any) -> None:
            coarse = np.isclose(seen[:, :1], [-3, -1, 1, 3], atol=0.01).any(axis=1)
            self.probabilities = np.eye(4, dtype=np.float32)[np.where(coarse, 0, 3)]

    class Back:
        def decide(self, seen: Any) -> Decided:
            return Decided(seen)

    monkeypatch.setattr("export.report.trainer_from", lambda *arguments, **options: Back())
    found = report_on(built["hardened"].path, tmp_path / "out", data=load_dataset(data))
    accuracy = {one.name: one.accuracy for one in found.wire}
    assert accuracy["4 bits"] is not None and accuracy["2 bits"] is not None
    assert accuracy["4 bits"] < accuracy["2 bits"] == accuracy["1 bit"] == pytest.approx(1 / 3)


def test_a_front_that_is_not_trained_yet_has_no_accuracy(built: dict[str, Any], data: Path, tmp_path: Path) -> None:
    found = report_on(built["paper"].path, tmp_path / "out", data=load_dataset(data))
    assert found.note is not None and "not trained yet" in found.note
    assert all(one.accuracy is None for one in found.wire) and found.bits_per_sample is None
    with pytest.raises(ExportError, match="one that devices train keeps float32 weights"):
        report_on(built["paper"].path, tmp_path / "out", data=load_dataset(data), int8=True)


def test_too_few_samples(built: dict[str, Any], samples: Draw, tmp_path: Path) -> None:
    few = Dataset(samples(9, 0), samples(3, 1), 3)
    with pytest.raises(ExportError, match="at least 20"):
        report_on(built["hardened"].path, tmp_path, data=few)


def test_weights_that_are_built_in_change_nothing(built: dict[str, Any]) -> None:
    bundle = built["hardened"].bundle
    baked = bake(bundle.graphs["infer"], bundle.initial)
    x = np.random.default_rng(1).random((3, 1, 8, 8), dtype=np.float32)
    given = {"x": x, "noise": np.zeros((3, 32), np.float32)}
    found = []
    for graph, feed in ((bundle.graphs["infer"], {**given, **bundle.initial}), (baked, given)):
        session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        assert {one.name for one in session.get_inputs()} == feed.keys()
        found.append(session.run(None, feed)[0])
    assert np.allclose(*found, atol=1e-6)


def test_an_int8_front_keeps_all_of_the_noise(built: dict[str, Any], samples: Draw) -> None:
    """A range that was calibrated without noise would clip it, and the bound on what is told would not hold."""
    bundle = built["hardened"].bundle
    x = samples(30, 5).x.astype(np.float32) / 255
    still = {"x": x, "noise": np.zeros((30, 32), np.float32)}
    small = to_int8(bake(bundle.graphs["infer"], bundle.initial), [still])
    assert b"QuantizeLinear" in small
    session = ort.InferenceSession(small, providers=["CPUExecutionProvider"])
    noise = np.random.default_rng(0).normal(0, 3, (30, 32)).astype(np.float32)
    added = session.run(None, {**still, "noise": noise})[0] - session.run(None, still)[0]
    assert np.allclose(added, noise, atol=1e-5)


def test_the_command(built: dict[str, Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = str(built["hardened"].path), tmp_path / "out"
    assert main(["report", path, "--out", str(out), "--data", str(data), "--int8"]) == 0
    text = capsys.readouterr().out
    assert "one send tells at most 16.0 bits" in text and "an int8 front" in text
    assert (out / "report.txt").read_text() == text
    assert main(["report", path, "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((out / "report.json").read_text())
    assert document["bundle"] == load_bundle(path).id and document["int8"] is None
    assert main(["report", path, "--out", str(out), "--int8"]) == 2
    assert main(["report", path, "--out", str(data / "x")]) == 2


def test_a_report_says_what_the_manifest_says(built: dict[str, Any]) -> None:
    bundle = built["paper"].bundle
    feed = {**bundle.initial, "x": np.zeros((1, 1, 8, 8), np.float32), "label": np.full(1, -1)}
    feed["epsilon"] = np.array(0.2, np.float32)
    assert cost_of(bundle.graphs["infer"], feed) == bundle.manifest.costs["infer"]
