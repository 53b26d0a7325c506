"""What the main job says at its end: a table for people, a file for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edge_sdk.errors import ConfigError
from server_sdk.errors import ServerError
from server_sdk.local_fleet import FleetRun

__all__ = ["compose", "print_report", "write_result"]

Result = dict[str, Any]


def compose(vanilla: FleetRun, paper: FleetRun, broker: str, seconds: float) -> Result:
    """The figures of both runs under their stable names.

    Raises:
        ServerError: a run ended without an evaluation.
    """
    try:
        final, clean = paper.figures["evaluation"], paper.figures["clean"]
        return {
            "fused_accuracy": final["accuracy"],
            "streams": final["streams"],
            "vanilla_accuracy": vanilla.figures["evaluation"]["accuracy"],
            "clean_accuracy": clean["accuracy"],
            "guide_accuracy": final["guide_accuracy"],
            "guide_agreement": final["guide_agreement"],
            "follow_when_wrong": final["follow_when_wrong"],
            "test_samples": final["samples"],
            "steps": paper.figures["steps"] + vanilla.figures["steps"],
            "seconds": round(seconds, 1),
            "training_seconds": {"vanilla": vanilla.figures["seconds"], "paper": paper.figures["seconds"]},
            "bytes_per_sample": paper.figures["bytes_per_sample"],
            "devices": [
                {
                    "name": after["name"],
                    # The larger of both runs: each had a process of its own.
                    "peak_rss_mb": max(before["peak_rss_mb"], after["peak_rss_mb"]),
                    "torch_loaded": before["torch_loaded"] or after["torch_loaded"],
                    "steps": before["steps"] + after["steps"],
                }
                for before, after in zip(vanilla.devices, paper.devices, strict=True)
            ],
            "broker": broker,
        }
    except KeyError as exc:
        raise ServerError(f"a run ended without {exc}: look at the logs beside its result.json") from exc


def write_result(path: Path, result: Result) -> None:
    """Write the figures as JSON.

    Raises:
        ConfigError: the disk refuses.
    """
    try:
        path.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def print_report(console: Console, result: Result, out: Path) -> None:
    """Print the table, the devices and where everything lies."""
    console.print()
    table = Table(
        title=f"Accuracy on {result['test_samples']} held-out samples, decided over the wire",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_column("what it is", style="dim")
    rows = [
        ("vanilla", result["vanilla_accuracy"], "plain split learning, no defence"),
        ("stream a", result["streams"]["attacked"], "back layers fed with the attacked activations"),
        ("stream r", result["streams"]["recovered"], "fed with the recovered activations"),
        ("stream f", result["streams"]["fused"], "fed with their convolution-sum fusion"),
        ("fused", result["fused_accuracy"], "adaptive fusion of the three decisions"),
        (
            "clean test",
            result["clean_accuracy"],
            "fused, inputs not perturbed (a measurement, not a mode of use)",
        ),
        ("guide", result["guide_accuracy"], "the small classifier on the device alone"),
    ]
    for name, share, about in rows:
        table.add_row(name, f"{share:.1%}", about, style="bold green" if name == "fused" else None)
    table.add_section()
    table.add_row("agreement", f"{result['guide_agreement']:.1%}", "decisions that are the guide's own")
    table.add_row(
        "follows",
        f"{result['follow_when_wrong']:.1%}",
        "where the guide is wrong, decisions that repeat its mistake",
    )
    console.print(table)
    devices = Table(title="Devices", title_justify="left")
    for heading in ("device", "steps", "peak memory", "torch in the process"):
        devices.add_column(heading, justify="left" if heading == "device" else "right")
    for device in result["devices"]:
        devices.add_row(
            device["name"],
            str(device["steps"]),
            f"{device['peak_rss_mb']:.0f} MB",
            "yes" if device["torch_loaded"] else "no",
        )
    console.print(devices)
    console.print(
        f"{result['seconds']:.0f} s for both runs over {result['broker']}, "
        f"{result['bytes_per_sample']:,.0f} bytes of activations a sample.",
        highlight=False,
    )
    console.print(f"picture  {out / 'figure.png'}\nfigures  {out / 'result.json'}", highlight=False, soft_wrap=True)
