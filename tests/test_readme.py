"""Tables of what each profile costs and shows are those of docs/figures/audit.json, to the last digit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMES = {"mnist_10k": "digits (MNIST)", "breastmnist": "ultrasound (BreastMNIST)", "mitbih": "heart beats (MIT-BIH)"}


def rows(figures: Mapping[str, float]) -> list[str]:
    """A line for each data set and profile: AUC where there are two classes, correlation where samples are signals."""
    found = []
    for data, name in NAMES.items():
        profiles = {key.split(".")[2]: None for key in figures if key.startswith(f"audit.{data}.")}
        for profile in profiles:
            of = {
                key.split(".")[3]: value for key, value in figures.items() if key.startswith(f"audit.{data}.{profile}.")
            }
            signal = "worst_ssim_excess" not in of
            excess = of["worst_corr_excess"] if signal else of["worst_ssim_excess"]
            bits = of.get("bits_per_sample")
            cells = (
                name,
                f"`{profile}`",
                f"{of['seeds']:.0f}",
                f"{100 * of['accuracy']:.1f}",
                f"{100 * of['auc']:.1f}" if data != "mnist_10k" else "",
                f"{of['floor']:.3f}",
                f"{excess:+.3f}{' (correlation)' if signal else ''}",
                f"{of['bytes_per_sample']:,.0f}",
                "no bound" if bits is None else f"{bits:,.0f}",
            )
            found.append("| " + " | ".join(cells) + " |")
    return found


def test_the_tables_are_those_of_the_sweep() -> None:
    figures = json.loads((ROOT / "docs/figures/audit.json").read_text())["figures"]
    wanted = rows(figures)
    for document, profiles in (("docs/protection.md", None), ("README.md", ("`vanilla`", "`paper`", "`hardened`"))):
        text = (ROOT / document).read_text()
        mine = [row for row in wanted if profiles is None or row.split(" | ")[1] in profiles]
        found = [line for line in text.splitlines() if line.startswith(tuple(f"| {name} |" for name in NAMES.values()))]
        assert mine and found == mine, f"{document} must have:\n" + "\n".join(mine)
