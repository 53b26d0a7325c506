"""The run as a function of its records: who is answered what, when fronts are due, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from edge_sdk.body import to_body
from edge_sdk.wire import Assembler, Limits, Message, decode_frame
from server_sdk.checkpoint import Checkpoint
from server_sdk.errors import CheckpointError, TrainingError
from server_sdk.log import Place, Record
from server_sdk.plan import TrainingPlan
from server_sdk.screening import Screen
from server_sdk.training_run import Outgoing, TrainingRun

CUT = (2, 2, 2)
PLAN = TrainingPlan(devices=2, rounds=6, codec="float32")


class Trainer:
    """Stands for the networks: its gradient is the round's number, and it remembers what it was given."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        self.options: Mapping[str, Any] = {"learning_rate": learning_rate}
        self.seen: list[tuple[Any, Any, Any]] = []
        self.fail = False
        self.round = 0

    def step(self, activations: Any, labels: Any, weights: Any) -> Any:
        if self.fail:
            raise TrainingError("the loss is not finite: lower the learning rate")
        self.round += 1
        self.seen.append((activations, labels, weights))
        return SimpleNamespace(losses={"attacked": 0.25}, gradient=activations * 10, rate=0.5)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"round": torch.tensor(self.round)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self.round = int(state["round"])


class Driver:
    """Applies records to a run, as a journal does, and keeps them."""

    def __init__(self, plan: TrainingPlan = PLAN, screen: Screen | None = None, *, run: str = "r") -> None:
        self.trainer = Trainer()
        self.run = TrainingRun(run, "bundle-1", self.trainer, plan, screen)  # type: ignore[arg-type]
        self.records: list[tuple[Record, Place]] = []
        self.apply("begin", {})

    def apply(self, kind: str, fields: Mapping[str, Any], body: bytes = b"") -> dict[str, Message]:
        """Replies by device."""
        record = Record(self.run.position + 1, kind, fields, body)
        replies = self.run.apply(record)
        self.records.append((record, Place(Path("log"), 0, len(body))))
        return {each.device: decoded(each) for each in replies}

    def train(self, device: str, step: int, value: float = 1.0, count: int = 1, **fields: Any) -> None:
        tensors: dict[str, Any] = {
            "activations": np.full((count, *CUT), value, np.float32),
            "labels": np.zeros(count, np.int64),
        }
        self.arrive(device, Message("train", "r", "s", step, {"front": 3, **fields}, tensors))

    def give(self, device: str, step: int, value: float | None = None, **fields: Any) -> dict[str, Message]:
        tensors = {} if value is None else {"p.w": np.full(2, value, np.float32)}
        return self.arrive(device, Message("front", "r", "s", step, {"front": 3, **fields}, tensors))

    def arrive(self, device: str, message: Message) -> dict[str, Message]:
        return self.apply("step", {"device": device, "kind": message.kind}, to_body(message))

    def round(self, *keys: tuple[str, int], absent: tuple[str, ...] = ()) -> dict[str, Message]:
        steps = [[device, "s", step] for device, step in keys]
        return self.apply("round", {"round": self.run.round + 1, "steps": steps, "absent": list(absent)})

    def synchronise(self, *keys: tuple[str, int], mean: bool = False, holder: str = "") -> dict[str, Message]:
        steps = [[device, "s", step] for device, step in keys]
        return self.apply("synchronise", {"steps": steps, "mean": mean, "holder": holder})

    def again(self, checkpoint: Checkpoint | None = None) -> TrainingRun:
        """Another run of the same records: all of them, or those behind a checkpoint."""
        other = TrainingRun("r", "bundle-1", Trainer(), self.run.plan)  # type: ignore[arg-type]
        if checkpoint is not None:
            other.load(checkpoint, self.records)
        return other


def decoded(outgoing: Outgoing) -> Message:
    assembler = Assembler(Limits())
    message = None
    for frame in outgoing.frames:
        message = assembler.add(decode_frame(frame, Limits()))
    assert message is not None
    return message


# --- rounds ---


