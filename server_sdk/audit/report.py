"""What an audit says: one JSON object for programs, one table for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from edge_sdk.version import __version__
from server_sdk.audit.trial import Outcome, Trained, worst_of
from server_sdk.errors import ServerError

__all__ = ["Finding", "compose", "print_table", "shown_by", "write"]

_ACCURACY = ("accuracy", "streams", "guide_accuracy", "guide_agreement", "follow_when_wrong", "samples")


@dataclass(frozen=True)
class Finding:
    """What one seed found of one bundle.

    Attributes:
        seed: of training and attacks.
        trained: device and server.
        floor: the foe that sees decisions alone.
        outcomes: of the attacks.
    """

    seed: int
    trained: Trained
    floor: Outcome
    outcomes: Sequence[Outcome]

    def as_fields(self) -> dict[str, Any]:
        """As JSON values; excess is the worst attack's above the floor."""
        worst = worst_of(self.outcomes)
        figures = self.trained.figures
        evaluation = figures["evaluation"]
        return {
            "seed": self.seed,
            "perturbed": {name: evaluation[name] for name in _ACCURACY if name in evaluation},
            "clean_accuracy": figures.get("clean", {}).get("accuracy"),
            "bytes_per_sample": figures["bytes_per_sample"],
            "floor": self.floor.as_fields(),
            "attacks": {each.attack: each.as_fields() for each in self.outcomes},
            "worst_attack": worst.attack,
            "excess": worst.excess,
        }


def compose(findings: Sequence[Sequence[Finding]], *, data: str, command: str) -> dict[str, Any]:
    """One object for all.

    Args:
        findings: of each bundle, those of its seeds; the first bundle is the one that is audited, the others stand
            beside it.
        data: name of the data.
        command: that was typed.
    """
    audited, *beside = [_of_bundle(each) for each in findings]
    today = datetime.now(UTC).date().isoformat()
    facts = {"data": data, "command": command, "date": today, "versions": {"psgl": __version__}}
    return {**audited, **facts, "beside": beside}


def _of_bundle(findings: Sequence[Finding]) -> dict[str, Any]:
    bundle = findings[0].trained.victim.bundle
    seeds = [finding.as_fields() for finding in findings]
    excess = {name: _mean([seed["excess"][name] for seed in seeds]) for name in seeds[0]["excess"]}
    return {
        "bundle": bundle.id,
        "profile": bundle.manifest.profile,
        "mean": {
            "accuracy": _mean([seed["perturbed"]["accuracy"] for seed in seeds]),
            "clean_accuracy": _mean([seed["clean_accuracy"] for seed in seeds]),
            "excess": excess,
        },
        "seeds": seeds,
    }


def write(path: Path, report: dict[str, Any]) -> None:
    """Write the report.

    Raises:
        ServerError: the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as exc:
        raise ServerError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def print_table(report: dict[str, Any], console: Console) -> None:
    """Print a table for each bundle and seed, and what it comes to."""
    for audited in (report, *report["beside"]):
        for seed in audited["seeds"]:
            _print_seed(f"{audited['profile']} on {report['data']}", seed, console)
        measure, shown = shown_by(audited)
        console.print(
            f"{audited['profile']}: the worst attack shows {shown:+.3f} {measure} more than the decision alone tells "
            f"(mean of seeds: {len(audited['seeds'])}).\n",
            highlight=False,
        )


def shown_by(audited: dict[str, Any]) -> tuple[str, float]:
    """The measure that counts, ``SSIM`` for images and ``correlation`` for signals, and the mean excess by it."""
    excess = audited["mean"]["excess"]
    return ("correlation", excess["correlation"]) if excess["ssim"] is None else ("SSIM", excess["ssim"])


def _print_seed(name: str, seed: dict[str, Any], console: Console) -> None:
    title = f"{name}, seed {seed['seed']}: reconstructions compared with x"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("what the foe has", no_wrap=True)
    for heading in ("victims", "SSIM", "corr.", "NMSE", "recognised"):
        table.add_column(heading, justify="right")
    for attack, row in (("the decision", seed["floor"]), *seed["attacks"].items()):
        ssim = "-" if row["ssim"] is None else f"{row['ssim']:.3f}"
        values = (f"{row['correlation']:.3f}", f"{row['nmse']:.3f}")
        style = "bold red" if attack == seed["worst_attack"] else None
        table.add_row(attack, str(row["victims"]), ssim, *values, f"{row['classified']:.1%}", style=style)
    console.print(table)
    perturbed = seed["perturbed"]
    line = f"accuracy {perturbed['accuracy']:.1%}"
    if seed["clean_accuracy"] is not None:
        line += (
            f", unperturbed inputs {seed['clean_accuracy']:.1%}; agrees with the guide in "
            f"{perturbed['guide_agreement']:.1%}, repeats its mistakes in {perturbed['follow_when_wrong']:.1%}"
        )
    console.print(f"{line}; {seed['bytes_per_sample']:,.0f} bytes a sample", highlight=False)


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if len(numbers) == len(values) else None
