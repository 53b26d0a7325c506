"""What a bundle asks of firmware: operators, memory, computation, bytes on the wire and what fewer of them cost."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from edge_sdk.batch import as_batch
from edge_sdk.bundle import Bundle, load_bundle
from edge_sdk.dataset import Dataset
from edge_sdk.front import FrontState
from edge_sdk.interface import Cost
from edge_sdk.ledger import bits_per_sample
from edge_sdk.manifest import Manifest
from edge_sdk.signing import PublicKey
from export.errors import ExportError
from export.firmware import Firmware, write_firmware
from export.quantise import Int8Cost, compare_int8
from export.trade_off import LEAST_HELD_OUT
from server_sdk.assembly import back_path, trainer_from
from server_sdk.audit.victim import Victim
from server_sdk.trainer import Trainer

__all__ = ["GraphReport", "Report", "WireCost", "report_on"]

Array = npt.NDArray[np.float32]
_CALIBRATION = 128
_CALIBRATION_BATCH = 32
_ON_WIRE = (("float32", 0), ("float16", 0), ("8 bits", 8), ("4 bits", 4), ("2 bits", 2), ("1 bit", 1))


@dataclass(frozen=True)
class GraphReport:
    """One graph.

    Attributes:
        onnx_bytes, ort_bytes: of its files.
        operators: how many nodes of each kind, as exported.
        cost: as the manifest says.
    """

    onnx_bytes: int
    ort_bytes: int
    operators: dict[str, int]
    cost: Cost


@dataclass(frozen=True)
class WireCost:
    """One way to send a sample's activations.

    Attributes:
        name: how.
        bytes_per_sample: of the activations, without labels and envelope.
        shipped: this is what the bundle says (of floats, what devices do unless told otherwise).
        accuracy: of the decisions on held-out samples, noise included, 0 to 1; None where it means nothing.
    """

    name: str
    bytes_per_sample: int
    shipped: bool
    accuracy: float | None


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        bundle: its id.
        profile: its name.
        bundle_bytes: of the file.
        graphs: by name.
        firmware: what was written for a reduced onnxruntime.
        wire: ways to send a sample's activations.
        bits_per_sample: the most that one send tells of a sample, or None where nothing bounds it.
        held_out: number of samples behind the accuracies.
        note: why there are no accuracies, or None.
        int8: what an int8 front would cost, or None where it was not measured.
        int8_accuracy: of the decisions behind an int8 front, on the wire as shipped, or None.
    """

    bundle: str
    profile: str
    bundle_bytes: int
    graphs: dict[str, GraphReport]
    firmware: Firmware
    wire: tuple[WireCost, ...]
    bits_per_sample: float | None
    held_out: int
    note: str | None
    int8: Int8Cost | None
    int8_accuracy: float | None


def report_on(
    path: Path, folder: Path, *, data: Dataset | None = None, int8: bool = False, public_key: PublicKey | None = None
) -> Report:
    """Report on a bundle and write what a firmware build needs.

    Args:
        path: of the bundle; for accuracies with the back's weights beside it.
        folder: where ``.ort`` files and ``required_operators.config`` go.
        data: samples to measure on: test samples, for int8 also training samples to calibrate with.
        int8: measure what an int8 front would cost; needs ``data`` and a frozen front.
        public_key: of who signs bundles.

    Raises:
        ExportError: a graph that firmware cannot have, too few samples, or int8 of a front that is trained.
        BundleError, BatchError, ModelError: a bundle, samples or weights that cannot be used.
    """
    bundle = load_bundle(path, public_key=public_key)
    manifest = bundle.manifest
    if int8 and (data is None or not manifest.frozen):
        raise ExportError(
            "int8 is measured on samples (--data) and for a frozen front: one that devices train keeps float32 weights"
        )
    if data is not None and len(data.test) < LEAST_HELD_OUT:
        raise ExportError(f"{len(data.test)} test samples are too few to measure on: give at least {LEAST_HELD_OUT}")
    firmware = write_firmware(bundle.graphs, folder)
    graphs = {
        name: GraphReport(len(graph), firmware.ort_bytes[name], _operators(graph), manifest.costs[name])
        for name, graph in bundle.graphs.items()
    }
    note = None
    trainer = None
    if data is None:
        note = "no accuracy: give --data to measure on"
    elif not manifest.frozen:
        note = "no accuracy: front and back are not trained yet, so that decisions are guesses"
    else:
        trainer = trainer_from(bundle, back_path(path), rounds=1)
    found = None
    accuracy = None
    if int8 and data is not None and trainer is not None:
        found, accuracy = _int8(bundle, data, trainer)
    return Report(
        bundle=bundle.id,
        profile=manifest.profile,
        bundle_bytes=path.stat().st_size,
        graphs=graphs,
        firmware=firmware,
        wire=tuple(_wire(bundle, name, bits, data, trainer) for name, bits in _ON_WIRE),
        bits_per_sample=bits_per_sample(manifest),
        held_out=0 if data is None or trainer is None else len(data.test),
        note=note,
        int8=found,
        int8_accuracy=accuracy,
    )


