"""The display draws from events alone, on a terminal and elsewhere."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from server_sdk import progress
from server_sdk.progress import RunDisplay, StageDisplay

ROUND = {"event": "round", "round": 7, "rounds": 20, "loss": 0.25, "bytes_received": 2_500_000, "bytes_sent": 1}
EVENTS = [
    {"event": "waiting", "run": "r", "devices": 2},
    {"event": "device", "device": "ward-1", "status": "training", "round": 0},
    ROUND | {"devices": ["ward-1"], "absent": ["ward-2"]},
    {"event": "evaluation", "round": 7, "accuracy": 0.875, "streams": {"attacked": 0.8, "fused": 0.9}, "samples": 8},
    {"event": "refused", "device": "ward-3", "why": "use the server's bundle"},
    {"event": "something new"},
]


def shown(terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    with RunDisplay("fleet ward", console) as display:
        for event in EVENTS:
            display.show(event)
        if terminal:
            console.print(display._draw())
    return out.getvalue()


def test_a_terminal_sees_rounds_loss_streams_bytes_and_devices() -> None:
    text = shown(terminal=True)
    for words in (
        "7/20",
        "0.2500",
        "87.5%",
        "attacked 80.0%",
        "fused 90.0%",
        "2.5 MB",
        "ward-1",
        "went on without ward-2",
    ):
        assert words in text


def test_a_pipe_gets_plain_lines() -> None:
    text = shown(terminal=False)
    assert "\x1b" not in text
    assert "round 7  loss 0.250  decision 87.5%" in text and "use the server's bundle" in text


def test_a_device_that_does_not_follow_is_told() -> None:
    out = io.StringIO()
    with RunDisplay("ward", Console(file=out, width=100)) as display:
        display.show(EVENTS[1] | {"update": "bundle ab12 was refused: is not signed"})
    assert out.getvalue().splitlines() == ["ward: ward-1: bundle ab12 was refused: is not signed"]


def test_a_quarantine_is_told_at_its_begin_and_end() -> None:
    out = io.StringIO()
    with RunDisplay("ward", Console(file=out, width=100)) as display:
        quarantine = {"event": "quarantine", "device": "d4", "channel": "step", "over": False, "seconds": 120.0}
        display.show(quarantine)
        display.show(quarantine | {"device": "", "over": True})
    assert out.getvalue().splitlines() == [
        "ward: d4 (step) floods and is left unread for 120 s",
        "ward: another device (step) is read again",
    ]


# --- the stages of a command ---


def test_without_a_terminal_each_stage_has_a_line_and_a_long_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    out = io.StringIO()
    with StageDisplay(Console(file=out, width=40)) as display:
        for done in range(1, 81):
            display.step("front [cut]", done, 4000, 0.5)
            clock.now += 1
        display.stage("exporting the graphs, which is a line longer than forty columns")
        display.stage("exporting the graphs, which is a line longer than forty columns")
        display.note("trade-off: [nothing]")
    assert out.getvalue().splitlines() == [
        "front [cut], 1 of 4,000, loss 0.5000",
        "front [cut], 31 of 4,000, loss 0.5000",
        "front [cut], 61 of 4,000, loss 0.5000",
        "exporting the graphs, which is a line longer than forty columns",
        "trade-off: [nothing]",
    ]


def test_on_a_terminal_one_line_changes_and_only_notes_stay() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    with StageDisplay(console, every_s=0.0) as display:
        display.step("front [cut]", 1, 4000, 0.5)
        display.note("trade-off: [nothing]")
        display.stage("exporting")
    written = out.getvalue()
    assert "front [cut], 1 of 4,000, loss 0.5000\r" in written, "drawn over by what follows"
    assert "trade-off: [nothing]\n" in written and "exporting" in written
    assert "\x1b[?25h" in written, "the terminal has its cursor back"
