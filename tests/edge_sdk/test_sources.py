"""Where windows come from: arrays, files, pipes, a sensor's driver."""

from __future__ import annotations

import os
import sys
import threading
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.errors import BatchError, ConfigError
from edge_sdk.sources import array_windows, csv_samples, npz_windows, python_samples, recording_samples
from edge_sdk.windows import Reading, Windower, Windowing


def test_arrays_and_npz_files_are_windows_already(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.uint8).reshape(3, 2, 4)
    assert [(w.number, w.x.tolist()) for w in array_windows(x)] == list(enumerate(x.tolist()))
    np.savez(tmp_path / "a.npz", y=np.zeros(3), x_test=x, other=x[:1])
    assert [w.x.tolist() for w in npz_windows(tmp_path / "a.npz")] == x.tolist()
    assert len(list(npz_windows(tmp_path / "a.npz", key="other"))) == 1
    with pytest.raises(BatchError, match="it needs nothing_like_it"):
        npz_windows(tmp_path / "a.npz", key="nothing_like_it")
    with pytest.raises(BatchError, match="no data file"):
        npz_windows(tmp_path / "none.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK\3\4")
    with pytest.raises(BatchError, match="save it again"):
        npz_windows(tmp_path / "torn.npz")


def test_a_recording_has_times_where_its_rate_is_known() -> None:
    recording = np.arange(6).reshape(2, 3)
    assert [list(each) for each in recording_samples(recording)] == [[0, 3], [1, 4], [2, 5]]
    assert [each.at_s for each in recording_samples(recording, hz=10)] == [0, 0.1, 0.2]
    with pytest.raises(BatchError, match="array_windows"):
        next(recording_samples(np.zeros((1, 2, 3))))


def test_csv_columns_by_name_and_by_number(tmp_path: Path) -> None:
    path = tmp_path / "ecg.csv"
    path.write_text('time,"II",V1\n0.0,1,10\n\n0.5,2,20\r\n1.0,3,30\n')
    assert list(csv_samples(path, columns=["V1", "II"])) == [[10, 1], [20, 2], [30, 3]]
    assert list(csv_samples(path, time_column="time")) == [
        Reading(0.0, [1, 10]),
        Reading(0.5, [2, 20]),
        Reading(1.0, [3, 30]),
    ]
    path.write_text("1;10\n2;20\n")
    assert list(csv_samples(path, columns=[1], delimiter=";")) == [[10], [20]]
    with pytest.raises(BatchError, match="no column 'II'"):
        list(csv_samples(path, columns=["II"], delimiter=";"))
    with pytest.raises(BatchError, match="cannot be read"):
        list(csv_samples(tmp_path / "none.csv"))


def test_damaged_rows_are_nan_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "worn.csv"
    path.write_bytes(b"a,b\n1,2\n3\n4,x\n\xff\xfe,6\n7,8\n")
    rows = np.array(list(csv_samples(path)))
    assert np.isnan(rows).tolist() == [[False, False], [False, True], [False, True], [True, False], [False, False]]
    path.write_bytes(b"1,2\n" + b"9" * 70_000)
    with pytest.raises(BatchError, match="no CSV of samples"):
        list(csv_samples(path))
    path.write_bytes(b"")
    assert list(csv_samples(path)) == []


def test_a_csv_file_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    line = ",".join(["0.123456789012345678"] * 8) + "\n"
    path.write_text(line * 20_000)
    windower = Windower(Windowing(100, channels=8))
    tracemalloc.start()
    try:
        count = sum(windower.add(sample) is not None for sample in csv_samples(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 200 and path.stat().st_size > 3_000_000
    assert peak < 500_000


def test_a_pipe_is_a_live_sensor(tmp_path: Path) -> None:
    pipe = tmp_path / "sensor"
    os.mkfifo(pipe)
    seen = threading.Event()

    def sense() -> None:
        with pipe.open("w", buffering=1) as file:
            file.write("0.1\n")
            assert seen.wait(10), "the first sample is read before the second is there"
            file.write("0.2\n")

    sensor = threading.Thread(target=sense)
    sensor.start()
    samples = csv_samples(pipe)
    assert next(samples) == [0.1]
    seen.set()
    assert list(samples) == [[0.2]]
    sensor.join(10)


def test_a_pipe_whose_writer_comes_back_goes_on(tmp_path: Path) -> None:
    pipe = tmp_path / "sensor"
    os.mkfifo(pipe)
    closed = threading.Semaphore(0)

    def sense() -> None:
        for life in range(3):
            with pipe.open("w") as file:
                file.write(f"time,II\n0,{life}\n")
            assert closed.acquire(timeout=10)

    sensor = threading.Thread(target=sense)
    sensor.start()
    seen = []
    for values in islice(csv_samples(pipe, columns=["II"], again=True), 3):
        seen.append(values)
        closed.release()
    assert seen == [[0], [1], [2]]
    sensor.join(10)


def test_a_heading_that_is_said_again_is_no_sample(tmp_path: Path) -> None:
    """A writer that is back before the reader saw it go begins anew in the middle of what the reader reads."""
    (tmp_path / "sensor.csv").write_text("time,II\n0,1\ntime,II\n0,2\nII,time\n")
    assert list(islice(csv_samples(tmp_path / "sensor.csv", columns=["II"]), 2)) == [[1], [2]]
    *_, damaged = csv_samples(tmp_path / "sensor.csv", columns=["II"])
    assert np.isnan(damaged).all()


def test_standard_input_and_a_sensors_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "input").write_text("1,2\n3,4\n")
    with (tmp_path / "input").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert list(csv_samples("-")) == [[1, 2], [3, 4]]
    (tmp_path / "pulse_driver.py").write_text("def samples():\n    yield from range(5)\nnothing = lambda: None\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(islice(python_samples("pulse_driver:samples"), 3)) == [0, 1, 2]
    entries: list[Any] = ["pulse_driver:missing", "no_such_module:f", "pulse_driver", ":x"]
    for entry in entries:
        with pytest.raises(ConfigError, match="module:function"):
            python_samples(entry)
    with pytest.raises(ConfigError, match="must give an iterable"):
        python_samples("pulse_driver:nothing")
