"""The display draws from events alone, on a terminal and elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from server_sdk.progress import RunDisplay

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