def test_a_round_trains_in_its_own_order_and_answers_each_with_its_part() -> None:
    driver = Driver()
    driver.train("b", 1, value=2.0, count=3)
    driver.train("a", 4, value=1.0, count=1)
    assert list(driver.run.waiting) == ["b", "a"] and driver.run.members == {"a", "b"}
    replies = driver.round(("a", 4), ("b", 1))
    activations, labels, weights = driver.trainer.seen[0]
    assert activations[:, 0, 0, 0].tolist() == [1, 2, 2, 2] and len(labels) == 4 and weights is None
    assert {name: len(reply.tensors["gradient"]) for name, reply in replies.items()} == {"a": 1, "b": 3}
    assert replies["b"].tensors["gradient"].max() == 20 and replies["a"].step == 4
    assert replies["a"].fields == {"front": 3, "rate": 0.5, "loss": 0.25, "round": 1}
    trained = driver.run.trained
    assert trained is not None and (trained.round, trained.devices, trained.absent) == (1, ("a", "b"), ())
    assert driver.run.steps == {"a": 1, "b": 1} and not driver.run.waiting


def test_a_step_is_known_while_it_waits_and_after_it_was_answered() -> None:
    driver, key = Driver(), ("a", "s", 1)
    assert driver.run.known(key) is None
    driver.train("a", 1)
    assert driver.run.known(key) == (), "it waits: nothing to say yet"
    assert driver.run.known(("a", "s", 2)) is None and driver.run.known(("a", "t", 1)) is None
    first = driver.round(("a", 1))["a"]
    assert decoded(Outgoing("a", driver.run.known(key) or ())) == first
    for step in (2, 3):
        driver.train("a", step)
        driver.round(("a", step))
    assert driver.run.known(key) == (), "long past: its sender has gone on"


def test_a_newer_step_of_a_device_takes_the_place_of_the_one_that_waits() -> None:
    driver = Driver()
    driver.train("a", 1)
    driver.train("b", 1)
    driver.train("a", 2)
    assert list(driver.run.waiting) == ["b", "a"]
    with pytest.raises(CheckpointError, match="step 1 of a does not wait"):
        driver.round(("a", 1))


def test_the_absent_are_waited_for_again_after_their_next_step() -> None:
    driver = Driver()
    for name in ("a", "b"):
        driver.train(name, 1)
    driver.round(("a", 1), ("b", 1))
    driver.train("a", 2)
    driver.round(("a", 2), absent=("b",))
    assert driver.run.members == {"a"}
    assert driver.run.trained is not None and driver.run.trained.absent == ("b",)
    driver.train("b", 2)
    assert driver.run.members == {"a", "b"}


def test_devices_count_by_their_samples_where_the_plan_says_so() -> None:
    driver = Driver(replace(PLAN, weights="samples"))
    driver.train("a", 1, count=2, samples=100)
    driver.train("b", 1, count=1, samples=300)
    driver.round(("a", 1), ("b", 1))
    weights = driver.trainer.seen[0][2]
    assert weights.dtype == np.float32 and weights.tolist() == [0.5, 0.5, 1.5]


def test_an_update_that_must_not_be_made_is_refused_and_counts_no_round() -> None:
    driver = Driver()
    driver.train("a", 1)
    driver.trainer.fail = True
    reply = driver.round(("a", 1))["a"]
    assert (reply.kind, reply.fields["reason"]) == ("refused", "training") and "learning rate" in reply.fields["detail"]
    assert driver.run.round == 0 and driver.run.steps == {} and driver.run.trained is None
    assert driver.run.failed == reply.fields["detail"]
    assert driver.run.known(("a", "s", 1)), "a repeated step gets the same refusal"
    driver.trainer.fail = False
    driver.train("a", 2)
    assert driver.round(("a", 2))["a"].fields["round"] == 1 and driver.run.failed == ""


def test_clipping_is_part_of_the_round_and_is_counted() -> None:
    driver = Driver(screen=Screen(1.0, "clip"))
    driver.train("a", 1, value=0.1)
    driver.train("b", 1, value=5.0, count=2)
    driver.round(("a", 1), ("b", 1))
    norms = np.sqrt(np.square(driver.trainer.seen[0][0].reshape(3, -1)).sum(axis=1))
    assert norms[0] == pytest.approx(0.1 * np.sqrt(8)) and (norms[1:] <= 1).all()
    assert driver.run.trained is not None and driver.run.trained.clipped == 2


# --- fronts ---


