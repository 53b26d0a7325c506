"""The report on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from server_sdk.audit.exposure import exposure_in_words
from server_sdk.audit.report import attack_label, beyond_in_words, bundle_label, shown_by

__all__ = ["print_table"]


def print_table(report: dict[str, Any], console: Console) -> None:
    """Print tables for each bundle and seed, what it comes to, and all bundles side by side."""
    everything = (report, *report["beside"])
    for audited in everything:
        name = f"{bundle_label(audited, report)} on {report['data']}"
        for seed in audited["seeds"]:
            _print_attacks(f"{name}, seed {seed['seed']}: reconstructions compared with x", audited, seed, console)
            _print_protocols(seed, console)
        console.print(exposure_in_words(audited["seeds"][0]["exposure"]), highlight=False)
        console.print(
            f"{audited['profile']}: the worst attack shows {beyond_in_words(*shown_by(audited))} "
            f"(mean of seeds: {len(audited['seeds'])}).\n",
            highlight=False,
        )
    if len(everything) > 1:
        _print_comparison(report, console)


def _print_attacks(title: str, audited: Mapping[str, Any], seed: Mapping[str, Any], console: Console) -> None:
    table = _table(title, "what the foe has", "victims", "SSIM", "corr.", "NMSE", "recognised")
    for attack, row in (("the decision", seed["floor"]), *seed["attacks"].items()):
        values = (_figure(row["ssim"]), f"{row['correlation']:.3f}", f"{row['nmse']:.3f}", _share(row["classified"]))
        style = "bold red" if attack == seed["worst_attack"] else None
        table.add_row(attack_label(attack, audited), str(row["victims"]), *values, style=style)
    console.print(table)


def _print_protocols(seed: Mapping[str, Any], console: Console) -> None:
    guided = "guide_accuracy" in seed["protocols"]["P1"]
    headings = ["accuracy", "balanced", "AUC", "clean"] + (["guide", "agrees", "repeats"] if guided else [])
    table = _table("accuracy on the victims, in percent", "protocol", *headings)
    for protocol, row in seed["protocols"].items():
        values = [row["accuracy"], row["balanced_accuracy"], row["auc"], (row["clean"] or {}).get("accuracy")]
        if guided:
            values += [row["guide_accuracy"], row["guide_agreement"], row["follow_when_wrong"]]
        table.add_row(protocol, *map(_share, values))
        if len(row["streams"]) > 1:
            for stream, value in row["streams"].items():
                table.add_row(f"  {stream}", _share(value), *["" for _ in headings[1:]], style="dim")
    console.print(table)
    if guided:
        line = "agrees: the decision is the guide's; repeats: so is its mistake, of those it makes"
        without = seed["follow_when_wrong_without_perturbation"]
        if without is not None:
            line += f" ({without:.1%} with no perturbation at all)"
        console.print(line, highlight=False)


def _print_comparison(report: Mapping[str, Any], console: Console) -> None:
    measure = shown_by(report)[0]
    table = _table("side by side, means of the seeds", "bundle", "lost", "AUC lost", "excess", "bytes", "bits")
    table.add_column("worst attack")
    for audited in (report, *report["beside"]):
        lost, mean = audited["lost"] or {}, audited["mean"]
        values = (_points(lost.get("accuracy_points")), _points(lost.get("auc_points")), f"{shown_by(audited)[1]:+.3f}")
        bits = mean["bits_per_sample"]
        sizes = (f"{mean['bytes_per_sample']:,.0f}", "no bound" if bits is None else f"{bits:,.1f}")
        worst = ", ".join(attack_label(name, audited) for name in audited["worst_attacks"]).replace("_", " ")
        table.add_row(bundle_label(audited, report), *values, *sizes, worst)
    console.print(table)
    console.print(
        f"lost: points below the first undefended bundle; excess: {measure} above the floor; bytes, bits: a sample\n"
    )


def _table(title: str, first: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"
