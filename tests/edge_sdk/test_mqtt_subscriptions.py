"""What a connection should be subscribed to, when answers and changes of mind cross."""

from __future__ import annotations

from edge_sdk.mqtt_subscriptions import Subscriptions


class Wire:
    """A link that notes what is asked, and whose answers a test writes."""

    def __init__(self) -> None:
        self.subscribed: dict[int, list[str | None]] = {}
        self.unsubscribed: dict[int, list[str | None]] = {}
        self.renewed: tuple[tuple[str, ...], int | None] = ((), None)
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def subscribe(self, patterns: tuple[str, ...]) -> int:
        self.asked.append(("subscribe", patterns))
        return len(self.asked)

    def unsubscribe(self, patterns: tuple[str, ...]) -> int:
        self.asked.append(("unsubscribe", patterns))
        return len(self.asked)


def test_what_was_given_up_while_it_was_renewed_is_ended_and_its_refusal_is_no_complaint() -> None:
    wire, wanted = Wire(), Subscriptions()
    wanted.add(("a", "b"))
    wire.renewed = (wanted.patterns, wire.subscribe(wanted.patterns))
    wanted.remove(("b",))
    wanted.add(("c",))
    wire.subscribed[1] = [None, "Not authorized"]
    assert wanted.connected(wire) == {} and wanted.refused == ()
    assert wire.asked[1:] == [("subscribe", ("c",)), ("unsubscribe", ("b",))]
    assert wanted.unwanted == ("b",)
    wire.unsubscribed[3] = [None]
    assert wanted.settle(wire) == {} and wanted.unwanted == () and not wire.unsubscribed
    wire.asked.clear()
    wire.renewed = ((), None)
    assert wanted.connected(wire) == {}
    assert wire.asked == [("subscribe", ("a", "c"))]


def test_what_is_wanted_twice_is_wanted_once() -> None:
    wanted = Subscriptions()
    wanted.add(("a", "b"))
    wanted.add(("b", "c"))
    wanted.remove(("a",))
    wanted.remove(("a", "b"))
    assert wanted.patterns == ("c",) and wanted.unwanted == ("a", "b")
    wanted.add(("b",))
    assert wanted.patterns == ("c", "b") and wanted.unwanted == ("a",)
    assert wanted.answered(("c", "b"), [None, "no"]) == ("b",)
    assert wanted.patterns == ("c",)
