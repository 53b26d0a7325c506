"""The log as activation store: samples that crossed the wire once, and the server's epochs over them.

Only an index is kept in memory; the numbers stay in the log's files and are mapped from there when a batch needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sdk import cbor
from edge_sdk.codec import TENSOR_TAGS, from_typed_array
from edge_sdk.packing import Codes, read_packed
from edge_sdk.wire import DEFAULT_LIMITS, Message
from server_sdk.errors import LogError
from server_sdk.fronts import share_of
from server_sdk.log import Place
from server_sdk.replies import Key

__all__ = ["ActivationStore"]


@dataclass(frozen=True)
class _Batch:
    """Samples of one message: where their activations lie, and their labels."""

    device: str
    path: Path
    offset: int
    shape: tuple[int, ...]  # as sent: of packed samples (N, bytes of one)
    dtype: np.dtype[Any]
    scale: float
    codes: Codes | None  # of packed samples
    labels: NDArray[np.int64] = field(repr=False)

    def row(self, file: NDArray[np.uint8], index: int) -> NDArray[np.float32]:
        size = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        start = self.offset + index * size
        sent = file[start : start + size]
        if self.codes is not None:
            values: NDArray[np.float32] = self.codes.expand(sent[None])[0]
            return values
        row = sent.view(self.dtype).astype(np.float32).reshape(self.shape[1:])
        return row if self.scale == 1.0 else row * np.float32(self.scale)


class ActivationStore:
    """Samples in the order of the log, and batches of them in an order of their own in each epoch.

    Args:
        seed: of the epochs' orders.
        batch: samples of one round.
        weights: ``equal``: each device counts the same; ``samples``: each sample does.
    """

    def __init__(self, seed: int, batch: int, weights: str) -> None:
        self._seed = seed
        self._batch = batch
        self._weights = weights
        self._batches: list[_Batch] = []
        self._rows: list[tuple[int, int]] = []  # of each sample: which batch, and where in it
        self._steps: dict[tuple[str, str], set[int]] = {}
        self._firsts: dict[str, set[int]] = {}
        self._counts: dict[str, int] = {}
        self._totals: dict[str, int] = {}
        self._files: dict[Path, NDArray[np.uint8]] = {}
        self._epoch = 0
        self._size = 0
        self._cursor = 0
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def devices(self) -> tuple[str, ...]:
        """Who has samples here, by name."""
        return tuple(sorted(self._counts))

    @property
    def complete(self) -> tuple[str, ...]:
        """Devices of which every sample is here."""
        return tuple(name for name in self.devices if self._counts[name] >= self._totals[name])

    @property
    def epoch(self) -> int:
        """Number of the epoch under way, from 1."""
        return self._epoch

    @property
    def ready(self) -> bool:
        """Whether the epoch has another batch."""
        return self._cursor < self._size and self._cursor + min(self._batch, self._size) <= self._size

    def count(self, device: str) -> int:
        """Samples of a device that are here."""
        return self._counts.get(device, 0)

    def holds(self, key: Key) -> bool:
        """Whether that step's samples are here."""
        return key[2] in self._steps.get((key[0], key[1]), ())

    def add(self, device: str, message: Message, body: bytes, place: Place) -> None:
        """Take the samples of a ``store`` message; samples that are here already (of an earlier life) stay as they are.

        Args:
            body: of the message.
            place: where it lies in the log.

        Raises:
            KeyError, ValueError: not a body of such a message.
        """
        self._steps.setdefault((device, message.session), set()).add(message.step)
        first, labels = int(message.fields["first"]), message.tensors["labels"]
        firsts = self._firsts.setdefault(device, set())
        self._totals[device] = int(message.fields["total"])
        if first in firsts:
            return
        firsts.add(first)
        content: Any = cbor.loads(body, DEFAULT_LIMITS, TENSOR_TAGS)
        entry = content["tensors"]["activations"]
        codes: Codes | None = None
        if "bits" in entry:
            raw, codes = read_packed("activations", entry)
        else:
            raw = from_typed_array("activations", entry["data"])
        offset = place.offset + _find(body, raw.tobytes())
        dtype, scale = raw.dtype.newbyteorder("<"), float(entry.get("scale", 1.0))
        self._rows += [(len(self._batches), index) for index in range(len(labels))]
        self._batches.append(_Batch(device, place.path, offset, raw.shape, dtype, scale, codes, labels))
        self._counts[device] = self._counts.get(device, 0) + len(labels)

    def begin_epoch(self) -> None:
        """Go through all that is here by now, in a new order that depends on seed and epoch alone."""
        self._begin(self._epoch + 1, len(self._rows))

    def next_batch(self) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32] | None]:
        """The epoch's next batch.

        Returns:
            Activations float32 (N, \\*cut), labels int64 (N), and weights float32 (N) with mean 1, or None where each
            sample counts the same.

        Raises:
            LogError: the log's file cannot be read.
        """
        size = min(self._batch, self._size)
        index = self._order[self._cursor : self._cursor + size]
        self._cursor += size
        chosen = [(self._batches[self._rows[i][0]], self._rows[i][1]) for i in index.tolist()]
        activations = np.stack([batch.row(self._map(batch), row) for batch, row in chosen])
        labels = np.array([batch.labels[row] for batch, row in chosen], np.int64)
        if self._weights == "samples":
            return activations, labels, None
        names = self.devices
        rare = share_of([self._counts[name] for name in names], "samples")
        weight = {name: 1.0 / share for name, share in zip(names, rare, strict=True)}
        weights = np.array([weight[batch.device] for batch, _ in chosen], np.float32)
        return activations, labels, weights / weights.mean()

    def dump(self) -> dict[str, Any]:
        """Where the epoch stands, for a checkpoint; the samples themselves are in the log."""
        return {"epoch": self._epoch, "size": self._size, "cursor": self._cursor}

    def load(self, facts: Mapping[str, Any]) -> None:
        """Go on where ``dump`` was called; the samples were added before."""
        if facts["epoch"]:
            self._begin(int(facts["epoch"]), int(facts["size"]))
            self._cursor = int(facts["cursor"])

    def _begin(self, epoch: int, size: int) -> None:
        if size > len(self._rows):
            raise ValueError(f"{size} samples were stored, the log holds {len(self._rows)}")
        self._epoch, self._size, self._cursor = epoch, size, 0
        self._order = np.random.default_rng([self._seed, epoch]).permutation(size)

    def _map(self, batch: _Batch) -> NDArray[np.uint8]:
        file = self._files.get(batch.path)
        end = batch.offset + int(np.prod(batch.shape)) * batch.dtype.itemsize
        if file is None or len(file) < end:
            try:
                file = np.memmap(batch.path, np.uint8, mode="r")
            except (OSError, ValueError) as exc:
                raise LogError(f"{batch.path} cannot be read: {exc}: the samples of the run are in it") from exc
            self._files[batch.path] = file
        return file


def _find(body: bytes, part: bytes) -> int:
    """Where a part lies in a body; ``bytes.index`` would first analyse all of the part."""
    at = body.index(part[:64])
    while body[at : at + len(part)] != part:  # a memoryview would compare item by item
        at = body.index(part[:64], at + 1)
    return at
