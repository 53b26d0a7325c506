"""Where windows come from: arrays, ``.npz`` files, CSV files or pipes, any Python iterator of sensor samples.

A source is an iterable that ``EdgeClient.stream`` reads in a thread of its own. It gives ``Window`` objects where the
windows are there already (arrays), and else samples (``Reading``, C numbers, or one number), which the stream makes
windows of. Samples are in the sensor's units where the bundle has an ``input_range``, else in [0, 1]; arrays follow the
rules of ``edge_sdk.batch``.
"""

from __future__ import annotations

import importlib
import math
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import BatchError, ConfigError
from edge_sdk.windows import Reading, Window

__all__ = ["array_windows", "csv_samples", "npz_windows", "python_samples", "recording_samples"]

_LONGEST_LINE = 1 << 16
_KEYS = ("x", "x_test", "test_images", "x_train", "train_images")


def array_windows(x: npt.ArrayLike) -> Iterator[Window]:
    """Windows that are there already.

    Args:
        x: (N, *input_shape), as ``as_batch`` takes it; of a memory-mapped array each window is read in its turn.
    """
    array = np.asanyarray(x)
    for number, each in enumerate(array):
        yield Window(number, np.asarray(each))


def recording_samples(x: npt.ArrayLike, *, hz: float | None = None) -> Iterator[Any]:
    """The samples of one long recording.

    Args:
        x: (C, samples), or (samples,) of one channel.
        hz: samples in a second, by which each gets its time from 0 on; None: they have none.

    Raises:
        BatchError: another shape.
    """
    array = np.atleast_2d(np.asanyarray(x))
    if array.ndim != 2:
        raise BatchError(f"a recording is (C, samples), this one is of shape {array.shape}: use array_windows")
    for number in range(array.shape[1]):
        values = array[:, number]
        yield values if hz is None else Reading(number / hz, values)


def npz_windows(path: str | Path, *, key: str | None = None) -> Iterator[Window]:
    """Windows of an ``.npz`` file, which is read as a whole.

    Args:
        path: the file.
        key: name of the array (N, *input_shape); None takes the first of x, x_test, test_images, x_train, train_images.

    Raises:
        BatchError: no such file or array.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = _KEYS if key is None else (key,)
            found = next((name for name in names if name in archive.files), None)
            if found is None:
                raise BatchError(
                    f"{path} holds {', '.join(sorted(archive.files)[:12]) or 'nothing'}: it needs {' or '.join(names)}"
                )
            x = archive[found]
    except FileNotFoundError as exc:
        raise BatchError(f"there is no data file at {path}") from exc
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as exc:
        raise BatchError(f"{path} is not a readable .npz file of plain arrays: save it again with numpy.savez") from exc
    return array_windows(x)


def csv_samples(
    path: str | Path,
    *,
    columns: Sequence[str | int] | None = None,
    time_column: str | int | None = None,
    delimiter: str = ",",
    again: bool = False,
) -> Iterator[Any]:
    """The rows of a CSV file, one sample each; a line is read when its turn comes, so a pipe is a live sensor.

    A row that is damaged (a missing column, no number) is NaN: its windows are refused, the others go on.

    Args:
        path: a file, a named pipe, or ``-`` for the standard input.
        columns: the channels, by the names of the first row or as numbers from 0; None: all but the time.
        time_column: the column with the time in seconds, by name or number; None: samples have no times.
        delimiter: one character.
        again: open it again at its end, without end: a named pipe, whose writer may go and come back.

    Raises:
        BatchError: no such file; a name that the first row does not have; a line longer than 65,536 characters.
    """
    if str(path) == "-":
        yield from _rows(sys.stdin, "standard input", columns, time_column, delimiter)
        return
    try:
        while True:
            with Path(path).open(encoding="utf-8", errors="replace", newline="") as file:
                yield from _rows(file, str(path), columns, time_column, delimiter)
            if not again:
                return
    except OSError as exc:
        raise BatchError(f"{path} cannot be read: {exc.strerror or exc}") from exc


def python_samples(entry: str) -> Iterable[Any]:
    """Samples or windows of a Python function, for a sensor that has a driver.

    Args:
        entry: ``module:function``; it is called without arguments and gives an iterable.

    Raises:
        ConfigError: no such module or function.
    """
    module, _, name = entry.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise ConfigError(f"there is no sensor {entry!r} ({exc}): write module:function, both importable") from exc
    made = function()
    if not isinstance(made, Iterable):
        raise ConfigError(f"{entry} gives {type(made).__name__}: it must give an iterable of samples or windows")
    return made


def _rows(
    file: IO[str],
    name: str,
    columns: Sequence[str | int] | None,
    time_column: str | int | None,
    delimiter: str,
) -> Iterator[Any]:
    first = _cells(file, name, delimiter)
    if first is None:
        return
    heading = None if all(_is_number(cell) for cell in first) else first
    clock = None if time_column is None else _position(time_column, heading, name)
    if columns is None:
        positions = [position for position in range(len(first)) if position != clock]
    else:
        positions = [_position(column, heading, name) for column in columns]
    cells = first if heading is None else _cells(file, name, delimiter)
    while cells is not None:
        if cells != heading:  # said again: the writer of a pipe came back before we saw that it was gone
            values = [_number(cells, position) for position in positions]
            yield values if clock is None else Reading(_number(cells, clock), values)
        cells = _cells(file, name, delimiter)


def _cells(file: IO[str], name: str, delimiter: str) -> list[str] | None:
    """The next row, None at the end; blank lines are left out."""
    while line := file.readline(_LONGEST_LINE + 1):
        if len(line) > _LONGEST_LINE:
            raise BatchError(f"{name} has a line of more than {_LONGEST_LINE} characters: it is no CSV of samples")
        if not line.isspace():
            return [cell.strip().strip('"') for cell in line.split(delimiter)]
    return None


def _position(column: str | int, heading: list[str] | None, name: str) -> int:
    if isinstance(column, int):
        return column
    if heading is None or column not in heading:
        shown = "no names" if heading is None else ", ".join(heading[:12])
        raise BatchError(f"{name} has no column {column!r} (its first row has {shown}): correct the name")
    return heading.index(column)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _number(cells: list[str], position: int) -> float:
    try:
        return float(cells[position])
    except (IndexError, ValueError):
        return math.nan
