"""Bad days of a device, through its command: killed, of another run, its state damaged, full, read-only or sealed."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytest

from edge_sdk import topics
from edge_sdk.dataset import load_dataset

ROUNDS = 120
KEY = "5e" * 32


def sound(ward: Any, server: Any, steps: int = ROUNDS) -> None:
    """The run is finished, and each of its rounds has trained one step, once."""
    assert server.end() == 0, server.errors
    trained = ward.trained()
    assert len(set(trained)) == len(trained) == ROUNDS
    assert ward.report("d1")["steps"] == steps


def test_a_device_that_is_killed_again_and_again_goes_on(ward: Any) -> None:
    server = ward.server(ROUNDS)
    for reached in (20, 50):
        device = ward.device("d1")
        server.wait("round", round=reached)
        device.send(signal.SIGKILL)
        assert device.end() == -signal.SIGKILL
    device = ward.device("d1")
    server.wait("round", round=80)
    device.send(signal.SIGINT)
    assert device.end() == 130 and device.errors == ["stopped"]
    assert len(server.of("round")) < ROUNDS
    device = ward.device("d1")
    assert device.end() == 0, device.errors
    sound(ward, server)
    assert len({session for _, session, _ in ward.trained()}) == 1, "one life of the state, four of the process"


def test_a_device_of_another_run_or_bundle_says_what_to_do(ward: Any) -> None:
    first = ward.server(ROUNDS, out="first")
    device = ward.device("d1")
    first.wait("round", round=20)
    device.send(signal.SIGINT)
    assert device.end() == 130
    first.send(signal.SIGTERM)
    assert first.end() == 130
    second = ward.server(ROUNDS)
    old, new = first.wait("waiting")["run"], second.wait("waiting")["run"]
    ward.listener(topics.down_model).until(lambda message: message.run == new)
    assert "start this device again" in ward.device("d1").one_line()  # the broker had kept the first run's last word
    line = ward.device("d1").one_line()
    assert old in line and new in line and "--fresh" in line and "resume that run" in line
    assert "copy the server's bundle here" in ward.device("d2", profile="paper").one_line()
    assert not (ward.folder / "d1.json").exists() and not second.of("round")
    device = ward.device("d1", "--fresh")
    assert device.end() == 0, device.errors
    sound(ward, second)


def test_a_damaged_state_is_set_aside_and_the_device_goes_on(ward: Any) -> None:
    server = ward.server(ROUNDS)
    device = ward.device("d1")
    server.wait("round", round=20)
    device.send(signal.SIGINT)
    assert device.end() == 130
    state = ward.folder / "d1.sqlite"
    content = bytearray(state.read_bytes())
    for offset in range(100, len(content), 500):
        content[offset] ^= 0xFF
    state.write_bytes(content)
    device = ward.device("d1")
    assert device.end() == 0, device.errors
    (note,) = device.errors
    assert note.startswith("note: ") and "was damaged" in note and "d1.sqlite.damaged-1" in note
    assert (ward.folder / "d1.sqlite.damaged-1").read_bytes() == content
    sessions = [session for _, session, _ in ward.trained()]
    before = sessions.count(sessions[0])
    assert len(set(sessions)) == 2 and before >= 20
    sound(ward, server, ROUNDS - before)


def test_a_full_disk_ends_the_device_and_it_goes_on_when_there_is_space(ward: Any, small_disk: Any) -> None:
    state = small_disk.path / "state" / "d1.sqlite"
    server = ward.server(ROUNDS)
    device = ward.device("d1", "--state", state)
    server.wait("round", round=20)
    device.send(signal.SIGINT)
    assert device.end() == 130 and len(server.of("round")) < ROUNDS
    small_disk.fill()
    line = ward.device("d1", "--state", state).one_line()
    assert str(state) in line and "the disk is full: free some space" in line
    small_disk.free()
    device = ward.device("d1", "--state", state)
    assert device.end() == 0, device.errors
    sound(ward, server)


def test_a_state_that_may_not_grow_ends_the_device_in_the_middle_of_a_step(ward: Any) -> None:
    server = ward.server(ROUNDS)
    device = ward.device("d1", max_file_bytes=1 << 20)
    line = device.one_line()
    assert "d1.sqlite" in line and "free space" in line
    server.wait("round", round=5)
    assert len(server.of("round")) < ROUNDS
    device = ward.device("d1")
    assert device.end() == 0, device.errors
    sound(ward, server)


def test_a_read_only_state_is_one_line(ward: Any, small_disk: Any) -> None:
    server = ward.server(ROUNDS)
    state = small_disk.path / "state" / "d1.sqlite"
    small_disk.remount("ro")
    line = ward.device("d1", "--state", state).one_line()
    assert str(state) in line and "make the file and its folder writable" in line
    small_disk.remount("rw")
    device = ward.device("d1", "--state", state)
    server.wait("round", round=20)
    device.send(signal.SIGINT)
    assert device.end() == 130 and len(server.of("round")) < ROUNDS
    small_disk.remount("ro")
    line = ward.device("d1", "--state", state).one_line()
    assert str(state) in line and "make the file and its folder writable" in line
    small_disk.remount("rw")
    device = ward.device("d1", "--state", state)
    assert device.end() == 0, device.errors
    sound(ward, server)


@pytest.mark.parametrize("key", [None, KEY])
def test_a_state_shows_a_patients_image_only_where_no_key_is_set(key: str | None, ward: Any) -> None:
    server = ward.server(ROUNDS)
    sent = ward.listener(topics.up_step, "d1")
    run = server.wait("waiting")["run"]
    ward.listener(topics.down_model).until(lambda message: message.run == run)
    server.send(signal.SIGSTOP)
    environment = {} if key is None else {"PSGL_STATE_KEY": key}
    device = ward.device("d1", environment=environment)
    sent.until(lambda message: message.kind == "train")
    device.send(signal.SIGKILL)
    device.end()
    images = load_dataset(ward.folder / "data.npz").train.x
    marks = [(image.astype(np.float32) / np.float32(255)).tobytes() for image in images]
    kept = b"".join(path.read_bytes() for path in ward.folder.glob("d1.sqlite*"))
    assert sum(mark in kept for mark in marks) == (6 if key is None else 0)
    if key is not None:
        assert "is sealed and no key is configured" in ward.device("d1").one_line()
        other = {"PSGL_STATE_KEY": KEY.replace("5", "6")}
        assert "sealed with another key" in ward.device("d1", environment=other).one_line()
    server.send(signal.SIGCONT)
    device = ward.device("d1", environment=environment)
    assert device.end() == 0, device.errors
    sound(ward, server)
