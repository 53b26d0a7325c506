"""What int8 would cost: the inference graph with its weights built in, as float32 and as int8 (QDQ), side by side.

Static quantisation by onnxruntime (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html),
calibrated on training samples: activations uint8, weights int8, per channel. What adds the noise stays float32: the
noise is drawn on the device, and a range that was calibrated without it would clip it away.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from export.errors import ExportError
from export.firmware import quiet

__all__ = ["Int8Cost", "bake", "compare_int8", "to_int8"]

Array = npt.NDArray[Any]
_RUNS = 50


@dataclass(frozen=True)
class Int8Cost:
    """Two forms of one inference graph, weights built in.

    Attributes:
        float_bytes, int8_bytes: of the ONNX files.
        cosine: of the activations of both forms, mean over the samples, before noise and packing.
        float_ms, int8_ms: median of one sample on one thread, here.
    """

    float_bytes: int
    int8_bytes: int
    cosine: float
    float_ms: float
    int8_ms: float


def bake(graph: bytes, tensors: Mapping[str, Array]) -> bytes:
    """The graph with these inputs built in as weights."""
    model = onnx.load_from_string(graph)
    kept = [value for value in model.graph.input if value.name not in tensors]
    baked = [value.name for value in model.graph.input if value.name in tensors]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(tensors[name]), name) for name in baked)
    serialised: bytes = model.SerializeToString(deterministic=True)
    return serialised


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: list[dict[str, Array]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


def to_int8(graph: bytes, feeds: list[dict[str, Array]]) -> bytes:
    """Quantise a graph whose weights are built in.

    Args:
        feeds: inputs of the runs that the ranges are measured in, at least one.

    Raises:
        ExportError: onnxruntime cannot quantise it.
    """
    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(graph)
        noisy = [node.name for node in onnx.load_from_string(graph).graph.node if "noise" in node.input]
        try:
            quantize_static(
                source,
                target,
                _Reader(feeds),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=noisy,
            )
        except Exception as exc:  # onnxruntime's tools raise what they happen to
            raise ExportError(f"onnxruntime cannot make the front int8: {' '.join(str(exc).split())[:160]}") from exc
        model = onnx.load(target)
    del model.metadata_props[:]
    del model.graph.value_info[:]
    serialised: bytes = model.SerializeToString(deterministic=True)
    return serialised


def compare_int8(
    graph: bytes, tensors: Mapping[str, Array], calibration: list[dict[str, Array]], held_out: dict[str, Array]
) -> tuple[Int8Cost, bytes]:
    """Measure both forms.

    Args:
        graph: the inference graph of a bundle.
        tensors: of its front.
        calibration: inputs but the front's, for `to_int8`.
        held_out: the same for the samples that are compared.

    Returns:
        What it costs, and the int8 graph.

    Raises:
        ExportError: as `to_int8`.
    """
    plain = bake(graph, tensors)
    small = to_int8(plain, calibration)
    given = [_activations(data, held_out) for data in (plain, small)]
    rows = [each.reshape(len(each), -1).astype(np.float64) for each in given]
    norms = np.linalg.norm(rows[0], axis=1) * np.linalg.norm(rows[1], axis=1)
    cosine = float((np.sum(rows[0] * rows[1], axis=1) / np.maximum(norms, 1e-12)).mean())
    one = {name: array[:1] if array.ndim else array for name, array in held_out.items()}
    return Int8Cost(len(plain), len(small), cosine, _median_ms(plain, one), _median_ms(small, one)), small


def _session(graph: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _activations(graph: bytes, feed: Mapping[str, Array]) -> Array:
    session = _session(graph)
    found: Array = session.run(["activations"], {one.name: feed[one.name] for one in session.get_inputs()})[0]
    return found


def _median_ms(graph: bytes, feed: Mapping[str, Array]) -> float:
    session = _session(graph)
    inputs = {one.name: feed[one.name] for one in session.get_inputs()}
    session.run(None, inputs)
    times = []
    for _ in range(_RUNS):
        begun = time.perf_counter()
        session.run(None, inputs)
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)
