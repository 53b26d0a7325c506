"""A run on disk: its log, its checkpoints, and how a server that was killed stands again where it stood.

<folder>/log/            records since the oldest checkpoint that is kept
<folder>/checkpoints/    the last two checkpoints
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from edge_sdk.wire import Message
from server_sdk.checkpoint import Checkpoints, checkpoint_files, facts_of
from server_sdk.errors import CheckpointError
from server_sdk.log import Log, Place, Record, remove, scan
from server_sdk.training_run import Outgoing, TrainingRun

__all__ = ["Durability", "Journal", "Kept"]

Event = dict[str, Any]


@dataclass(frozen=True)
class Durability:
    """What a crash may cost.

    Attributes:
        mode: ``log``: nothing (write-ahead log and checkpoints). ``checkpoint``: what was trained since the last
            checkpoint. ``off``: the whole run.
        sync: when the log reaches the disk itself, see ``Log``; matters for a loss of power, not for a killed process.
        checkpoint_every: rounds between two checkpoints.
        keep_log: keep every record after it was used; the log holds activations.
    """

    mode: Literal["log", "checkpoint", "off"] = "log"
    sync: str | float = "never"
    checkpoint_every: int = 50
    keep_log: bool = False


@dataclass(frozen=True)
class Kept:
    """A run that a folder holds.

    Attributes:
        run: its id.
        round: rounds that were done at its last checkpoint.
        finished: whether it was through.
    """

    run: str
    round: int
    finished: bool


class Journal:
    """Writes what happens in a run, and reads it again.

    Args:
        folder: of the run; created.
        durability: what is written.
        on_event: called with a plain dictionary for what an operator should see.

    Raises:
        LogError, CheckpointError: the disk refuses, another server uses the folder, or what it holds is damaged.
    """

    def __init__(
        self,
        folder: Path,
        durability: Durability | None = None,
        *,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._durability = durability or Durability()
        self._on_event = on_event
        self._folder = folder
        self._log: Log | None = None
        self._checkpoints: Checkpoints | None = None
        self._needed: dict[int, int] = {}  # position of a checkpoint -> the first record that it needs
        self._checkpointed = 0  # rounds
        self._tried = 0  # rounds, when a checkpoint was last due
        if self._durability.mode == "log":  # first, for its lock keeps a second server from the checkpoints, too
            self._log = Log(folder / "log", sync=self._durability.sync, on_note=self._note)
        if self._durability.mode != "off":
            self._checkpoints = Checkpoints(folder / "checkpoints", on_note=self._note)

    @classmethod
    def forget(cls, folder: Path) -> None:
        """Remove log and checkpoints of whatever run a folder holds.

        Raises:
            LogError: another server uses the folder, or the disk refuses.
        """
        remove(folder / "log")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    @staticmethod
    def kept(folder: Path) -> Kept | None:
        """The run that a folder holds, or None; changes nothing.

        Raises:
            CheckpointError: it held one, and no checkpoint of it is readable.
        """
        files = checkpoint_files(folder / "checkpoints") if (folder / "checkpoints").is_dir() else []
        for path, _ in reversed(files):
            with contextlib.suppress(CheckpointError):
                facts = facts_of(path)
                return Kept(str(facts.get("run")), int(facts.get("round", 0)), bool(facts.get("finished")))
        # The very first record is written before the first checkpoint, and alone it is no loss.
        if files or ((folder / "log").is_dir() and len(list(islice(scan(folder / "log"), 2))) > 1):
            raise CheckpointError(
                f"{folder} holds a run without a readable checkpoint: restore one from a copy, or forget the run "
                "with --fresh"
            )
        return None

    @property
    def durable(self) -> bool:
        """Whether a stopped run can go on."""
        return self._durability.mode != "off"

    def begin(self, run: TrainingRun) -> None:
        """Make a new run durable before any device hears of it."""
        if run.position == 0:
            self.write(run, "begin", {"run": run.run, "rounds": run.plan.rounds, "fronts": run.plan.fronts})
        self.checkpoint(run)

    def restore(self, run: TrainingRun) -> None:
        """Bring a fresh run to where the kept one stood: the newest checkpoint, then every record behind it.

        Raises:
            CheckpointError: there is none, or it is of another run, plan, bundle or model.
            LogError: the log is damaged.
        """
        began = time.monotonic()
        newest = None if self._checkpoints is None else self._checkpoints.newest()
        if newest is None:
            raise CheckpointError(f"{self._folder} holds no run to go on with: start without --resume")
        mode = self._durability.mode
        if newest.facts["durability"] != mode:
            raise CheckpointError(
                f"the run was begun with durability {newest.facts['durability']}, not {mode}: keep it"
            )
        if self._log is not None and self._log.next_position <= newest.position:
            raise CheckpointError(
                f"{self._folder} has a checkpoint after record {newest.position}, but its log ends before: "
                "the log was removed or was not on disk when the power went; --fresh begins a new run"
            )
        needed = int(newest.facts["needed"])
        run.load(newest, () if self._log is None else self._log.read(needed))
        self._needed[newest.position] = needed
        self._checkpointed = run.round
        replayed = 0
        if self._log is not None:
            for record, place in self._log.read(newest.position + 1):
                run.apply(record, place)
                replayed += 1
        seconds = round(time.monotonic() - began, 3)
        self._on_event({"event": "resumed", "round": run.round, "records": replayed, "seconds": seconds})

    def write(
        self, run: TrainingRun, kind: str, fields: Mapping[str, Any], body: bytes = b"", message: Message | None = None
    ) -> list[Outgoing]:
        """Write a record, then apply it; returns the replies that it brings about.

        Raises:
            LogError: the disk refuses; the run is as it was.
        """
        place: Place | None = None
        if self._log is not None:
            place = self._log.append(kind, fields, body)
        return run.apply(Record(run.position + 1, kind, fields, body), place, message)

    def checkpoint_if_due(self, run: TrainingRun) -> bool:
        """Write a checkpoint when enough rounds were done since the last one was written or tried.

        Returns:
            Whether one was written.

        Raises:
            CheckpointError, LogError: see ``checkpoint``.
        """
        if run.round - max(self._checkpointed, self._tried) < self._durability.checkpoint_every:
            return False
        self._tried = run.round
        self.checkpoint(run)
        return True

    def checkpoint(self, run: TrainingRun, *, finished: bool = False) -> None:
        """Write a checkpoint and let go of the records that no kept checkpoint needs.

        Raises:
            CheckpointError, LogError: the disk refuses; the checkpoints before it stay.
        """
        if self._checkpoints is None:
            return
        if self._log is not None:
            self._log.flush()
        needed = run.oldest_needed
        state = run.dump()
        facts = {**state.facts, "needed": needed, "finished": finished, "durability": self._durability.mode}
        self._checkpoints.write(replace(state, facts=facts))
        self._checkpointed = run.round
        self._needed[run.position] = needed
        kept = self._checkpoints.positions()
        self._needed = {position: first for position, first in self._needed.items() if position in kept}
        if self._log is not None and not self._durability.keep_log:
            self._log.rotate()
            # Of a checkpoint of an earlier life it is not known what it needs: all is kept until it is gone.
            if set(kept) <= self._needed.keys():
                self._log.drop_before(run.position + 1 if finished else min(self._needed.values()))
        self._on_event({"event": "checkpoint", "round": run.round, "position": run.position})

    def close(self) -> None:
        """Release the log."""
        if self._log is not None:
            self._log.close()

    def _note(self, text: str) -> None:
        self._on_event({"event": "note", "text": text})
