"""What long work shows while it goes on: redrawn in place on a terminal, as lines anywhere else.

A run's display draws from the service's events alone, so the same one serves the server's own terminal and whoever
reads its events from a pipe.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

__all__ = ["RunDisplay", "StageDisplay", "megabytes"]

_BARS = " ▁▂▃▄▅▆▇█"
_COLOURS = {"online": "cyan", "training": "green", "done": "blue", "offline": "red"}


def megabytes(count: float) -> str:
    """Bytes as MB of 10^6."""
    return f"{count / 1e6:,.1f} MB"


def _sparkline(values: list[float], width: int = 40) -> str:
    shown = values[-width:]
    low, high = min(shown), max(shown)
    scale = (len(_BARS) - 2) / (high - low) if high > low else 0.0
    return "".join(_BARS[1 + round((value - low) * scale)] for value in shown)


class StageDisplay:
    """Show the stages of one command: on a terminal as one line that changes; anywhere else a line for each stage, and
    one more whenever ``every_s`` have passed in it.

    Args:
        console: where to draw; standard error by default.
        every_s: between two lines of one stage.
    """

    def __init__(self, console: Console | None = None, *, every_s: float = 30.0) -> None:
        self._console = console or Console(stderr=True)
        self._status = self._console.status("beginning")
        self._every_s = every_s
        self._stage = ""
        self._said_at = 0.0

    def __enter__(self) -> StageDisplay:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._status.stop()

    def stage(self, name: str) -> None:
        """Another stage has begun."""
        self._show(name, name)

    def step(self, stage: str, done: int, of: int, loss: float) -> None:
        """The stage has come so far."""
        self._show(stage, f"{stage}, {done:,} of {of:,}, loss {loss:.4f}")

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self, stage: str, text: str) -> None:
        if self._console.is_terminal:
            self._status.update(escape(text))
        elif stage != self._stage or time.monotonic() - self._said_at >= self._every_s:
            self._stage, self._said_at = stage, time.monotonic()
            self.note(text)


class RunDisplay:
    """Show one run while it goes on.

    On a terminal the display is redrawn in place; anywhere else it prints a line at each evaluation.

    Args:
        title: what runs.
        console: where to draw; standard error by default.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._title = title
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            expand=True,
        )
        self._task = self._progress.add_task("waiting for devices", total=None)
        self._losses: list[float] = []
        self._devices: dict[str, dict[str, Any]] = {}
        self._evaluation: dict[str, Any] = {}
        self._bytes = (0, 0)
        self._notes: list[str] = []
        self._live = Live(console=self._console, refresh_per_second=8, transient=True, get_renderable=self._draw)

    def __enter__(self) -> RunDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, event: dict[str, Any]) -> None:
        """Take one event of the service."""
        kind = event.get("event")
        if kind == "round":
            self._losses.append(float(event["loss"]))
            self._bytes = (int(event["bytes_received"]), int(event["bytes_sent"]))
            self._progress.update(self._task, description="round", completed=event["round"], total=event["rounds"])
            for name in event["devices"]:
                self._devices.setdefault(name, {"status": "training"})["round"] = event["round"]
            for name in event["absent"]:
                self._note(f"round {event['round']} went on without {name}")
        elif kind == "device":
            self._devices.setdefault(event["device"], {}).update(status=event["status"], round=event["round"])
            if "update" in event:
                self._note(f"{event['device']}: {event['update']}")
        elif kind == "evaluation":
            self._evaluation = event
            if not self._console.is_terminal:
                streams = "  ".join(f"{name} {share:.1%}" for name, share in event["streams"].items())
                loss = f"loss {self._losses[-1]:.3f}  " if self._losses else ""
                self._console.print(
                    f"{self._title}: round {event['round']}  {loss}decision {event['accuracy']:.1%}  ({streams})  "
                    f"received {megabytes(self._bytes[0])}",
                    highlight=False,
                    soft_wrap=True,
                )
        elif kind == "stored":
            self._devices.setdefault(event["device"], {})["stored"] = event["samples"]
        elif kind in ("refused", "rejected", "unsent", "broker"):
            self._note(f"{event.get('device') or event.get('topic') or 'broker'}: {event['why']}")
        elif kind == "disk":
            self._note("the disk takes records again" if event["ok"] else f"{event['why']}; devices keep their steps")
        elif kind == "quarantine":
            who = f"{event['device'] or 'another device'} ({event['channel']})"
            why = "is read again" if event["over"] else f"floods and is left unread for {event['seconds']:g} s"
            self._note(f"{who} {why}")
        elif kind == "note":
            self._note(event["text"])
        elif kind == "resumed":
            self._note(f"resumed after round {event['round']}, {event['records']} records in {event['seconds']:.1f} s")

    def _note(self, text: str) -> None:
        self._notes = [*self._notes[-2:], text]
        if not self._console.is_terminal:
            self._console.print(f"{self._title}: {text}", highlight=False, soft_wrap=True)

    def _draw(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress]
        figures = Table.grid(padding=(0, 3))
        if self._losses:
            figures.add_row("loss", f"{self._losses[-1]:.4f}", Text(_sparkline(self._losses), style="magenta"))
        if self._evaluation:
            streams = "   ".join(f"{name} {share:.1%}" for name, share in self._evaluation["streams"].items())
            figures.add_row("accuracy", Text(f"{self._evaluation['accuracy']:.1%}", style="bold green"), streams)
        figures.add_row("bytes", megabytes(self._bytes[0]), f"received   {megabytes(self._bytes[1])} sent")
        parts.append(figures)
        if self._devices:
            devices = Table.grid(padding=(0, 3))
            for name, device in sorted(self._devices.items()):
                status = str(device.get("status", "online"))
                devices.add_row(
                    Text("●", style=_COLOURS.get(status, "white")),
                    name,
                    status,
                    f"round {device.get('round', 0)}",
                    f"{device['stored']} samples stored" if "stored" in device else "",
                )
            parts.append(devices)
        parts.extend(Text(note, style="yellow") for note in self._notes)
        return Panel(Group(*parts), title=self._title, title_align="left", border_style="dim")