def _operators(graph: bytes) -> dict[str, int]:
    return dict(sorted(Counter(node.op_type for node in onnx.load_from_string(graph).graph.node).items()))


def _wire(bundle: Bundle, name: str, bits: int, data: Dataset | None, trainer: Trainer | None) -> WireCost:
    manifest = bundle.manifest
    values = math.prod(manifest.cut_shape)
    size = -(-values * bits // 8) if bits else values * (4 if name == "float32" else 2)
    shipped = bits == manifest.bits and (bits > 0 or name == "float16")
    if data is None or trainer is None:
        return WireCost(name, size, shipped, None)
    packed = replace(bundle, manifest=replace(manifest, bits=bits))
    victim = Victim(packed, FrontState(0, dict(bundle.initial)), codec=name if not bits else "float16")
    seen = victim.send(_samples(manifest, data))
    return WireCost(name, size, shipped, _accuracy(trainer, seen, data))


def _samples(manifest: Manifest, data: Dataset) -> Array:
    return as_batch(data.test.x, manifest.input_shape, max_batch=len(data.test), input_range=manifest.input_range)


def _accuracy(trainer: Trainer, seen: Array, data: Dataset) -> float:
    parts = np.array_split(seen, max(1, len(seen) // 256))
    decided = np.concatenate([trainer.decide(part).probabilities.argmax(axis=1) for part in parts])
    return float((decided == data.test.y).mean())


def _int8(bundle: Bundle, data: Dataset, trainer: Trainer) -> tuple[Int8Cost, float]:
    manifest = bundle.manifest
    train = data.train.take(np.arange(min(len(data.train), _CALIBRATION)))
    x = as_batch(train.x, manifest.input_shape, max_batch=len(train), input_range=manifest.input_range)
    parts = [x[start : start + _CALIBRATION_BATCH] for start in range(0, len(x), _CALIBRATION_BATCH)]
    feeds = [_feed(manifest, part) for part in parts]
    held_out = _samples(manifest, data)
    cost, graph = compare_int8(bundle.graphs["infer"], bundle.initial, feeds, _feed(manifest, held_out))
    bare = replace(manifest, interfaces={})
    victim = Victim(
        replace(bundle, manifest=bare, graphs={"infer": graph}), FrontState(0, dict(bundle.initial)), codec="float16"
    )
    return cost, _accuracy(trainer, victim.send(held_out), data)


def _feed(manifest: Manifest, x: Array) -> dict[str, npt.NDArray[np.generic]]:
    given: dict[str, npt.NDArray[np.generic]] = {
        "x": x,
        "label": np.full(len(x), -1, np.int64),
        "epsilon": np.array(manifest.epsilon, np.float32),
        "noise": np.zeros((len(x), *manifest.cut_shape), np.float32),
    }
    taken = {tensor.name for tensor in manifest.interfaces["infer"].inputs}
    return {name: array for name, array in given.items() if name in taken}
