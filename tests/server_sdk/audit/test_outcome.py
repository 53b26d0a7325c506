"""Which attack is the worst, and a target whose victims are attacked one attack after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_sdk.batch import Samples
from server_sdk.audit.attacks import Averaging, LearnedDecoder
from server_sdk.audit.division import Division
from server_sdk.audit.metrics import Likeness
from server_sdk.audit.outcome import Outcome, Target, worst_name, worst_of
from server_sdk.audit.trial import shipped
from server_sdk.errors import ServerError

Draw = Callable[[int, int], Samples]


def fields(ssim: float | None, correlation: float, *, supposed: bool = False) -> dict[str, Any]:
    return {"excess": {"ssim": ssim, "correlation": correlation, "nmse_deficit": 0.0}, "supposed": supposed}


def test_the_worst_is_by_ssim_and_of_signals_by_correlation() -> None:
    assert worst_name({"a": fields(0.1, 0.9), "b": fields(0.2, 0.1)}) == "b"
    assert worst_name({"a": fields(None, 0.9), "b": fields(None, 0.1)}) == "a"
    assert worst_name({"a": fields(-0.2, 0), "b": fields(-0.1, 0)}) == "b"


def test_what_is_supposed_is_never_the_worst() -> None:
    assert worst_name({"a": fields(0.1, 0), "b": fields(0.9, 0, supposed=True)}) == "a"
    for attacks in ({}, {"b": fields(0.9, 0, supposed=True)}):
        with pytest.raises(ServerError, match="no attack on what the device really sends"):
            worst_name(attacks)


def test_excess_is_counted_from_the_floor() -> None:
    made = np.zeros((1, 1, 8, 8), np.float32)
    mine = Likeness(mse=0.01, nmse=0.5, correlation=0.7, ssim=0.4, psnr=20.0)
    floor = replace(mine, nmse=0.8, correlation=0.6, ssim=0.1)
    outcome = Outcome("a", mine, floor, 0.5, made)
    assert outcome.excess == pytest.approx({"ssim": 0.3, "correlation": 0.1, "nmse_deficit": 0.375})
    perfect = Outcome("a", mine, replace(floor, nmse=0.0), 0.5, made)
    assert perfect.excess["nmse_deficit"] == 0.0
    signal = Outcome("a", replace(mine, ssim=None), floor, 0.5, made)
    assert signal.excess["ssim"] is None
    assert worst_of([outcome, Outcome("b", floor, floor, 0.5, made)]) is outcome
    assert "reconstructions" not in outcome.as_fields() and outcome.as_fields()["victims"] == 1


def test_a_target_is_attacked_again_alike(built: dict[str, Any], samples: Draw) -> None:
    division = Division(train=samples(30, 1), auxiliary=samples(30, 2), victims=samples(12, 3))
    trained = shipped(built["hardened"].path, seed=0, decisions=12)
    decoder = LearnedDecoder("mlp", epochs=2, width=2)
    first, again = (Target(trained, division, decoder, seed=0) for _ in range(2))
    assert first.fits(decoder) and not first.fits(LearnedDecoder("convolution", epochs=1))
    often = first.against(Averaging(decoder, 3))
    assert often.supposed, "a frozen front sends the same sample alike"
    # What came before leaves no trace: cells may be made in another process.
    assert np.array_equal(first.against(decoder).reconstructions, again.against(decoder).reconstructions)
    assert np.array_equal(first.floor().reconstructions, again.floor().reconstructions)
    assert first.floor().excess == pytest.approx({"ssim": 0, "correlation": 0, "nmse_deficit": 0})


def test_averaging_fits_only_where_noise_makes_sends_differ(built: dict[str, Any], samples: Draw) -> None:
    division = Division(train=samples(30, 1), auxiliary=samples(30, 2), victims=samples(12, 3))
    trained = shipped(built["vanilla"].path, seed=0, decisions=12)
    decoder = LearnedDecoder("mlp", epochs=1, width=2)
    assert not Target(trained, division, decoder, seed=0).fits(Averaging(decoder, 3))
