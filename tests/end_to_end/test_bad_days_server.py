"""Bad days of the server, through its command: signals, wrong options on the way back, a full or read-only disk."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edge_sdk import topics
from server_sdk import cli
from server_sdk.broker import EmbeddedBroker

ROUNDS = 150


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str]]]:
    """Run psgl-server's main in this process, for what ends before a broker is needed: exit code and output."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def main(line: list[str]) -> tuple[int, str]:
        code = cli.main(line)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    yield main
    for number, handler in handlers.items():
        signal.signal(number, handler)


def refused(outcome: tuple[int, str]) -> str:
    code, printed = outcome
    assert code == 2, printed
    (line,) = [line for line in printed.splitlines() if not line.startswith("{")]
    assert line.startswith("error: ")
    return line


def test_sigterm_pauses_a_run_and_resume_finishes_it(ward: Any, here: Any) -> None:
    server = ward.server(ROUNDS, "--resume")  # there is nothing to resume: it begins a run
    device = ward.device("d1")
    server.wait("round", round=30)
    server.send(signal.SIGTERM)
    assert server.end() == 130 and any("go on with --resume" in line for line in server.errors)
    stopped = server.of("checkpoint")[-1]["round"]
    assert 30 <= stopped == server.of("round")[-1]["round"] < ROUNDS
    announced = ward.announced()
    run = server.wait("waiting")["run"]
    assert (announced.run, announced.fields["status"], announced.fields["round"]) == (run, "paused", stopped)

    again = refused(here(ward.train(ROUNDS)))
    assert f"stopped after round {stopped}" in again and all(way in again for way in ("--resume", "--fresh", "--out"))
    for options, words in {
        ("--resume", "--rounds", "151"): "rounds 150, this command 151",
        ("--resume", "--batch", "7"): "batch 6, this command 7",
        ("--resume", "--learning-rate", "0.5"): "learning_rate 0.002, this command 0.5",
        ("--resume", "--durability", "checkpoint"): "durability log, not checkpoint",
        ("--resume", "--fresh"): "contradict",
    }.items():
        assert words in refused(here(ward.train(ROUNDS, *options)))
    assert "has bundle " in refused(here(ward.train(ROUNDS, "--resume", profile="paper")))
    assert ward.announced().fields["status"] == "paused" and device.process.poll() is None, "the device waits"

    resumed = ward.server(ROUNDS, "--resume")
    assert resumed.wait("resumed")["round"] == stopped and resumed.wait("waiting")["run"] == run
    assert device.end() == 0, device.errors
    assert resumed.end() == 0, resumed.errors
    rounds = [event["round"] for command in (server, resumed) for event in command.of("round")]
    assert rounds == list(range(1, ROUNDS + 1))
    trained = ward.trained()
    assert len(set(trained)) == len(trained) == ROUNDS == ward.report("d1")["steps"]

    code, printed = here(ward.train(ROUNDS, "--resume"))
    assert code == 0 and run in printed and "finished" in printed and "--fresh" in printed


def test_fresh_forgets_the_run_and_nothing_else_does(ward: Any) -> None:
    server = ward.server(5)
    run = server.wait("waiting")["run"]
    server.send(signal.SIGINT)
    assert server.end() == 130
    (ward.folder / "server" / "notes.txt").write_text("mine")
    fresh = ward.server(7, "--fresh")
    assert fresh.wait("waiting")["run"] != run
    ward.listener(topics.down_model).until(lambda message: message.run != run)
    device = ward.device("d1")
    assert device.end() == 0, device.errors
    assert fresh.end() == 0, fresh.errors
    assert len(ward.trained()) == 7 and (ward.folder / "server" / "notes.txt").read_text() == "mine"


def test_a_server_that_finds_no_broker_has_begun_no_run(ward: Any, here: Any) -> None:
    with EmbeddedBroker() as gone:
        port = gone.port
    for _ in range(2):
        line = refused(here([*ward.train(5), "--port", str(port), "--connect-timeout-s", "0.5"]))
        assert f"127.0.0.1:{port}" in line and "--resume" not in line


def test_a_second_server_leaves_the_first_ones_run_alone(ward: Any, here: Any) -> None:
    server = ward.server(5)
    server.wait("waiting")
    for option in ("--resume", "--fresh"):
        assert "in use" in refused(here(ward.train(5, option)))
    device = ward.device("d1")
    assert device.end() == 0, device.errors
    assert server.end() == 0 and len(ward.trained()) == 5


def goes_on_after_a_full_disk(ward: Any, server: Any, fill: Callable[[], None], free: Callable[[], None]) -> None:
    device = ward.device("d1")
    server.wait("round", round=20)
    fill()
    full = server.wait("disk", ok=False)
    assert "free" in full["why"]
    done = len(server.of("round"))
    assert done < ROUNDS and server.process.poll() is None and device.process.poll() is None
    free()
    server.wait("disk", ok=True)
    assert device.end() == 0, device.errors
    assert server.end() == 0, server.errors
    assert [event["ok"] for event in server.of("disk")] == [False, True], "each is said once"
    assert [event["round"] for event in server.of("round")] == list(range(1, ROUNDS + 1))


def test_a_full_disk_stops_the_rounds_until_there_is_space(ward: Any, small_disk: Any) -> None:
    server = ward.server(ROUNDS, out=small_disk.path / "run")
    goes_on_after_a_full_disk(ward, server, small_disk.fill, small_disk.free)
    trained = ward.trained(small_disk.path / "run")
    assert len(set(trained)) == len(trained) == ROUNDS == ward.report("d1")["steps"]


def test_a_disk_that_is_enlarged_is_as_good_as_one_that_is_freed(ward: Any, small_disk: Any) -> None:
    server = ward.server(ROUNDS, out=small_disk.path / "run")
    goes_on_after_a_full_disk(ward, server, small_disk.fill, lambda: small_disk.remount("size=64m"))


def test_a_file_that_may_not_grow_stops_the_rounds_until_it_may(ward: Any) -> None:
    server = ward.server(ROUNDS)
    log = ward.folder / "server" / "log"

    def fill() -> None:
        server.limit_files(max(file.stat().st_size for file in log.iterdir()) + 100)

    goes_on_after_a_full_disk(ward, server, fill, lambda: server.limit_files(None))
    trained = ward.trained()
    assert len(set(trained)) == len(trained) == ROUNDS == ward.report("d1")["steps"]


@pytest.mark.parametrize("what", ["full", "read-only"])
def test_a_run_cannot_begin_where_nothing_can_be_written(what: str, ward: Any, here: Any, small_disk: Any) -> None:
    small_disk.fill()
    if what == "read-only":
        small_disk.remount("ro")
    line = refused(here(ward.train(ROUNDS, out=small_disk.path / "run")))
    assert "space" in line if what == "full" else "read-only" in line.lower()
    assert str(small_disk.path) in line
