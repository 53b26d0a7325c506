"""Data files: what is read, what is refused with which words."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.batch import Samples, batches
from edge_sdk.dataset import load_dataset, save_dataset
from edge_sdk.errors import BatchError


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def arrays(**changes: Any) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    made: dict[str, Any] = {
        "x_train": generator.integers(0, 256, (6, 8, 8), dtype=np.uint8),
        "y_train": np.arange(6) % 2,
        "x_test": generator.integers(0, 256, (4, 8, 8), dtype=np.uint8),
        "y_test": np.arange(4) % 2,
    }
    return {name: value for name, value in (made | changes).items() if value is not None}


def test_images_of_every_layout_are_read(tmp_path: Path) -> None:
    grey = load_dataset(write(tmp_path / "grey.npz", **arrays()))
    assert grey.input_shape == (1, 8, 8) and grey.classes == 2 and grey.notes == ()
    colour = arrays(x_train=np.zeros((6, 8, 8, 3), np.uint8), x_test=np.zeros((4, 8, 8, 3), np.uint8))
    assert load_dataset(write(tmp_path / "colour.npz", **colour)).input_shape == (3, 8, 8)
    medmnist = {
        "train_images": arrays()["x_train"],
        "train_labels": arrays()["y_train"][:, None],
        "test_images": arrays()["x_test"],
        "test_labels": arrays()["y_test"][:, None],
    }
    assert load_dataset(write(tmp_path / "med.npz", **medmnist)).train.y.shape == (6,)


def test_odd_sizes_are_padded_and_said_so(tmp_path: Path) -> None:
    odd = arrays(x_train=np.full((6, 9, 8), 7, np.uint8), x_test=np.full((4, 9, 8), 7, np.uint8))
    data = load_dataset(write(tmp_path / "odd.npz", **odd))
    assert data.input_shape == (1, 10, 8)
    assert "9x8 were padded with zeros to 10x8" in data.notes[0]
    assert (data.train.x[:, :, 9] == 0).all() and (data.train.x[:, :, :9] == 7).all()


def beats(**changes: Any) -> dict[str, Any]:
    """As from an ECG patch: one lead, int16, a normal beat or another one."""
    generator = np.random.default_rng(0)
    made: dict[str, Any] = {"kind": "signal", "input_range": [-300, 500]}
    for part, count in (("train", 6), ("test", 4)):
        made[f"x_{part}"] = generator.integers(-400, 600, (count, 256), dtype=np.int16)
        made[f"y_{part}"] = np.arange(count) % 2
    return {name: value for name, value in (made | changes).items() if value is not None}


def test_signals_stay_in_the_sensors_units_until_a_batch_is_made(tmp_path: Path) -> None:
    data = load_dataset(write(tmp_path / "ecg.npz", **beats()))
    assert data.input_shape == (1, 256) and data.train.x.dtype == np.int16
    assert data.input_range == (-300.0, 500.0) and data.notes == ()
    bare = write(tmp_path / "bare.npz", **beats(kind=None, input_range=None))
    assert load_dataset(bare, signal=True).input_range is None
    leads = beats(x_train=np.zeros((6, 12, 64)), x_test=np.zeros((4, 12, 64)))
    assert load_dataset(write(tmp_path / "leads.npz", **leads)).input_shape == (12, 64)
    assert load_dataset(write(tmp_path / "leads.npz", **leads | {"kind": "image"})).input_shape == (1, 12, 64)


def test_signals_of_odd_length_go_on_with_their_last_value(tmp_path: Path) -> None:
    odd = beats(x_train=np.full((6, 2, 9), -7, np.int16), x_test=np.full((4, 2, 9), -7, np.int16))
    data = load_dataset(write(tmp_path / "odd.npz", **odd))
    assert data.input_shape == (2, 10) and (data.train.x == -7).all() and (data.test.x == -7).all()
    assert data.notes == ("signals of length 9 were padded with their last value to 10",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": None}, "kind='signal'"),
        ({"kind": "sound"}, "'sound': write 'signal' or 'image'"),
        ({"kind": ["signal", "image"]}, "write 'signal' or 'image'"),
        ({"input_range": [500, -300]}, "lower first"),
        ({"input_range": [0, np.nan]}, "lower first"),
        ({"input_range": [0, 1, 2]}, "input_range"),
        ({"input_range": "0 to 1"}, "input_range"),
        ({"x_train": np.zeros((6, 65, 256), np.int16)}, "1 to 64 channels"),
        ({"x_train": np.zeros((6, 7), np.int16)}, "at least 8 steps"),
        ({"x_train": np.zeros((6, 1, 16, 16), np.int16)}, "needed are"),
        ({"x_train": np.zeros((6, 256), complex)}, "complex"),
        ({"x_train": np.linspace(-3, 3, 6 * 256).reshape(6, 256)}, "signed integers"),
    ],
)
def test_a_bad_file_of_signals_gives_one_clear_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BatchError, match=words) as caught:
        load_dataset(write(tmp_path / "bad.npz", **beats(**changes)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": None}, "it needs x_train, y_train, x_test, y_test"),
        ({"x_train": np.full((6, 8, 8), np.nan)}, "NaN"),
        ({"x_train": np.full((6, 8, 8), 200.0)}, "divide them"),
        ({"y_train": np.zeros(6, int)}, "single class"),
        ({"y_train": np.array([0, 1, 2, 5, 5, 5])}, "without gaps"),
        ({"y_train": np.array([1, 2, 1, 2, 1, 2])}, "relabel"),
        ({"y_test": np.array([0, 1, 2, 7])}, "test labels go from 0 to 7"),
        ({"y_test": np.array([0, -1, 0, 1])}, "relabel"),
        ({"y_train": np.array([0, 1, np.nan, 0, 1, 0])}, "integers"),
        ({"y_train": np.zeros(5, int)}, "labels of shape"),
        ({"x_train": np.zeros((6, 4, 4), np.uint8)}, "8x8"),
        ({"x_train": np.zeros((6, 8, 10), np.uint8)}, "must agree"),
        ({"y_train": np.array([{}, 1, 0, 1, 0, 1], object)}, "plain arrays"),
    ],
)
def test_a_bad_file_gives_one_clear_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BatchError, match=words) as caught:
        load_dataset(write(tmp_path / "bad.npz", **arrays(**changes)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no zip at all", None])
def test_a_damaged_or_missing_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "data.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BatchError, match=r"no data file|readable"):
        load_dataset(path)


def test_a_single_array_is_not_a_data_file(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(BatchError, match="single array"):
        load_dataset(tmp_path / "one.npy")


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    part = Samples(np.arange(4 * 64, dtype=np.uint8).reshape(4, 1, 8, 8), np.array([0, 1, 1, 0]))
    save_dataset(tmp_path / "folder" / "x.npz", part, part)
    back = load_dataset(tmp_path / "folder" / "x.npz")
    assert np.array_equal(back.train.x, part.x) and np.array_equal(back.test.y, part.y)
    assert back.train.x.shape == part.x.shape and back.input_range is None
    ecg = Samples(np.arange(-32, 32, dtype=np.int16).reshape(4, 1, 16), part.y)
    save_dataset(tmp_path / "ecg.npz", ecg, ecg, input_range=(-20, 20))
    again = load_dataset(tmp_path / "ecg.npz")
    assert np.array_equal(again.train.x, ecg.x) and again.train.x.dtype == np.int16
    assert again.input_range == (-20.0, 20.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(BatchError, match="cannot be written"):
        save_dataset(tmp_path / "file" / "x.npz", part, part)


def test_a_device_need_not_have_every_class_of_its_bundle(tmp_path: Path) -> None:
    path, x = tmp_path / "d.npz", np.zeros((6, 8, 8), np.uint8)
    np.savez(path, x_train=x, y_train=np.array([0, 3] * 3), x_test=x, y_test=np.array([1, 2] * 3))
    assert load_dataset(path, classes=4).classes == 4
    with pytest.raises(BatchError, match="without gaps"):
        load_dataset(path)
    with pytest.raises(BatchError, match="training labels go from 0 to 3, but there are 3 classes"):
        load_dataset(path, classes=3)
    np.savez(path, x_train=x, y_train=np.full(6, 2), x_test=x, y_test=np.full(6, 2))
    assert load_dataset(path, classes=3).classes == 3


def test_groups_are_read_kept_and_taken_along(tmp_path: Path) -> None:
    groups = np.array([7, 7, -1, 3], np.int16)
    path = write(
        tmp_path / "grouped.npz",
        **arrays(x_train=np.zeros((4, 8, 8), np.uint8), y_train=[0, 1, 0, 1]),
        group_train=groups,
    )
    train = load_dataset(path).train
    assert train.groups is not None and train.groups.dtype == np.int64 and train.groups.tolist() == [7, 7, -1, 3]
    taken = train.take(np.array([3, 0])).groups
    assert taken is not None and taken.tolist() == [3, 7]
    save_dataset(tmp_path / "again.npz", train, load_dataset(path).test)
    again = load_dataset(tmp_path / "again.npz").train.groups
    assert again is not None and again.tolist() == [7, 7, -1, 3]
    (batch, *_) = itertools.islice(batches(train, 4, seed=0, device="d", shift=1), 1)
    assert batch.groups is not None and sorted(batch.groups) == [-1, 3, 7, 7]


@pytest.mark.parametrize("groups", [np.zeros(3, int), np.zeros((4, 1), int), np.zeros(4), np.array(["a"] * 4)])
def test_groups_that_are_none_are_refused(tmp_path: Path, groups: np.ndarray[Any, Any]) -> None:
    path = write(
        tmp_path / "grouped.npz",
        **arrays(x_train=np.zeros((4, 8, 8), np.uint8), y_train=[0, 1, 0, 1]),
        group_train=groups,
    )
    with pytest.raises(BatchError, match=r"group_train is .*: write one integer for each of the 4 training samples"):
        load_dataset(path)
