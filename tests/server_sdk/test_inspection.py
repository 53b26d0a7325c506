"""What inspection tells of a run's folder, what it never tells, and that it only looks."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from server_sdk.checkpoint import Checkpoint, Checkpoints
from server_sdk.errors import LogError
from server_sdk.inspection import describe, print_log
from server_sdk.log import Log

ROOT = Path(__file__).resolve().parents[2]
SESSION = "0123456789abcdef"


def step(log: Log, device: str, number: int) -> list[Any]:
    log.append("step", {"device": device, "kind": "train", "session": SESSION, "step": number}, b"\x2a" * 1000)
    return [device, SESSION, number]


def a_run(folder: Path) -> Log:
    """Ten records in two segments, a checkpoint between them."""
    log = Log(folder / "log")
    log.append("begin", {"run": "r1", "rounds": 5})
    for number in (1, 2):
        steps = [step(log, "ward-1", number), step(log, "ward-2", number)]
        log.append("round", {"round": number, "steps": steps, "absent": ["ward-3"]})
        if number == 1:
            Checkpoints(folder / "checkpoints").write(Checkpoint(4, {"w": torch.ones(9)}, {}, {"round": 1}))
            log.rotate()
    log.append("synchronise", {"number": 1, "steps": steps, "mean": True, "holder": ""})
    log.append("turn", {"turn": 2, "device": "ward-2"})
    log.append("epoch", {})
    return log


def printed(folder: Path, *, as_json: bool = False, limit: int | None = None, start: int = 1) -> list[str]:
    stream = io.StringIO()
    print_log(folder, as_json=as_json, limit=limit, start=start, stream=stream)
    return stream.getvalue().splitlines()


def events(folder: Path, name: str, **options: Any) -> list[dict[str, Any]]:
    return [event for event in describe(folder, **options) if event["event"] == name]


def test_everything_is_told_while_the_server_runs_and_nothing_is_touched(tmp_path: Path) -> None:
    log = a_run(tmp_path)
    (tmp_path / "checkpoints" / "checkpoint-000000000010.safetensors.partial").write_bytes(b"being written")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    records = events(tmp_path, "record")
    assert [record["position"] for record in records] == list(range(1, 11))
    assert records[0] == {
        "event": "record",
        "position": 1,
        "kind": "begin",
        "bytes": 0,
        "fields": {"run": "r1", "rounds": 5},
    }
    assert records[1] == {
        "event": "record",
        "position": 2,
        "kind": "step",
        "bytes": 1000,
        "device": "ward-1",
        "session": SESSION,
        "step": 1,
        "message": "train",
    }
    steps = [["ward-1", SESSION, 1], ["ward-2", SESSION, 1]]
    assert records[3] == {
        "event": "record",
        "position": 4,
        "kind": "round",
        "bytes": 0,
        "round": 1,
        "steps": steps,
        "absent": ["ward-3"],
    }
    sizes = [path.stat().st_size for path in sorted((tmp_path / "log").glob("*.log"))]
    assert events(tmp_path, "segment") == [
        {"event": "segment", "file": "000000000001.log", "first": 1, "records": 4, "bytes": sizes[0]},
        {"event": "segment", "file": "000000000005.log", "first": 5, "records": 6, "bytes": sizes[1]},
    ]
    checkpoint = tmp_path / "checkpoints" / "checkpoint-000000000004.safetensors"
    assert events(tmp_path, "checkpoint") == [
        {
            "event": "checkpoint",
            "file": checkpoint.name,
            "position": 4,
            "bytes": checkpoint.stat().st_size,
            "round": 1,
        }
    ]
    kinds = {"begin": 1, "epoch": 1, "round": 2, "step": 4, "synchronise": 1, "turn": 1}
    assert list(describe(tmp_path))[-1] == {
        "event": "totals",
        "records": 10,
        "bytes": 4000,
        "kinds": kinds,
        "repeated": 0,
    }
    assert before == {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()
    }
    log.close()


def test_a_step_that_was_trained_twice_stands_out(tmp_path: Path) -> None:
    log = a_run(tmp_path)
    log.append("round", {"round": 3, "steps": [["ward-1", SESSION, 2], ["ward-1", "other", 2], ["ward-2", SESSION, 9]]})
    log.append("round", {"round": 4, "steps": [["ward-1", SESSION, 3], ["ward-1", SESSION, 3]]})
    log.close()
    assert [(each["step"], each["positions"]) for each in events(tmp_path, "repeated")] == [(2, [7, 11]), (3, [12, 12])]
    lines = printed(tmp_path)
    assert "           TRAINED TWICE: ward-1 012345 2, in records 7 and 11" in lines
    assert any("2 steps TRAINED TWICE: 1 begin" in line for line in lines)
    assert events(tmp_path, "totals", start=8)[0]["repeated"] == 1


def test_the_text_is_aligned_and_fits_its_columns(tmp_path: Path) -> None:
    log = a_run(tmp_path)
    log.append("round", {"round": 3, "steps": [[f"ward-{each}", SESSION, each] for each in range(9, 99)], "absent": []})
    log.append(
        "a-kind-of-tomorrow", {"text": "x" * 500, "number": 3, "list": [1], "nothing": None, "esc\x1b": "\x1b[31m"}
    )
    log.close()
    lines = printed(tmp_path)
    assert max(map(len, lines)) == 100 and all(line.isprintable() for line in lines)
    assert lines[0] == " position  kind          body bytes  what"
    assert lines[2] == "        2  step               1,000  ward-1 012345 1 train"
    assert lines[4] == "        4  round                  0  round 1  without ward-3  ward-1 1, ward-2 1"
    assert lines[11].endswith("…") and lines[12].startswith("       12  a-kind-of-tomorrow           0  esc")
    assert sum(line.startswith(" position") for line in lines) == 2
    assert lines[-2].startswith("12 records, 4,000 bytes of messages, no step trained twice: 1 a-kind-of-tomorrow, 1")
    assert lines[-1] == "           3 round, 4 step, 1 synchronise, 1 turn"


def test_json_is_one_object_a_line_and_limits_leave_the_totals_true(tmp_path: Path) -> None:
    a_run(tmp_path).append("odd", {"loss": float("nan")})
    told = [json.loads(line, parse_constant=pytest.fail) for line in printed(tmp_path, as_json=True)]
    assert told == list(describe(tmp_path)) and len(told) == 11 + 2 + 1 + 1
    told = [json.loads(line) for line in printed(tmp_path, as_json=True, limit=2, start=3)]
    assert [each.get("position") for each in told if each["event"] == "record"] == [3, 4]
    assert told[-1]["records"] == 9
    lines = printed(tmp_path, limit=2, start=3)
    assert [line.split()[0] for line in lines[:4]] == ["position", "3", "4", "and"] and "7 records more" in lines[3]
    assert any(line.startswith("9 records") for line in lines)
    assert printed(tmp_path, limit=0)[0].endswith("and 11 records more")


def test_no_data_of_a_patient_is_told(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    secret = {"labels": [7777, 7777], "label": 7777, "activations": b"7777", "x": [7777.5], "deep": {"y": 7777}}
    log.append("step", {"device": "d", "session": "s", "step": 1, **secret}, b"7777" * 9)
    log.append("round", {"round": [7777], "steps": [[7777]], "absent": [7777], "device": {"a": 7777}})
    log.append("round", {"steps": 3, "absent": "nobody"})
    log.close()
    for as_json in (False, True):
        lines = printed(tmp_path, as_json=as_json)
        assert "7777" not in "".join(lines) and len(lines) > 4


def test_a_damaged_log_is_told_up_to_the_damage(tmp_path: Path) -> None:
    log = a_run(tmp_path)
    log.close()
    path = tmp_path / "log" / "000000000001.log"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"?")
    told = list(describe(tmp_path))
    assert [each["position"] for each in told if each["event"] == "record"] == [1, 2, 3]
    damage = next(each for each in told if each["event"] == "damage")
    assert damage["file"] == str(path) and data[damage["offset"]] == 0x83 and not damage["torn"]
    assert [each["event"] for each in told[4:]] == ["segment", "segment", "checkpoint", "totals"]
    text = "\n".join(printed(tmp_path))
    assert "DAMAGED" in text and str(path) in text and f"byte {damage['offset']}" in " ".join(text.split())
    path.write_bytes(data)
    with (tmp_path / "log" / "000000000005.log").open("ab") as file:
        file.write(b"\x83\x1b")
    assert events(tmp_path, "damage")[0]["torn"] and len(events(tmp_path, "record")) == 10
    assert "an incomplete record" in "\n".join(printed(tmp_path))


def test_a_damaged_checkpoint_is_told_and_stays(tmp_path: Path) -> None:
    a_run(tmp_path).close()
    path = tmp_path / "checkpoints" / "checkpoint-000000000004.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    told = events(tmp_path, "checkpoint")[0]
    assert told["position"] == 4 and "damaged" in told["why"] and path.exists()
    assert any("is damaged" in line for line in printed(tmp_path))


def test_folders_that_lack_something(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="give the folder"):
        printed(tmp_path)
    Log(tmp_path / "log").close()
    assert printed(tmp_path)[-1] == "0 records, 0 bytes of messages, no step trained twice"
    Checkpoints(tmp_path / "b" / "checkpoints").write(Checkpoint(1, {}, {}, {}))
    assert [event["event"] for event in describe(tmp_path / "b")] == ["checkpoint", "totals"]
    assert len(printed(tmp_path / "b")) == 5


def test_looking_does_not_wait_for_torch() -> None:
    code = "import sys, server_sdk.inspection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
