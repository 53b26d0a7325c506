"""Sends and bits by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edge_sdk.ledger import bits_per_sample
from server_sdk.audit.exposure import Exposure, exposure_in_words

TRAINED = Exposure(16.0, training_samples=40, training_sends=100, versions=10, decisions=20)
FROZEN = Exposure(16.0, training_samples=40, training_sends=40, versions=1, decisions=20)


def test_each_version_of_a_front_counts_anew_and_a_frozen_one_once() -> None:
    fields = TRAINED.as_fields()
    assert fields["most_sends_of_a_sample"] == 3, "two passes and a half"
    assert fields["bits_of_a_training_sample"] == 48
    assert fields["bits_in_training"] == 1600 and fields["bits_in_decisions"] == 320
    fields = FROZEN.as_fields()
    assert fields["most_sends_of_a_sample"] == 1 and fields["bits_of_a_training_sample"] == 16


def test_the_sentence() -> None:
    words = exposure_in_words(TRAINED.as_fields())
    assert "at most 16.0 bits of its sample" in words and "up to 3 times, under 10 versions" in words
    assert "48 bits of a sample and 1,600 of all" in words and "20 decisions to 320" in words
    assert "crossed once, under one version of the front" in exposure_in_words(FROZEN.as_fields())


def test_without_a_bound_nothing_is_counted_in_bits() -> None:
    fields = replace(TRAINED, bits_per_sample=None).as_fields()
    assert {fields[name] for name in fields if name.startswith("bits")} == {None}
    assert exposure_in_words(fields).startswith("No bound: nothing limits") and "up to 3 times" in exposure_in_words(
        fields
    )


@pytest.mark.parametrize(("sigma", "expected"), [(1.0, 16.0), (0.5, 16 * math.log2(5)), (0.0, None)])
def test_the_bound_of_a_gaussian_channel(sigma: float, expected: float | None) -> None:
    manifest: Any = SimpleNamespace(cut_shape=(32,), noise=sigma, noise_kind="gaussian", bound=1.0, bits=0, span=None)
    assert bits_per_sample(cast(Any, manifest)) == (None if expected is None else pytest.approx(expected))
