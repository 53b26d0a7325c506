"""A trial of a frozen bundle: the fleet's own commands over a broker, then every attack that fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.batch import Samples
from server_sdk.audit.attacks import Averaging, LearnedDecoder, WhiteBox
from server_sdk.audit.division import Division
from server_sdk.audit.outcome import attack, worst_of
from server_sdk.audit.trial import Trial, train
from server_sdk.broker import EmbeddedBroker


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
