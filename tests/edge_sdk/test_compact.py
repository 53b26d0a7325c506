"""Weights in 8 bits: how far from exact, bit-equal wherever they are read, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_sdk.codec import pack_tensors, unpack_tensors
from edge_sdk.compact import compacted, expanded
from edge_sdk.errors import BundleError

W = np.array([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0], [1e-3, 2e-3, -4e-3]], np.float32)
finite = st.floats(-1e6, 1e6, width=32)


def test_a_worked_example() -> None:
    kept = compacted({"p.w": W, "p.bias": W[0], "b.mean": W})
    assert kept["p.w"].dtype == np.uint8 and kept["p.w"].tolist() == [[255, 64, 160], [128] * 3, [160, 192, 1]]
    assert kept["q.w"].tolist() == pytest.approx([1 / 127, 1.0, 4e-3 / 127])
    assert kept["p.bias"] is not None and kept["p.bias"].dtype == np.float32 and kept["b.mean"].dtype == np.float32


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=finite))
def test_no_weight_is_off_by_more_than_half_a_step_of_its_row(array: npt.NDArray[np.float32]) -> None:
    kept = compacted({"p.w": array})
    back = expanded(unpack_tensors(pack_tensors(kept)))["p.w"]
    step = kept["q.w"].reshape(-1, *[1] * (array.ndim - 1))
    assert back.dtype == np.float32 and back.shape == array.shape
    assert (np.abs(back - array) <= 0.5001 * step).all()
    assert (expanded(kept)["p.w"] == back).all()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"p.w": np.zeros((2, 2), np.uint8)}, "no scale for each row"),
        ({"p.w": np.zeros((2, 2), np.uint8), "q.w": np.ones(3, np.float32)}, "no scale for each row"),
        ({"p.w": np.zeros((2, 2), np.uint8), "q.w": np.ones(2, np.int64)}, "no scale for each row"),
        ({"p.w": np.zeros(2, np.uint8), "q.w": np.ones(2, np.float32)}, "no scale for each row"),
        ({"p.w": np.zeros((2, 2), np.uint8), "q.w": np.array([1, np.nan], np.float32)}, "no positive numbers"),
        ({"p.w": np.zeros((2, 2), np.uint8), "q.w": np.array([1, 0], np.float32)}, "no positive numbers"),
        ({"q.w": np.ones(2, np.float32)}, "belong to no parameter"),
        ({"p.w": W, "q.w": np.ones(3, np.float32)}, "belong to no parameter"),
    ],
)
def test_what_does_not_belong_together_is_refused(tensors: dict[str, npt.NDArray[Any]], words: str) -> None:
    with pytest.raises(BundleError, match=words):
        expanded(tensors)