def test_shared_fronts_are_due_every_so_many_rounds_and_after_the_last() -> None:
    driver = Driver(replace(PLAN, fronts="shared", synchronise_every=2, rounds=4))
    for name in ("a", "b"):
        driver.train(name, 1)
    assert "synchronise" not in driver.round(("a", 1), ("b", 1))["a"].fields and driver.run.owing == set()
    for name in ("a", "b"):
        driver.train(name, 2)
    replies = driver.round(("a", 2), ("b", 2))
    assert all(reply.fields["synchronise"] is True for reply in replies.values())
    assert driver.run.owing == {"a", "b"}
    driver.give("a", 3, 1.0)
    assert driver.run.owing == {"b"} and driver.run.known(("a", "s", 3)) == ()
    driver.give("b", 3, 3.0)
    replies = driver.synchronise(("a", 3), ("b", 3), mean=True)
    assert all(reply.tensors["p.w"].tolist() == [2.0, 2.0] for reply in replies.values())
    assert replies["a"].fields == {"front": 1, "round": 2} and driver.run.version == 1 and not driver.run.fronts
    for step in (4, 5):
        driver.train("a", step)
        last = driver.round(("a", step), absent=("b",) if step == 4 else ())["a"]
    assert "synchronise" not in last.fields, "after the last round each gives its front by itself"
    assert driver.run.owing == {"a"}, "and who is absent is not waited for"


def test_a_mean_weighs_by_samples_and_leaves_out_who_only_asks() -> None:
    driver = Driver(replace(PLAN, fronts="shared", weights="samples"))
    driver.give("a", 1, 1.0, samples=300)
    driver.give("b", 1, 5.0, samples=100)
    driver.give("c", 1)
    replies = driver.synchronise(("a", 1), ("b", 1), ("c", 1), mean=True)
    assert {name: reply.tensors["p.w"].tolist() for name, reply in replies.items()} == {
        name: [2.0, 2.0] for name in "abc"
    }


def test_a_mean_of_no_front_changes_nothing() -> None:
    driver = Driver(replace(PLAN, fronts="shared"))
    driver.give("c", 1)
    reply = driver.synchronise(("c", 1), mean=True)["c"]
    assert reply.tensors == {} and reply.fields["front"] == driver.run.version == 0


def test_whoever_comes_too_late_to_give_takes_the_current_mean() -> None:
    driver = Driver(replace(PLAN, fronts="shared"))
    driver.give("a", 1, 4.0)
    driver.synchronise(("a", 1), mean=True)
    before = driver.run.dump()
    late = decoded(driver.run.current_front(("b", "s", 9)))
    assert (late.kind, late.step, late.fields["front"]) == ("synchronised", 9, 1)
    assert late.tensors["p.w"].tolist() == [4.0, 4.0]
    assert driver.run.dump().facts == before.facts and driver.run.known(("b", "s", 9)) is None


def test_in_async_each_device_is_due_after_its_own_steps() -> None:
    driver = Driver(replace(PLAN, fronts="shared", schedule="async", synchronise_every=2))
    due = []
    for device, step in (("a", 1), ("b", 1), ("a", 2), ("a", 3), ("b", 2)):
        driver.train(device, step)
        due.append("synchronise" in driver.round((device, step))[device].fields)
    assert due == [False, False, True, False, True] and driver.run.owing == {"a", "b"}


def test_in_relay_the_front_goes_from_hand_to_hand() -> None:
    driver = Driver(replace(PLAN, fronts="relay", synchronise_every=2))
    driver.give("a", 1)
    reply = driver.synchronise(("a", 1), holder="a")["a"]
    assert reply.tensors == {} and driver.run.holder == "a", "the first holder begins with the bundle's front"
    driver.give("b", 1)
    for step, due in ((2, False), (3, True)):
        driver.train("a", step)
        assert ("synchronise" in driver.round(("a", step))["a"].fields) == due
    driver.give("a", 4, 7.0)
    assert driver.run.holder == "" and driver.run.version == 1
    reply = driver.synchronise(("b", 1), holder="b")["b"]
    assert reply.tensors["p.w"].tolist() == [7.0, 7.0] and (driver.run.holder, driver.run.last) == ("b", "b")
    driver.give("a", 5, 99.0)
    assert decoded(driver.run.current_front(("x", "s", 1))).tensors["p.w"].tolist() == [7.0, 7.0], "it was not a's turn"


