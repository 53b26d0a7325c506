"""What a run's folder holds: every record of its log and its checkpoints, told without the data of any patient.

It takes no lock, repairs nothing and reads while the server writes.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from server_sdk.checkpoint import checkpoint_files, facts_of
from server_sdk.errors import CheckpointError, LogError
from server_sdk.log import Damage, Place, Record, scan
from server_sdk.segments import disk_errors, segments_of

__all__ = ["describe", "print_log"]

Event = dict[str, Any]

_WIDTH = 100
_TEXT = 60
_WRAP = textwrap.TextWrapper(_WIDTH, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False)
_HIDDEN = ("activation", "label", "gradient", "probabilit", "patient")


def describe(folder: Path, *, start: int = 1) -> Iterator[Event]:
    """Tell what a run's folder holds, in reading order.

    Args:
        folder: of a run, with ``log/`` and ``checkpoints/`` below it (either may be missing).
        start: position of the first record to tell; everything else counts from there too.

    Returns:
        Maps of plain data with the key ``event``:
        ``record``: position, kind, bytes (of its body), and of its fields device, session, step, round, message (the
        kind of a device's message), steps and absent as they are; the others in ``fields``, where lists, maps and bytes
        are told by their size alone;
        ``repeated``: device, session and step that were trained again, with both positions;
        ``damage``: file, offset, why, and whether it is only a torn end; no record follows;
        ``segment``: file, first position, records, bytes;
        ``checkpoint``: file, bytes, and position and round, or why it cannot be read;
        ``totals``: records, bytes (of all bodies), kinds with their counts, repeated.

    Raises:
        LogError: the folder holds neither, or cannot be read.
        CheckpointError: the folder of checkpoints cannot be read.
    """
    log, checkpoints = folder / "log", folder / "checkpoints"
    if not log.is_dir() and not checkpoints.is_dir():
        raise LogError(f"{folder} holds neither log nor checkpoints: give the folder that the server was given")
    kinds: Counter[str] = Counter()
    in_segment: Counter[Path] = Counter()
    body_bytes = repeated = 0
    trained: dict[tuple[str, str], dict[int, int]] = {}
    for item in scan(log, start) if log.is_dir() else ():
        if isinstance(item, Damage):
            yield {
                "event": "damage",
                "file": str(item.path),
                "offset": item.offset,
                "why": item.why,
                "torn": item.torn,
            }
            break
        record, place = item
        kinds[record.kind] += 1
        in_segment[place.path] += 1
        body_bytes += place.length
        yield _record(record, place)
        for device, session, step in _steps(record) if record.kind == "round" else ():
            positions = trained.setdefault((device, session), {})
            if step not in positions:
                positions[step] = record.position
            else:
                repeated += 1
                yield {
                    "event": "repeated",
                    "device": device,
                    "session": session,
                    "step": step,
                    "positions": [positions[step], record.position],
                }
    if log.is_dir():
        with disk_errors(log):
            for segment in segments_of(log):
                yield {
                    "event": "segment",
                    "file": segment.path.name,
                    "first": segment.first,
                    "records": in_segment[segment.path],
                    "bytes": segment.size,
                }
    yield from _checkpoints(checkpoints)
    yield {
        "event": "totals",
        "records": kinds.total(),
        "bytes": body_bytes,
        "kinds": dict(sorted(kinds.items())),
        "repeated": repeated,
    }


def print_log(folder: Path, *, as_json: bool, limit: int | None, start: int, stream: TextIO) -> None:
    """Print what ``describe`` tells.

    Args:
        folder: of a run.
        as_json: one JSON object a line instead of aligned text of at most 100 columns.
        limit: how many records to print, None for all; the rest is read and counted all the same.
        start: position of the first record.
        stream: where to print.

    Raises:
        LogError, CheckpointError: as ``describe``.
    """
    shown = left_out = 0
    headed = set()
    for event in describe(folder, start=start):
        if event["event"] == "record":
            shown += 1
            if limit is not None and shown > limit:
                left_out += 1
                continue
        if as_json:
            print(json.dumps(event), file=stream)
            continue
        if left_out and event["event"] in ("segment", "checkpoint", "totals"):
            print(f"{'':>9}  and {left_out} records more", file=stream)
            left_out = 0
        section = event["event"]
        if section in _HEADINGS and section not in headed:
            headed.add(section)
            print(_HEADINGS[section], file=stream)
        line = _LINES[section](event)
        if section == "record":
            print(line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…", file=stream)
        else:
            print(_WRAP.fill(line), file=stream)


def _record(record: Record, place: Place) -> Event:
    told: Event = {"event": "record", "position": record.position, "kind": _plain(record.kind), "bytes": place.length}
    others = {}
    for name, value in record.fields.items():
        if name == "kind":
            told["message"] = _plain(value)
        elif name in ("device", "session", "step", "round"):
            told[name] = _plain(value)
        elif (name == "steps" and _all_steps(record)) or (name == "absent" and _all_text(value)):
            told[name] = value
        else:
            others[_text(name)] = "hidden" if any(word in name.lower() for word in _HIDDEN) else _plain(value)
    if others:
        told["fields"] = others
    return told


def _steps(record: Record) -> Iterator[tuple[str, str, int]]:
    """The well-formed [device, session, step] of a record."""
    steps = record.fields.get("steps")
    for each in steps if isinstance(steps, list) else ():
        if isinstance(each, list) and [type(part) for part in each] == [str, str, int]:
            yield each[0], each[1], each[2]


def _all_steps(record: Record) -> bool:
    steps = record.fields["steps"]
    return isinstance(steps, list) and len(list(_steps(record))) == len(steps)


def _all_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _checkpoints(folder: Path) -> Iterator[Event]:
    for path, position in checkpoint_files(folder) if folder.is_dir() else ():
        told: Event = {"event": "checkpoint", "file": path.name, "position": position}
        try:
            told["bytes"] = path.stat().st_size
            number = facts_of(path).get("round", 0)
            told["round"] = number if isinstance(number, int) else 0
        except (OSError, CheckpointError) as exc:
            if not path.exists():
                continue  # the server wrote a newer one meanwhile
            told["why"] = str(exc)
        yield told


def _plain(value: object) -> object:
    """Short plain values as they are, all others by their size alone: they could be a patient's."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, list | Mapping):
        return f"<{type(value).__name__} of {len(value)}>"
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _text(text: str) -> str:
    """Printable on one line, of bounded length."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= _TEXT else shown[: _TEXT - 1] + "…"


def _record_line(event: Event) -> str:
    parts = []
    if "round" in event:
        parts.append(f"round {event['round']}")
    if "device" in event:
        parts.append(
            f"{event['device']} {_short(event.get('session'))} {event.get('step', '')} {event.get('message', '')}"
        )
    if event.get("absent"):
        parts.append("without " + ", ".join(map(_text, event["absent"])))
    if event.get("steps"):
        parts.append(", ".join(f"{_text(device)} {step}" for device, _, step in event["steps"]))
    parts += [f"{name}={value}" for name, value in event.get("fields", {}).items()]
    return f"{event['position']:>9}  {event['kind']:<12} {event['bytes']:>11,}  " + "  ".join(parts).rstrip()


def _short(session: object) -> str:
    """Enough of a session's 16 digits to tell two apart."""
    return _text(str(session or ""))[:6]


def _repeated_line(event: Event) -> str:
    first, again = event["positions"]
    key = f"{_text(event['device'])} {_short(event['session'])} {event['step']}"
    return f"{'':>9}  TRAINED TWICE: {key}, in records {first} and {again}"


def _damage_line(event: Event) -> str:
    what = "an incomplete record, which a start of the server cuts off" if event["torn"] else "DAMAGED"
    return f"{' ' * 11}{what}: {event['file']} at byte {event['offset']}: {event['why']}"


def _segment_line(event: Event) -> str:
    return f"{event['first']:>9}  {event['records']:>12,} {event['bytes']:>11,}  {event['file']}"


def _checkpoint_line(event: Event) -> str:
    what = event.get("why") or event["file"]
    return f"{event['position']:>9}  {event.get('round', ''):>12} {event.get('bytes', 0):>11,}  {what}"


def _totals_line(event: Event) -> str:
    kinds = ", ".join(f"{count} {_text(kind)}" for kind, count in event["kinds"].items())
    twice = f"{event['repeated']} steps TRAINED TWICE" if event["repeated"] else "no step trained twice"
    return f"{event['records']} records, {event['bytes']:,} bytes of messages, {twice}" + (
        f": {kinds}" if kinds else ""
    )


_HEADINGS = {
    "record": f"{'position':>9}  {'kind':<12} {'body bytes':>11}  what",
    "segment": f"\n{'from':>9}  {'records':>12} {'bytes':>11}  segment",
    "checkpoint": f"\n{'position':>9}  {'round':>12} {'bytes':>11}  checkpoint",
    "totals": "",
}
_LINES = {
    "record": _record_line,
    "repeated": _repeated_line,
    "damage": _damage_line,
    "segment": _segment_line,
    "checkpoint": _checkpoint_line,
    "totals": _totals_line,
}
