"""Kept replies: found by key, bounded, and old steps are known as old."""

from __future__ import annotations

from server_sdk.replies import Replies


def test_a_reply_is_found_by_its_key_until_newer_ones_push_it_out() -> None:
    replies = Replies(kept=2)
    for step in (1, 2, 3):
        replies.keep(("d", "s", step), (f"{step}".encode(),))
    assert replies.find(("d", "s", 3)) == (b"3",) and replies.find(("d", "s", 2)) == (b"2",)
    assert (
        replies.find(("d", "s", 1)) is None
        and replies.find(("e", "s", 3)) is None
        and replies.find(("d", "t", 3)) is None
    )
    assert replies.is_old(("d", "s", 1)) and not replies.is_old(("d", "s", 4)) and not replies.is_old(("d", "t", 1))


def test_the_silent_are_forgotten_first() -> None:
    replies = Replies(max_devices=2)
    for device in ("a", "b", "a", "c"):
        replies.keep((device, "s", 1), (b"",))
    assert replies.find(("a", "s", 1)) is not None and replies.find(("c", "s", 1)) is not None
    assert replies.find(("b", "s", 1)) is None and not replies.is_old(("b", "s", 1))


def test_what_is_dumped_and_loaded_answers_the_same() -> None:
    replies, again = Replies(), Replies()
    replies.keep(("d", "s", 1), (b"a", b"b"))
    replies.keep(("d", "s", 2), (b"c",))
    replies.keep(("e", "t", 7), ())
    again.load(*replies.dump())
    for key in (("d", "s", 1), ("d", "s", 2), ("e", "t", 7), ("e", "t", 8), ("d", "t", 1)):
        assert again.find(key) == replies.find(key) and again.is_old(key) == replies.is_old(key)
