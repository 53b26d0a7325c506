"""What the main job says at its end: a table for people, a file for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edge_sdk.errors import ConfigError
from examples.quickstart.data import Division
from examples.quickstart.foe import FLOOR, Rebuilt
from server_sdk.errors import ServerError
from server_sdk.local_fleet import FleetRun

__all__ = ["compose", "print_report", "write_result"]

Result = dict[str, Any]


def compose(runs: dict[str, FleetRun], rebuilt: dict[str, Rebuilt], division: Division, broker: str) -> Result:
    """The figures of all runs under their stable names.

    Args:
        runs: ``vanilla``, ``paper`` and ``hardened``.
        rebuilt: what the foe made of each, and of the decisions alone.
        division: who had which samples.
        broker: its kind.

    Raises:
        ServerError: a run ended without an evaluation.
    """
    vanilla, paper, hardened = (runs[name] for name in ("vanilla", "paper", "hardened"))
    floor = rebuilt[FLOOR].ssim
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
            "training_seconds": {name: run.figures["seconds"] for name, run in runs.items()},
            "bytes_per_sample": paper.figures["bytes_per_sample"],
            "devices": [
                {
                    "name": after["name"],
                    # The largest of all runs: each had a process of its own.
                    "peak_rss_mb": max(before["peak_rss_mb"], after["peak_rss_mb"], frozen["peak_rss_mb"]),
                    "torch_loaded": before["torch_loaded"] or after["torch_loaded"] or frozen["torch_loaded"],
                    "steps": before["steps"] + after["steps"],
                }
                for before, after, frozen in zip(vanilla.devices, paper.devices, hardened.devices, strict=True)
            ],
            "hardened_accuracy": hardened.figures["evaluation"]["accuracy"],
            "hardened_bytes_per_sample": hardened.figures["bytes_per_sample"],
            "hardened_bits_per_sample": hardened.devices[0]["bits_per_sample"],
            "front_samples": {
                "vanilla": sum(len(train) for train, _ in division.shards),
                "hardened": len(division.guide),
            },
            "foe": {name: {"ssim": each.ssim, "excess": each.ssim - floor} for name, each in rebuilt.items()},
            "foe_victims": len(rebuilt[FLOOR].pictures),
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
        (
            "hardened",
            result["hardened_accuracy"],
            f"a frozen front that has seen the guide's {result['front_samples']['hardened']:,} samples alone "
            f"(vanilla's: the devices' {result['front_samples']['vanilla']:,})",
        ),
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
    console.print(_leaks(result))
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
        f"{result['seconds']:.0f} s for vanilla and paper over {result['broker']}, "
        f"{result['bytes_per_sample']:,.0f} bytes of activations a sample; {result['hardened_seconds']:.0f} s for "
        f"hardened and the foe, {result['hardened_bytes_per_sample']:,.0f} bytes a sample, which tell at most "
        f"{result['hardened_bits_per_sample']:,.0f} bits.",
        highlight=False,
    )
    console.print(f"picture  {out / 'figure.png'}\nfigures  {out / 'result.json'}", highlight=False, soft_wrap=True)


def _leaks(result: Result) -> Table:
    foe = result["foe"]
    about = f"One small decoder each, {result['foe_victims']} test samples of the first device; "
    about += "psgl-server audit is the judge."
    if min(each["excess"] for each in foe.values()) < 0:
        about += " Below 0 this decoder had too few samples to learn from: a foe would take the decision alone."
    table = Table(
        title=f"What a foe rebuilds (SSIM to the true input; decision alone: {foe[FLOOR]['ssim']:.3f})",
        title_justify="left",
        caption=about,
        caption_justify="left",
        min_width=75,
    )
    table.add_column("")
    table.add_column("SSIM", justify="right")
    table.add_column("above the decision", justify="right")
    for name in (name for name in foe if name != FLOOR):
        table.add_row(name, f"{foe[name]['ssim']:.3f}", f"{foe[name]['excess']:+.3f}")
    return table
