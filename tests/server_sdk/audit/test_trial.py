"""A trial of a frozen bundle: the fleet's own commands over a broker, then every attack that fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.batch import Samples
from server_sdk.audit.attacks import Averaging, LearnedDecoder, WhiteBox
from server_sdk.audit.division import Division
from server_sdk.audit.outcome import attack, worst_of
from server_sdk.audit.trial import Trial, load, shipped, train
from server_sdk.broker import EmbeddedBroker
from server_sdk.errors import ModelError, ServerError


def test_a_frozen_bundle_is_trained_and_attacked(
    built: dict[str, Any], samples: Callable[[int, int], Samples], tmp_path: Path
) -> None:
    made = built["hardened"]
    division = Division(train=samples(60, 1), auxiliary=samples(60, 2), victims=samples(20, 3))
    events: list[dict[str, Any]] = []
    with EmbeddedBroker() as broker:
        trained = train(Trial(made.path, tmp_path / "fleet", 30, 10, 0), division, broker, on_event=events.append)
    assert trained.figures["rounds"] == 30 and trained.figures["evaluation"]["samples"] == 20
    assert trained.twin is not None and not any(event["event"] == "note" for event in events)
    x = division.victims.x
    assert np.array_equal(trained.victim.send(x), trained.victim.send(x))
    assert not np.array_equal(trained.victim.send(x), trained.foe.send(x)), "each has noise of its own"
    decoder = LearnedDecoder("mlp", epochs=3, width=4)
    attacks = (LearnedDecoder("convolution", epochs=1), decoder, Averaging(decoder, 4), WhiteBox(steps=5, victims=4))
    floor, found = attack(trained, division, attacks, seed=0)
    assert [each.attack for each in found] == ["decoder_mlp", "averaging_decoder_mlp", "white_box"], (
        "no axes to convolve"
    )
    assert [each.supposed for each in found] == [False, True, False] and not worst_of(found).supposed
    assert floor.reconstructions.shape == (20, 1, 8, 8) and len(found[2].reconstructions) == 4


def test_what_a_trial_left_is_loaded_as_it_was(
    built: dict[str, Any], samples: Callable[[int, int], Samples], tmp_path: Path
) -> None:
    division = Division(train=samples(40, 1), auxiliary=samples(12, 2), victims=samples(12, 3))
    trial = Trial(built["hardened"].path, tmp_path / "fleet", 5, 8, 0)
    with EmbeddedBroker() as broker:
        trained = train(trial, division, broker, on_event=lambda event: None)
    again = load(trial, division)
    x = division.victims.x
    assert np.array_equal(trained.victim.send(x), again.victim.send(x))
    assert np.array_equal(trained.decide(x), again.decide(x))
    assert (trained.exposure, trained.figures["evaluation"]) == (again.exposure, again.figures["evaluation"])
    for name, damage in (("device-1.json", b"{"), ("device-1.front.cbor", b"\xff"), ("result.json", None)):
        path = trial.folder / name
        whole = path.read_bytes()
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(ServerError, match=r"cannot be read .*: train again"):
            load(trial, division)
        path.write_bytes(whole)
    (trial.folder / "server.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="damaged"):
        load(trial, division)


def test_what_is_shipped_decides_and_has_crossed_nowhere_yet(
    built: dict[str, Any], samples: Callable[[int, int], Samples], tmp_path: Path
) -> None:
    first, again, other = (shipped(built["hardened"].path, seed=seed, decisions=20) for seed in (0, 0, 1))
    x = samples(20, 3).x
    assert np.array_equal(first.decide(x), again.decide(x)) and first.decide(x).shape == (20, 3)
    assert not np.array_equal(first.victim.send(x), other.victim.send(x)), "the seed is of the noise's keys"
    assert (first.exposure.training_sends, first.exposure.decisions, first.figures) == (0, 20, {})
    alone = tmp_path / "alone.psgl"
    alone.write_bytes(built["hardened"].path.read_bytes())
    with pytest.raises(ModelError, match="copy them there from beside the bundle"):
        shipped(alone, seed=0, decisions=1)
