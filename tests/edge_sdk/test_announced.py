"""Which announcement a device follows, and which end its run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_sdk.announced import Announced
from edge_sdk.errors import RefusedError
from edge_sdk.plan import Plan

FIRST = Plan("run-1", "bundle-1", "training", rounds=4, evaluate_every=0, batch=6, server="s1")


@pytest.fixture
def announced() -> Announced:
    """Of a device that takes part in the first run."""
    each = Announced()
    each.note(FIRST)
    each.join("bundle-1")
    return each


def test_nothing_is_joined_before_an_announcement() -> None:
    each = Announced()
    assert each.awaits("") and not each.joined


def test_before_it_joined_a_device_takes_whatever_is_announced() -> None:
    each = Announced()
    for plan in (FIRST, replace(FIRST, run="run-2", server="s2"), replace(FIRST, status="finished")):
        assert not each.note(plan)
        assert each.plan == plan
    assert each.awaits("") and each.awaits("run-2") and not each.awaits("run-1")


def test_another_bundle_is_not_joined() -> None:
    each = Announced()
    each.note(FIRST)
    with pytest.raises(RefusedError, match="trains bundle bundle-1, this device has bundle-2"):
        each.join("bundle-2")
    assert not each.joined


def test_only_another_life_of_the_server_has_not_seen_what_waits(announced: Announced) -> None:
    assert not announced.note(replace(FIRST, status="paused"))
    assert announced.note(replace(FIRST, server="s2"))
    assert not announced.note(replace(FIRST, server="s2"))
    assert announced.joined


@pytest.mark.parametrize("plan", [replace(FIRST, status="finished"), replace(FIRST, run="run-2")])
def test_the_end_of_the_run_is_said_and_the_plan_stays(announced: Announced, plan: Plan) -> None:
    with pytest.raises(RefusedError, match="run-1"):
        announced.note(plan)
    assert announced.plan == FIRST


def test_who_leaves_takes_the_announcement_that_ended_the_run(announced: Announced) -> None:
    after = replace(FIRST, run="run-2")
    with pytest.raises(RefusedError):
        announced.note(after)
    announced.leave()
    assert announced.plan == after and not announced.joined
    announced.leave()
    assert announced.plan is None and announced.awaits("")


def test_with_another_bundle_the_one_that_was_left_counts_again_unless_a_newer_came(announced: Announced) -> None:
    announced.leave()
    announced.reconsider()
    assert announced.plan == FIRST and not announced.joined
    announced.leave()
    newer = replace(FIRST, run="run-2")
    announced.note(newer)
    announced.reconsider()
    assert announced.plan == newer


def test_a_new_connection_forgets_all(announced: Announced) -> None:
    announced.leave()
    announced.begin()
    announced.reconsider()
    assert announced.plan is None
