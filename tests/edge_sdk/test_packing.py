"""Activations in few bits: what is packed comes back as the nearest level, and nothing else is read."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Mapping
from typing import Any

import cbor2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_sdk.errors import ConfigError, WireError
from edge_sdk.limits import Limits
from edge_sdk.packing import BITS, Codes, Packing, pack, read_packed, to_packed_entry
from edge_sdk.wire import Assembler, Message, decode_frame, encode

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)
BATCHES = hnp.array_shapes(min_dims=2, max_dims=5, max_side=5).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=FINITE)
)
ENTRY: dict[str, Any] = {
    "data": cbor2.CBORTag(40, [[2, 3], cbor2.CBORTag(64, bytes.fromhex("174aa04417a0"))]),
    "bits": 4,
    "shape": [5],
    "low": -1.5,
    "high": 6.0,
}


def typed(dims: Any, data: bytes, tag: int = 64) -> cbor2.CBORTag:
    return cbor2.CBORTag(40, [dims, cbor2.CBORTag(tag, data)])


def through_the_wire(activations: np.ndarray, packing: Packing) -> np.ndarray:
    message = Message("infer", "r", "s", 1, {"front": 0}, {"activations": activations})
    frames = encode(message, codec=packing)
    assert encode(message, codec=packing) == frames
    assembler = Assembler()
    (read,) = [done for data in frames if (done := assembler.add(decode_frame(data))) is not None]
    return read.tensors["activations"]


@given(BATCHES, st.sampled_from(BITS))
@settings(deadline=None)
def test_a_range_of_its_own_keeps_every_value_within_half_a_level(batch: np.ndarray, bits: int) -> None:
    got = through_the_wire(batch, Packing(bits))
    assert got.dtype == np.float32 and got.shape == batch.shape
    low, high = float(batch.min()), float(batch.max())
    rounding = 4 * 2.0**-24 * max(abs(low), abs(high)) + 2.0**-140
    assert np.abs(got.astype(np.float64) - batch).max() <= (high - low) / (2**bits - 1) / 2 + rounding
    assert np.array_equal(got, Packing(bits).apply(batch)), "the sender can tell what is received"


@given(BATCHES, st.sampled_from(BITS))
@settings(deadline=None)
def test_a_given_range_clips_and_rounds_to_the_nearest_level(batch: np.ndarray, bits: int) -> None:
    packing = Packing(bits, -1.5, 2.25)
    got = through_the_wire(batch, packing)
    levels = Codes(bits, (1,), -1.5, 2.25).levels
    assert len(levels) == 2**bits and levels[0] == -1.5 and abs(levels[-1] - 2.25) < 1e-6
    clipped = batch.astype(np.float64).clip(-1.5, 2.25)
    nearest = np.abs(clipped[..., None] - levels).min(axis=-1)
    assert set(got.reshape(-1).tolist()) <= set(levels.tolist())
    assert np.abs(np.abs(got - clipped) - nearest).max() < 1e-6
    assert np.array_equal(packing.apply(got), got), "a level is its own code"


def test_ties_go_to_the_even_code() -> None:
    rows, codes = pack(np.array([[0.5, 1.5, 2.5, 13.5, 14.5]], np.float32), Packing(4, 0.0, 15.0))
    assert rows.tobytes().hex() == "022ee0"
    assert codes == Codes(4, (5,), 0.0, 15.0) and codes.sample_bytes == 3
    assert codes.expand(rows).tolist() == [[0.0, 2.0, 2.0, 14.0, 14.0]]


@pytest.mark.parametrize("value", [0.0, 1.5, -1e-45, 1e-40, 3.4028234663852886e38, -3.4028234663852886e38])
@pytest.mark.parametrize("bits", BITS)
def test_a_constant_stays_as_it_is(value: float, bits: int) -> None:
    batch = np.full((2, 3), value, np.float32)
    assert np.array_equal(through_the_wire(batch, Packing(bits)), batch)


def test_samples_are_packed_one_by_one() -> None:
    batch = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    for bits in BITS:
        packing = Packing(bits, -3.0, 3.0)
        rows, codes = pack(batch, packing)
        assert rows.shape == (4, math.ceil(7 * bits / 8)) == (4, codes.sample_bytes)
        for row, sample in zip(rows, batch, strict=True):
            assert row.tobytes() == pack(sample[None], packing)[0].tobytes()
    assert pack(np.zeros((3, 32), np.float32), Packing(4, -3.0, 3.0))[0].shape == (3, 16)


def test_only_activations_of_three_kinds_are_packed() -> None:
    packing = Packing(4)
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    fields = {"front": 0, "rate": 1.0, "loss": 1.0, "round": 1}
    gradient = Message("gradient", "r", "s", 1, fields, {"gradient": rows})
    assert encode(gradient, codec=packing) == encode(gradient, codec="float32")
    wide = np.random.default_rng(0).normal(size=(2, 400)).astype(np.float32)
    stored = {"front": 0, "first": 0, "total": 2}
    for kind, kind_fields in (("train", {"front": 0}), ("store", stored), ("infer", {"front": 0})):
        tensors = {"activations": wide} | ({} if kind == "infer" else {"labels": np.array([0, 1])})
        message = Message(kind, "r", "s", 1, kind_fields, tensors)
        assert len(encode(message, codec="float32")[0]) - len(encode(message, codec=packing)[0]) > 2700
    wide = np.array([[-(2.0**127), 2.0**127]], np.float32)
    with pytest.raises(WireError, match="beyond float32") as caught:
        encode(Message("infer", "r", "s", 1, {"front": 0}, {"activations": wide}), codec=packing)
    assert caught.value.reason == "nonfinite"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 3}, "schema"),
        ({"bits": 4.0}, "schema"),
        ({"bits": True}, "schema"),
        ({"bits": 0}, "schema"),
        ({"bits": 8}, "shape"),
        ({"bits": 2}, "shape"),
        ({"shape": []}, "limit"),
        ({"shape": [1] * 8}, "limit"),
        ({"shape": 5}, "schema"),
        ({"shape": [0]}, "shape"),
        ({"shape": [-5]}, "shape"),
        ({"shape": [5.0]}, "shape"),
        ({"shape": [7]}, "shape"),
        ({"shape": [4]}, "shape"),
        ({"shape": [2**62, 2**62]}, "limit"),
        ({"low": 6.0}, "schema"),
        ({"low": 7.0}, "schema"),
        ({"low": -1}, "schema"),
        ({"low": None}, "schema"),
        ({"low": 0.1}, "schema"),
        ({"low": -math.inf}, "schema"),
        ({"high": math.nan}, "schema"),
        ({"high": 1e300}, "schema"),
        ({"low": -3e38, "high": 3.0000000054977558e38}, "schema"),
        ({"low": -(2.0**127), "high": 2.0**127}, "nonfinite"),
        ({"high": 2.0**125}, "nonfinite"),
        ({"data": typed([2, 3], bytes.fromhex("174aa04417a1"))}, "schema"),
        ({"data": typed([6], bytes.fromhex("174aa04417a0"))}, "shape"),
        ({"data": typed([2, 4], bytes(8))}, "shape"),
        ({"data": typed([2, 3], bytes(5))}, "shape"),
        ({"data": typed([2, 3], bytes(24), 85)}, "dtype"),
        ({"data": b"174aa0"}, "schema"),
        ({"scale": 1.0}, "schema"),
        ({"high": ...}, "schema"),
    ],
)
def test_what_is_no_packed_tensor_is_refused(change: Mapping[str, Any], reason: str) -> None:
    assert read_packed("a", ENTRY)[1] == Codes(4, (5,), -1.5, 6.0)
    entry = {name: value for name, value in {**ENTRY, **change}.items() if value is not ...}
    with pytest.raises(WireError) as caught:
        read_packed("a", entry)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_limits_hold_for_the_expanded_tensor_before_memory_is_taken() -> None:
    def entry(samples: int, values: int, bits: int) -> dict[str, Any]:
        size = -(-values * bits // 8)
        return {**ENTRY, "bits": bits, "shape": [values], "data": typed([samples, size], bytes(samples * size))}

    limits = Limits(max_elements=4096)
    rows, codes = read_packed("a", entry(8, 512, 1), limits)
    assert codes.expand(rows).size == 4096
    tracemalloc.start()
    for refused in (entry(9, 512, 1), entry(513, 1, 1), entry(4096, 2, 8), entry(1, 1 << 15, 1)):
        given_bytes = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        with pytest.raises(WireError) as caught:
            read_packed("a", refused, limits)
        assert caught.value.reason == "limit"
        assert tracemalloc.get_traced_memory()[1] - given_bytes < 16 << 10
    tracemalloc.stop()


@given(st.data())
@settings(deadline=None)
def test_mutated_entries_are_read_or_refused(draw: st.DataObject) -> None:
    batch = draw.draw(BATCHES)
    entry = to_packed_entry("a", batch, Packing(draw.draw(st.sampled_from(BITS))))
    odd = st.one_of(st.integers(-2, 10), st.floats(), st.none(), st.lists(st.integers(-1, 40), max_size=9), st.binary())
    for name in draw.draw(st.lists(st.sampled_from([*ENTRY, "scale"]), max_size=3)):
        entry[name] = draw.draw(odd)
    if draw.draw(st.booleans()):
        dims = draw.draw(st.lists(st.integers(0, 6), max_size=3))
        entry["data"] = typed(dims, draw.draw(st.binary(min_size=math.prod(dims), max_size=math.prod(dims))))
    limits = Limits(max_elements=256, max_dims=5)
    try:
        rows, codes = read_packed("a", entry, limits)
    except WireError as exc:
        assert exc.reason in ("schema", "shape", "limit", "dtype", "nonfinite")
        return
    values = codes.expand(rows)
    assert values.size <= 256 and values.ndim <= 5 and np.isfinite(values).all()
    again = to_packed_entry("a", values, Packing(codes.bits, codes.low, codes.high))
    levels = codes.levels.tolist()
    if all(low < high for low, high in itertools.pairwise(levels)) and _apart(codes):
        assert again == entry


def _apart(codes: Codes) -> bool:
    """Whether rounding leaves each level nearest to itself."""
    step = (codes.high - codes.low) / (2**codes.bits - 1)
    return step > 8 * 2.0**-23 * max(abs(codes.low), abs(codes.high), 2.0**-100)


@pytest.mark.parametrize(
    "arguments",
    [(3,), (0,), (16,), (4, 0.0), (4, None, 1.0), (4, 1.0, 1.0), (4, 2.0, 1.0), (4, 0.1, 1.0), (4, -math.inf, 0.0)],
)
def test_a_packing_that_cannot_be_is_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError):
        Packing(*arguments)
