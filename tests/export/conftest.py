"""What the export tests share: running a graph in two runtimes, and comparing at float32's grain."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops.op_conv_transpose import ConvTranspose as WholeConvTranspose

from export.graphs import GraphSet

Arrays = dict[str, np.ndarray]


def _in_onnxruntime(model: bytes, feeds: Mapping[str, np.ndarray]) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    wanted = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, wanted), strict=True))


class ConvTranspose(WholeConvTranspose):
    """onnx.reference computes grouped transposed convolutions wrongly: give it one group at a time."""

    def _run(self, x, w, b=None, group=1, **attributes):  # type: ignore[no-untyped-def]
        parts = zip(np.split(x, group, axis=1), np.split(w, group, axis=0), strict=True)
        results = [super(ConvTranspose, self)._run(x, w, None, group=1, **attributes)[0] for x, w in parts]
        return (np.concatenate(results, axis=1),)


def _in_reference(model: bytes, feeds: Mapping[str, np.ndarray]) -> Arrays:
    evaluator = ReferenceEvaluator(onnx.load_from_string(model), new_ops=[ConvTranspose])
    wanted = {name: feeds[name] for name in evaluator.input_names}
    return dict(zip(evaluator.output_names, evaluator.run(None, wanted), strict=True))


@pytest.fixture(scope="session", params=["onnxruntime", "reference"])
def run(request: pytest.FixtureRequest) -> Callable[[bytes, Mapping[str, np.ndarray]], Arrays]:
    """Run a serialised graph; every test that takes it runs once per runtime."""
    return _in_onnxruntime if request.param == "onnxruntime" else _in_reference


@pytest.fixture(scope="session")
def run_fast() -> Callable[[bytes, Mapping[str, np.ndarray]], Arrays]:
    return _in_onnxruntime


@pytest.fixture(scope="session")
def step() -> Callable[..., Arrays]:
    """Run the last two parts of a step as a device does; gives ``next.*`` in the order of the initial tensors.

    ``feeds`` hold what ``train`` gave, and ``gradient`` and ``rate``.
    """

    def run_both(
        run: Callable[[bytes, Mapping[str, np.ndarray]], Arrays], graphs: GraphSet, feeds: Mapping[str, np.ndarray]
    ) -> Arrays:
        known = dict(feeds) | run(graphs.step.prepare, feeds)
        known |= run(graphs.step.backward, known)
        return {f"next.{name}": known[f"next.{name}"] for name in graphs.tensors}

    return run_both


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """Assert that a float32 result is the float64 one, relative to the tensor's largest value."""

    def check(got: np.ndarray, wanted: object, what: str, *, relative: float = 2e-5) -> None:
        expected = np.asarray(wanted.detach() if isinstance(wanted, torch.Tensor) else wanted, np.float64)
        assert got.shape == expected.shape, f"{what}: {got.shape} is not {expected.shape}"
        scale = max(float(np.abs(expected).max(initial=0.0)), 0.1)
        worst = float(np.abs(got.astype(np.float64) - expected).max(initial=0.0))
        assert worst <= relative * scale, f"{what}: off by {worst:.2e} where values reach {scale:.2e}"

    return check
