from __future__ import annotations

import math
import tracemalloc
from contextlib import suppress

import cbor2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_sdk.codec import (
    compress,
    expand,
    from_typed_array,
    pack_tensors,
    to_typed_array,
    unpack_tensors,
)
from edge_sdk.errors import ConfigError, WireError
from edge_sdk.limits import Limits

DTYPES = ["uint8", "int32", "int64", "float16", "float32"]
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=5, min_side=1, max_side=4))
)
PACKED = st.dictionaries(st.text(max_size=12), ARRAYS, max_size=4)


def tagged(dims: object, tag: int = 85, data: object = b"\0" * 16) -> cbor2.CBORTag:
    return cbor2.CBORTag(40, [dims, cbor2.CBORTag(tag, data)])


def pack_raw(value: object) -> bytes:
    return cbor2.dumps({"a": value})


def refusal(data: bytes, limits: Limits | None = None) -> str:
    with pytest.raises(WireError) as caught:
        unpack_tensors(data, limits or Limits())
    assert "\n" not in str(caught.value)
    return caught.value.reason


@given(PACKED)
def test_packed_tensors_come_back_bit_for_bit(tensors: dict[str, np.ndarray]) -> None:
    data = pack_tensors(tensors)
    back = unpack_tensors(data)
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()
    assert pack_tensors(dict(reversed(tensors.items()))) == data


@given(PACKED, st.data())
def test_mutated_and_cut_packs_are_decoded_or_refused(tensors: dict[str, np.ndarray], draw: st.DataObject) -> None:
    data = bytearray(pack_tensors(tensors))
    cut_at = draw.draw(st.integers(0, len(data) - 1))
    with pytest.raises(WireError):
        unpack_tensors(bytes(data[:cut_at]))
    with pytest.raises(WireError):
        unpack_tensors(bytes(data) + b"\0")
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        for array in unpack_tensors(bytes(data)).values():
            assert array.dtype.name in DTYPES
    except WireError:
        pass


@given(st.binary(max_size=80))
def test_random_bytes_are_refused_or_are_tensors(data: bytes) -> None:
    with suppress(WireError):
        assert all(isinstance(array, np.ndarray) for array in unpack_tensors(data).values())


def test_layout_is_rfc_8746() -> None:
    array = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    data = pack_tensors({"w": array})
    plain = cbor2.loads(data)["w"]
    assert plain.tag == 40
    dims, element = plain.value
    assert tuple(dims) == (2, 3)
    assert element.tag == 85
    assert element.value == array.astype("<f4").tobytes()
    for dtype, tag in {"uint8": 64, "int32": 78, "int64": 79, "float16": 84, "float32": 85}.items():
        assert to_typed_array("w", np.zeros(1, dtype)).value[1].tag == tag


def test_strided_and_fortran_arrays_are_written_row_major() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for view in (array.T, array[:, ::-1], np.asfortranarray(array), array[:, 1:2]):
        assert np.array_equal(unpack_tensors(pack_tensors({"a": view}))["a"], view)


def test_decoded_arrays_share_memory_and_are_read_only() -> None:
    array = from_typed_array("a", tagged([4], data=b"\0" * 16))
    assert not array.flags.writeable
    assert not array.flags.owndata
    assert array.flags.aligned


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (tagged([-1]), "shape"),
        (tagged([-2, -2]), "shape"),
        (tagged([0]), "shape"),
        (tagged([0, 2**62], data=b""), "shape"),
        (tagged([4.0]), "shape"),
        (tagged([float("nan")]), "shape"),
        (tagged([True]), "shape"),
        (tagged(["4"]), "shape"),
        (tagged([None]), "shape"),
        (tagged([5]), "shape"),
        (tagged([3]), "shape"),
        (tagged([2, 2], data=b"\0" * 15), "shape"),
        (tagged([4], tag=79), "shape"),
        (tagged([], data=b""), "shape"),
        (tagged([2**40]), "limit"),
        (tagged([2**63, 2**63]), "limit"),
        (tagged([2**32, 2**32]), "limit"),
        (tagged([2**16] * 4, data=b""), "limit"),
        (tagged([1] * 9, data=b"\0" * 4), "limit"),
        (tagged([4], tag=81), "tag"),  # float32, big endian
        (tagged([4], tag=82), "tag"),
        (tagged([4], tag=86), "tag"),  # float64
        (tagged([4], tag=2), "tag"),
        (tagged([4], tag=40), "dtype"),
        (tagged([4], data="0000"), "schema"),
        (tagged([4], data=[0] * 16), "schema"),
        (tagged({"a": 4}), "schema"),
        (tagged(4), "schema"),
        (cbor2.CBORTag(40, []), "schema"),
        (cbor2.CBORTag(40, [[4]]), "schema"),
        (cbor2.CBORTag(40, [[4], b"\0" * 16]), "schema"),
        (cbor2.CBORTag(40, b"\0" * 16), "schema"),
        (cbor2.CBORTag(85, b"\0" * 16), "schema"),
        (b"\0" * 16, "schema"),
        (None, "schema"),
        ([1, 2], "schema"),
    ],
)
def test_hostile_typed_arrays_are_refused_without_taking_memory(value: object, reason: str) -> None:
    data = pack_raw(value)
    tracemalloc.start()
    try:
        assert refusal(data) == reason
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 200_000


