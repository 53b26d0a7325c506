"""What devices say of themselves: noted, bounded, added up; and who is done."""

from __future__ import annotations

from typing import Any

import pytest

from edge_sdk.errors import WireError
from edge_sdk.training import Evaluation
from edge_sdk.wire import Message
from server_sdk.roster import Roster, summary


def state(status: str = "training", **fields: Any) -> Message:
    return Message("state", "", "s", 0, {"manifest": "bundle-1", "status": status, **fields})


def counts(samples: int, fused: int, **changes: Any) -> dict[str, Any]:
    return Evaluation(samples, fused, {"attacked": fused}, **changes).as_fields()


def test_the_last_word_counts() -> None:
    roster = Roster(9)
    assert roster.bundle("a") == ""
    event = roster.note("a", state("online"))
    assert event == {"event": "device", "device": "a", "status": "online", "round": 0}
    assert roster.note("a", state("training", round=7))["round"] == 7
    assert roster.bundle("a") == "bundle-1" and roster.members == (), "who only talks takes no part"


def test_why_a_device_does_not_follow_is_told_once() -> None:
    roster = Roster(9)
    told = [roster.note("a", state(update=text)).get("update") for text in ("", "is not\x1b[2J signed", "x" * 999, "")]
    assert told == [None, "is not[2J signed", "x" * 300, None]
    refused = state(update="is not signed")
    assert [("update" in roster.note("a", refused)) for _ in range(2)] == [True, False]


def test_a_run_is_done_when_every_member_has_said_so() -> None:
    roster = Roster(9)
    assert not roster.done, "nobody takes part"
    roster.note("watcher", state("online"))
    for name in ("b", "a"):
        roster.join(name)
    roster.note("b", state("done"))
    assert roster.members == ("a", "b")
    for status, done in (("training", False), ("done", True), ("offline", False)):
        roster.note("a", state(status))
        assert roster.done is done, "whoever takes no part is not waited for"


def test_one_device_more_than_are_listened_to_is_not_noted() -> None:
    roster = Roster(2)
    roster.note("a", state())
    roster.note("b", state())
    with pytest.raises(WireError, match="more than 2 devices") as caught:
        roster.note("c", state())
    assert caught.value.reason == "devices"
    roster.note("a", state("done"))


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        ({"evaluation": {"samples": -1}}, "schema", "counts"),
        ({"clean": {"samples": 1}}, "schema", "counts"),
        ({"speaks": [2]}, "version", "upgrade psgl on the server"),
        ({"speaks": [0]}, "version", "upgrade psgl on the device"),
    ],
)
def test_what_cannot_be_noted_changes_nothing(fields: dict[str, Any], reason: str, words: str) -> None:
    roster = Roster(9)
    roster.note("a", state("training", round=3))
    with pytest.raises(WireError, match=words) as caught:
        roster.note("a", state("done", **fields))
    assert caught.value.reason == reason
    roster.join("a")
    assert not roster.done
    with pytest.raises(WireError):
        roster.note("new", state(**fields))
    assert roster.bundle("new") == ""


@pytest.mark.parametrize("speaks", [[1], [1, 2], [], None])
def test_a_device_that_speaks_this_version_or_does_not_say_is_noted(speaks: Any) -> None:
    Roster(9).note("a", state(**({} if speaks is None else {"speaks": speaks})))


def test_an_evaluation_is_given_once_when_it_is_complete() -> None:
    roster = Roster(9)
    for name in ("a", "b"):
        roster.join(name)
    roster.note("a", state(round=5, evaluation=counts(10, 6)))
    assert roster.evaluation() is None, "b has not said"
    roster.note("b", state(round=5, evaluation=counts(30, 26)))
    given = roster.evaluation()
    assert given is not None and (given["round"], given["samples"], given["accuracy"]) == (5, 40, 0.8)
    assert roster.evaluation() is None, "each once"
    roster.note("a", state(round=10, evaluation=counts(10, 6)))
    assert roster.evaluation() is None, "of different rounds"
    roster.note("b", state(round=10, evaluation=counts(30, 30)))
    assert (roster.evaluation() or {})["round"] == 10
    roster.note("a", state(round=5, evaluation=counts(10, 6)))
    roster.note("b", state(round=5, evaluation=counts(10, 6)))
    assert roster.evaluation() is None, "an older one comes too late"


def test_reports_of_strangers_do_not_count() -> None:
    roster = Roster(9)
    roster.join("a")
    roster.note("stranger", state(round=5, evaluation=counts(1000, 0)))
    assert roster.evaluation() is None
    roster.note("a", state(round=5, evaluation=counts(10, 10)))
    assert (roster.evaluation() or {})["samples"] == 10


def test_shares_by_hand() -> None:
    one = Evaluation(10, 6, {"fused": 6, "attacked": 5}, guide_right=8, guide_agreed=7, guide_followed=1)
    other = Evaluation(30, 24, {"fused": 24, "attacked": 15}, guide_right=26, guide_agreed=23, guide_followed=2)
    one.has_guide = True
    shares = summary([one, other])
    assert (shares["samples"], shares["accuracy"]) == (40, 0.75)
    assert shares["streams"] == {"attacked": 0.5, "fused": 0.75} and "guide_accuracy" not in shares
    other.has_guide = True
    shares = summary([one, other])
    assert (shares["guide_accuracy"], shares["guide_agreement"], shares["follow_when_wrong"]) == (0.85, 0.75, 0.5)


def test_shares_of_nothing_divide_by_nothing() -> None:
    assert summary([]) == {"samples": 0, "accuracy": 0.0, "streams": {}}
    perfect = Evaluation(4, 4, {}, guide_right=4, guide_agreed=4, has_guide=True)
    assert summary([perfect])["follow_when_wrong"] == 0.0


def test_the_figures_are_of_those_who_are_done() -> None:
    roster = Roster(9)
    for name in ("a", "b", "silent"):
        roster.join(name)
    roster.note("a", state("done", bytes_per_sample=100.0, evaluation=counts(10, 10), clean=counts(10, 5)))
    roster.note("b", state("training", bytes_per_sample=301.0, evaluation=counts(10, 0)))
    figures = roster.figures()
    assert figures["devices"] == ["a", "b", "silent"]
    assert figures["bytes_per_sample"] == 200.5, "of those who said"
    assert figures["evaluation"]["accuracy"] == 1.0 and figures["clean"]["accuracy"] == 0.5
    assert Roster(9).figures() == {"bytes_per_sample": 0.0, "devices": []}