# --- records and checkpoints ---


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("surprise", {}),
        ("round", {}),
        ("round", {"round": 1, "steps": [["a", "s", 1]], "absent": []}),
        ("round", {"round": 1, "steps": "no list", "absent": []}),
        ("synchronise", {"steps": [["a", "s", 1]], "mean": True, "holder": ""}),
        ("step", {"device": "a"}),
    ],
)
def test_a_record_that_does_not_fit_is_refused_with_its_position(kind: str, fields: dict[str, Any]) -> None:
    driver = Driver()
    with pytest.raises(CheckpointError, match=rf"record 2 \({kind}\) is none of this run .* use the run's own folder"):
        driver.apply(kind, fields)
    assert driver.run.position == 1


def test_stored_samples_need_the_log() -> None:
    driver = Driver(replace(PLAN, fronts="frozen"))
    tensors: dict[str, Any] = {"activations": np.ones((1, *CUT), np.float32), "labels": np.zeros(1, np.int64)}
    message = Message("store", "r", "s", 1, {"front": 0, "first": 0, "total": 1}, tensors)
    with pytest.raises(CheckpointError, match="needs the log"):
        driver.arrive("a", message)


@pytest.mark.parametrize("position", [1, 3])
def test_a_record_out_of_order_is_refused(position: int) -> None:
    driver = Driver()
    with pytest.raises(CheckpointError, match=f"record {position} follows 1: log and checkpoint do not belong"):
        driver.run.apply(Record(position, "begin", {}))


def test_a_checkpoint_has_all_that_waits_and_reads_no_more_than_it_needs() -> None:
    driver = Driver(replace(PLAN, fronts="shared", synchronise_every=1))
    driver.train("a", 1)
    driver.round(("a", 1))
    assert driver.run.oldest_needed == 4, "nothing waits"
    driver.give("a", 2, 1.0)
    driver.train("b", 1)
    assert driver.run.oldest_needed == 4
    dump = driver.run.dump()
    needed = [each for each in driver.records if each[0].position >= 4]
    other = driver.again()
    other.load(dump, needed)
    for name in ("round", "position", "steps", "members", "owing", "holder", "last", "turn", "version"):
        assert getattr(other, name) == getattr(driver.run, name), name
    assert list(other.waiting) == ["b"] and list(other.fronts) == ["a"]
    key = ("a", "s", 1)
    assert other.known(key) == driver.run.known(key) != () and other.known(("b", "s", 1)) == ()
    record = Record(6, "synchronise", {"steps": [["a", "s", 2]], "mean": True, "holder": ""})
    assert other.apply(record) == driver.run.apply(record)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": "another"}, "has run r, this command another"),
        ({"bundle": "bundle-2"}, "has bundle bundle-1, this command bundle-2"),
        ({"plan": replace(PLAN, rounds=7)}, "has plan's rounds 6, this command 7"),
        ({"plan": replace(PLAN, fronts="shared")}, "has plan's fronts own, this command shared"),
        ({"screen": Screen(3.0)}, "has screen's max_norm None, this command 3.0"),
        ({"trainer": Trainer(0.2)}, "has trainer's learning_rate 0.1, this command 0.2"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_with_the_difference(changes: dict[str, Any], words: str) -> None:
    dump = Driver().run.dump()
    usual: dict[str, Any] = {"run": "r", "bundle": "bundle-1", "trainer": Trainer(), "plan": PLAN, "screen": None}
    other = TrainingRun(**(usual | changes))
    with pytest.raises(CheckpointError, match=f"{words}.*--fresh"):
        other.load(dump, ())


@pytest.mark.parametrize("missing", ["round", "replies", "members", "version", "store"])
def test_a_checkpoint_that_lacks_something_is_refused(missing: str) -> None:
    dump = Driver().run.dump()
    facts = {name: value for name, value in dump.facts.items() if name != missing}
    with pytest.raises(CheckpointError, match=r"not whole .* --fresh"):
        Driver().again(replace(dump, facts=facts))


def test_a_run_is_over_after_its_rounds() -> None:
    driver = Driver(replace(PLAN, rounds=1))
    driver.train("a", 1)
    assert not driver.run.over
    driver.round(("a", 1))
    assert driver.run.over
