"""What an audit says: one JSON object for programs, put together from plain fields, wherever they were found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from edge_sdk.version import __version__
from server_sdk.errors import ServerError

__all__ = ["attack_label", "beyond_in_words", "bundle_label", "compose", "shown_by", "write"]

_UNDEFENDED = "vanilla"
_MEANT = ("accuracy", "balanced_accuracy", "auc", "guide_accuracy", "guide_agreement", "follow_when_wrong")


def compose(cells: Sequence[Sequence[Mapping[str, Any]]], *, data: str, command: str) -> dict[str, Any]:
    """One object for all.

    Args:
        cells: of each bundle the ``Finding.as_fields`` of its seeds, as they are or read back from JSON; the first
            bundle is the one that is audited, the others stand beside it.
        data: name of the data.
        command: that was typed.

    Returns:
        The audited bundle's facts, ``mean`` and ``spread`` (lowest and highest) over its ``seeds``, ``lost`` (points of
        accuracy and AUC below the first undefended bundle, or None), and under ``beside`` the same of the others.

    Raises:
        ServerError: no bundle, a bundle without seeds, or bundles of different kinds in one place.
    """
    if not cells or not all(cells):
        raise ServerError("a report needs at least one bundle, and at least one seed of each")
    everything = [_of_bundle(each) for each in cells]
    base = next((each for each in everything if each["profile"] == _UNDEFENDED), None)
    for each in everything:
        each["lost"] = None if base is None else _lost(each["mean"], base["mean"])
    audited, *beside = everything
    today = datetime.now(UTC).date().isoformat()
    facts = {"data": data, "command": command, "date": today, "versions": {"psgl": __version__}}
    return {**audited, **facts, "beside": beside}


def _of_bundle(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    facts = dict(cells[0]["bundle"])
    kinds = ("profile", "input_shape", "classes", "frozen")
    if any(cell["bundle"][kind] != facts[kind] for cell in cells for kind in kinds):
        raise ServerError("bundles of different kinds stand in one place: group the cells by their profile")
    seeds = [{**cell, "bundle": cell["bundle"]["id"]} for cell in cells]
    first = [seed["protocols"]["P1"] for seed in seeds]
    excess = {name: _mean([seed["excess"][name] for seed in seeds]) for name in seeds[0]["excess"]}
    measure = "correlation" if excess["ssim"] is None else "ssim"
    return {
        "bundle": facts.pop("id"),
        **facts,
        "mean": {
            **_means(first),
            "protocols": {name: _means([seed["protocols"][name] for seed in seeds]) for name in seeds[0]["protocols"]},
            "follow_when_wrong_without_perturbation": _mean(
                [seed["follow_when_wrong_without_perturbation"] for seed in seeds]
            ),
            "bytes_per_sample": _mean([seed["bytes_per_sample"] for seed in seeds]),
            "payload_per_sample": _mean([seed["payload_per_sample"] for seed in seeds]),
            "bits_per_sample": _mean([seed["exposure"]["bits_per_sample"] for seed in seeds]),
            "excess": excess,
        },
        "spread": {
            "accuracy": _spread([each["accuracy"] for each in first]),
            "auc": _spread([each["auc"] for each in first]),
            "excess": _spread([seed["excess"][measure] for seed in seeds]),
        },
        "worst_attacks": sorted({seed["worst_attack"] for seed in seeds}),
        "seeds": seeds,
    }


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Of a protocol's measurements."""
    means = {name: _mean([row[name] for row in rows]) for name in _MEANT if name in rows[0]}
    return {**means, "clean_accuracy": _mean([(row["clean"] or {}).get("accuracy") for row in rows])}


def _lost(mine: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float | None]:
    none = mine["auc"] is None or base["auc"] is None
    return {
        "accuracy_points": 100 * (base["accuracy"] - mine["accuracy"]),
        "auc_points": None if none else 100 * (base["auc"] - mine["auc"]),
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


def shown_by(audited: Mapping[str, Any]) -> tuple[str, float]:
    """The measure that counts, ``SSIM`` for images and ``correlation`` for signals, and the mean excess by it."""
    excess = audited["mean"]["excess"]
    return ("correlation", excess["correlation"]) if excess["ssim"] is None else ("SSIM", excess["ssim"])


def beyond_in_words(measure: str, excess: float) -> str:
    """An excess over the floor by that measure, as the end of a sentence on what is shown."""
    return f"{abs(excess):.3f} {measure} {'more' if excess > 0 else 'less'} than the decision alone tells"


def bundle_label(audited: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """What a bundle is called: its profile, with the file's name where bundles of one profile stand side by side."""
    profiles = [each["profile"] for each in (report, *report["beside"])]
    profile: str = audited["profile"]
    return f"{profile} ({audited['name']})" if profiles.count(profile) > 1 else profile


def attack_label(attack: str, audited: Mapping[str, Any]) -> str:
    """What an attack is called; one that was given what the device does not send is called a supposition."""
    supposed = audited["seeds"][0]["attacks"].get(attack, {}).get("supposed")
    return f"{attack}, if noise were drawn anew" if supposed else attack


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers and len(numbers) == len(values) else None


def _spread(values: Sequence[float | None]) -> list[float] | None:
    numbers = [value for value in values if value is not None]
    return [min(numbers), max(numbers)] if numbers and len(numbers) == len(values) else None
