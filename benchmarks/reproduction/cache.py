"""Results of cells on disk, under a name that holds everything they depend on: a rerun goes on where one stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from benchmarks.reproduction.plan import Cell, Settings

__all__ = ["Cache", "code_version"]

_ROOT = Path(__file__).resolve().parent.parent.parent
_CODE = (
    "server_sdk/audit/attacks/decoder.py",
    "server_sdk/audit/metrics.py",
    "server_sdk/fusion.py",
    "server_sdk/recovery.py",
    "server_sdk/reference/guide.py",
    "server_sdk/reference/networks.py",
    "server_sdk/reference/perturbation.py",
    "server_sdk/streams.py",
    "server_sdk/trainer.py",
    "benchmarks/reproduction/cells.py",
    "benchmarks/reproduction/networks.py",
    "benchmarks/reproduction/samples.py",
    "benchmarks/reproduction/scores.py",
)


@cache
def code_version() -> str:
    """Hash of every source file that decides a result."""
    digest = hashlib.sha256()
    for name in _CODE:
        digest.update((_ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Cache:
    """A folder of results.

    Attributes:
        folder: made when the first result is kept.
    """

    folder: Path

    def key(self, cell: Cell, settings: Settings, digest: str) -> str:
        """Name of a cell's files: hash of cell, settings, data (its digest) and code."""
        parts = [asdict(cell), asdict(settings), digest, code_version()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]

    def result(self, key: str) -> dict[str, Any] | None:
        """What was kept, or None; a damaged file counts as none."""
        try:
            found = json.loads((self.folder / f"{key}.json").read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def holds_tensors(self, key: str) -> bool:
        """Whether the tensors of a cell are there, and not its result alone."""
        return (self.folder / f"{key}.safetensors").is_file()

    def tensors(self, key: str) -> dict[str, Tensor]:
        """The tensors of a cell that is done."""
        return safetensors.torch.load_file(self.folder / f"{key}.safetensors")

    def keep(self, key: str, result: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write both, the result last and in one move: a file that is there is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if tensors:
            whole = {name: value.contiguous() for name, value in tensors.items()}
            safetensors.torch.save_file(whole, self.folder / f"{key}.safetensors")
        partial = self.folder / f"{key}.partial"
        partial.write_text(json.dumps(result))
        partial.replace(self.folder / f"{key}.json")