@pytest.mark.parametrize("value", [[], 1, None, "a", b"", cbor2.CBORTag(40, 1)])
def test_a_pack_that_is_no_map_is_refused(value: object) -> None:
    assert refusal(cbor2.dumps(value)) == "schema"


def test_limits_of_packs_hold_on_both_sides() -> None:
    tensors = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.float32)}
    data = pack_tensors(tensors)
    for limits in (
        Limits(max_elements=5),
        Limits(max_dims=1),
        Limits(max_tensors=1),
        Limits(max_message_bytes=len(data) - 1),
        Limits(max_items=12),
        Limits(max_depth=3),
    ):
        assert refusal(data, limits) == "limit"
        with pytest.raises(WireError) as caught:
            pack_tensors(tensors, limits)
        assert caught.value.reason == "limit"
    exact = Limits(max_elements=6, max_dims=2, max_tensors=2, max_message_bytes=len(data))
    assert unpack_tensors(pack_tensors(tensors, exact), exact).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros(2, np.float64), "dtype"),
        (np.zeros(2, bool), "dtype"),
        (np.zeros(2, ">f4"), "dtype"),
        (np.zeros(2, object), "dtype"),
        (np.zeros(2, complex), "dtype"),
        (np.zeros(2, "U1"), "dtype"),
        (np.zeros(2, [("a", "f4")]), "dtype"),
        ([1.0, 2.0], "dtype"),
        (np.zeros((0, 3), np.float32), "shape"),
    ],
)
def test_what_cannot_be_packed_is_refused(array: object, reason: str) -> None:
    with pytest.raises(WireError) as caught:
        pack_tensors({"a": array})  # type: ignore[dict-item]
    assert caught.value.reason == reason


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=5),
        elements=st.floats(-(2.0**127), 2.0**127, width=32),
    )
)
def test_float16_keeps_its_promise(array: np.ndarray) -> None:
    sent, scale = compress(array, "float16")
    assert sent.dtype == np.float16
    back = expand("a", sent, scale)
    assert back.dtype == np.float32
    largest = float(np.abs(array).max())
    if largest == 0.0:
        assert not back.any()
    if largest >= 2.0**-112:
        allowed = np.maximum(2.0**-11 * np.abs(array.astype(np.float64)), 2.0**-39 * largest)
        assert (np.abs(back.astype(np.float64) - array) <= allowed).all()
    assert np.isfinite(back).all()


def test_float16_serves_small_gradients_and_large_activations() -> None:
    for magnitude in (1e-12, 1e-7, 1.0, 65504.0, 1e9, 3.4e38):
        array = (np.linspace(-1, 1, 101) * magnitude).astype(np.float32)
        back = expand("a", *compress(array, "float16"))
        assert np.allclose(back, array, rtol=2**-11, atol=0)


def test_float16_keeps_a_shape_without_dimensions() -> None:
    for value in (0.0, 1.5, -3e-9):
        sent, scale = compress(np.array(value, np.float32), "float16")
        assert isinstance(sent, np.ndarray)
        back = expand("a", sent, scale)
        assert isinstance(back, np.ndarray)
        assert (back.shape, back.dtype) == ((), np.float32)
        assert np.isclose(back, np.float32(value), rtol=2**-11, atol=0)


def test_float32_and_integers_are_left_alone() -> None:
    floats, integers = np.ones(3, np.float32), np.arange(3)
    for array, codec in ((floats, "float32"), (integers, "float32"), (integers, "float16")):
        sent, scale = compress(array, codec)
        assert sent is array
        assert scale is None


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1, True, "1", 1e-320, 1e300, 0.1, b"", [1.0]])
def test_bad_scales_are_refused(scale: object) -> None:
    with pytest.raises(WireError) as caught:
        expand("a", np.ones(3, np.float16), scale)  # type: ignore[arg-type]
    assert caught.value.reason == "schema"


def test_scale_and_float16_come_together() -> None:
    for array, scale in ((np.ones(3, np.float16), None), (np.ones(3, np.float32), 1.0), (np.arange(3), 1.0)):
        with pytest.raises(WireError) as caught:
            expand("a", array, scale)
        assert caught.value.reason == "schema"


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(ConfigError, match="float16, float32"):
        compress(np.ones(3, np.float32), "int8")
