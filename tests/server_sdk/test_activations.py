"""The log as activation store: the numbers that were sent, in an order that seed and epoch alone decide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.body import from_body, to_body
from edge_sdk.wire import Message, Packing
from server_sdk.activations import ActivationStore
from server_sdk.errors import LogError
from server_sdk.log import Log, Place

CUT = (4, 3, 3)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with closing(Log(tmp_path / "log")) as opened:
        yield opened


def message(count: int, first: int, total: int, *, step: int = 1, seed: int = 0, session: str = "s") -> Message:
    generator = np.random.default_rng([seed, first])
    tensors: dict[str, Any] = {
        "activations": generator.normal(size=(count, *CUT)).astype(np.float32),
        "labels": np.arange(first, first + count, dtype=np.int64),
    }
    return Message("store", "r", session, step, {"front": 0, "first": first, "total": total}, tensors)


def add(store: ActivationStore, log: Log, device: str, sent: Message, codec: str | Packing = "float32") -> Message:
    """As the run does it: the body goes into the log, the store takes its place. Returns what the server decoded."""
    body = to_body(sent, codec)
    decoded = from_body(body)
    store.add(device, decoded, body, log.append("step", {"device": device}, body))
    return decoded


def epoch(store: ActivationStore) -> list[tuple[Any, Any, Any]]:
    store.begin_epoch()
    batches = []
    while store.ready:
        batches.append(store.next_batch())
    return batches


@pytest.mark.parametrize(
    "codec", ["float32", "float16", Packing(1), Packing(2, -1.0, 1.0), Packing(4), Packing(8, -2.0, 2.0)], ids=str
)
def test_what_comes_out_is_what_was_decoded_to_the_bit(codec: str | Packing, log: Log) -> None:
    store = ActivationStore(seed=1, batch=5, weights="equal")
    parts = [
        add(store, log, "a", message(4, 0, 10), codec),
        add(store, log, "b", message(5, 0, 5, seed=9), codec),
        add(store, log, "a", message(6, 4, 10, step=2), codec),
    ]
    activations = np.concatenate([part.tensors["activations"] for part in parts])
    labels = np.concatenate([part.tensors["labels"] for part in parts])
    batches = epoch(store)
    assert [len(taken) for _, taken, _ in batches] == [5, 5, 5] and len(store) == 15
    order = np.random.default_rng([1, 1]).permutation(15)
    assert np.array_equal(np.concatenate([taken for _, taken, _ in batches]), labels[order])
    together = np.concatenate([taken for taken, _, _ in batches])
    assert together.dtype == np.float32 and np.array_equal(together, activations[order])


def test_an_epoch_has_whole_batches_only_and_each_sample_at_most_once(log: Log) -> None:
    store = ActivationStore(seed=0, batch=4, weights="equal")
    assert not store.ready and store.epoch == 0
    add(store, log, "a", message(10, 0, 10))
    assert not store.ready, "nothing is trained before an epoch begins"
    first, second = epoch(store), epoch(store)
    assert store.epoch == 2 and [len(batches) for batches in (first, second)] == [2, 2]
    seen = [label for _, labels, _ in first for label in labels.tolist()]
    assert len(set(seen)) == 8
    assert seen != [label for _, labels, _ in second for label in labels.tolist()], "each epoch has its own order"


def test_fewer_samples_than_a_batch_are_one_batch(log: Log) -> None:
    store = ActivationStore(seed=0, batch=8, weights="equal")
    add(store, log, "a", message(3, 0, 3))
    (only,) = epoch(store)
    assert sorted(only[1].tolist()) == [0, 1, 2] and not store.ready


def test_what_comes_later_waits_for_the_next_epoch(log: Log) -> None:
    store = ActivationStore(seed=0, batch=2, weights="equal")
    add(store, log, "a", message(4, 0, 8))
    store.begin_epoch()
    add(store, log, "a", message(4, 4, 8, step=2))
    seen = []
    while store.ready:
        seen += store.next_batch()[1].tolist()
    assert sorted(seen) == [0, 1, 2, 3]
    assert sorted(label for _, labels, _ in epoch(store) for label in labels.tolist()) == list(range(8))


def test_samples_that_came_in_an_earlier_life_are_not_taken_twice(log: Log) -> None:
    store = ActivationStore(seed=0, batch=4, weights="equal")
    add(store, log, "a", message(4, 0, 8))
    add(store, log, "a", message(4, 0, 8, step=9, session="another life"))
    assert len(store) == store.count("a") == 4 and store.complete == ()
    assert store.holds(("a", "s", 1)) and store.holds(("a", "another life", 9)), "both have their answer"
    assert not any(store.holds(key) for key in (("a", "s", 9), ("b", "s", 1), ("a", "another life", 1)))
    add(store, log, "a", message(4, 4, 8, step=10, session="another life"))
    assert store.complete == store.devices == ("a",)


def test_devices_are_complete_one_by_one(log: Log) -> None:
    store = ActivationStore(seed=0, batch=4, weights="equal")
    add(store, log, "b", message(2, 0, 2))
    add(store, log, "a", message(2, 0, 4))
    assert store.devices == ("a", "b") and store.complete == ("b",)
    assert (store.count("a"), store.count("b"), store.count("c")) == (2, 2, 0)


@pytest.mark.parametrize("weights", ["equal", "samples"])
def test_unequal_data_counts_as_configured(weights: str, log: Log) -> None:
    store = ActivationStore(seed=0, batch=8, weights=weights)
    add(store, log, "rich", message(6, 0, 6))
    add(store, log, "poor", message(2, 0, 2, seed=5))
    ((_, labels, given),) = epoch(store)
    if weights == "samples":
        assert given is None, "each sample counts the same"
        return
    assert given is not None and given.dtype == np.float32 and given.mean() == pytest.approx(1)
    assert len(np.unique(given)) == 2
    assert given.sum() / 2 == pytest.approx(np.sort(given)[:6].sum()), "both devices count the same"
    assert len(labels) == 8


def test_an_epoch_goes_on_where_a_checkpoint_left_it(log: Log) -> None:
    one, other = (ActivationStore(seed=3, batch=2, weights="equal") for _ in range(2))
    for store in (one, other):
        add(store, log, "a", message(6, 0, 8))
    one.begin_epoch()
    one.next_batch()
    facts = one.dump()
    add(other, log, "a", message(2, 6, 8, step=2))  # after the checkpoint: not in the epoch under way
    other.load(facts)
    assert (other.epoch, other.dump()) == (1, facts)
    while one.ready:
        assert np.array_equal(one.next_batch()[1], other.next_batch()[1])
    assert not other.ready


def test_a_checkpoint_before_the_first_epoch_begins_none(log: Log) -> None:
    store = ActivationStore(seed=3, batch=2, weights="equal")
    facts = store.dump()
    add(store, log, "a", message(4, 0, 4))
    store.load(facts)
    assert store.epoch == 0 and not store.ready


def test_a_log_without_the_samples_of_the_checkpoint_is_refused(log: Log) -> None:
    store = ActivationStore(seed=0, batch=2, weights="equal")
    add(store, log, "a", message(4, 0, 4))
    with pytest.raises(ValueError, match="5 samples were stored, the log holds 4"):
        store.load({"epoch": 1, "size": 5, "cursor": 2})


def test_samples_are_read_across_the_log_segments_that_grow(log: Log) -> None:
    store = ActivationStore(seed=0, batch=1, weights="equal")
    add(store, log, "a", message(1, 0, 3))
    epoch(store)  # the first segment is mapped now, and then grows
    add(store, log, "a", message(1, 1, 3, step=2))
    log.rotate()
    add(store, log, "a", message(1, 2, 3, step=3))
    assert sorted(labels[0] for _, labels, _ in epoch(store)) == [0, 1, 2]


@pytest.mark.parametrize("what", ["gone", "empty"])
def test_a_log_file_that_is_not_there_is_named(what: str, log: Log, tmp_path: Path) -> None:
    store = ActivationStore(seed=0, batch=2, weights="equal")
    sent = message(4, 0, 4)
    body, path = to_body(sent), tmp_path / "000000000001.log"
    if what == "empty":
        path.touch()
    store.add("a", sent, body, Place(path, 100, len(body)))
    store.begin_epoch()
    with pytest.raises(LogError, match=r"000000000001.log cannot be read: .* the samples of the run are in it"):
        store.next_batch()


def test_what_is_no_store_message_is_refused(log: Log) -> None:
    store = ActivationStore(seed=0, batch=2, weights="equal")
    sent = message(4, 0, 4)
    with pytest.raises(KeyError):
        store.add("a", replace(sent, fields={"front": 0, "total": 4}), to_body(sent), Place(Path("x"), 0, 0))
