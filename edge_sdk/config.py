"""A device's TOML file: the options of ``psgl-edge run`` under names of their own, checked before anything is begun.

The file has no options of its own: each key is an option of the command line, so its type, choices and default are that
option's, and what stands on the command line counts more. Secrets are named by the path of their file alone.
"""

from __future__ import annotations

import argparse
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edge_sdk.errors import ConfigError

__all__ = ["KEYS", "load_config", "reference"]

KEYS: Mapping[str, Mapping[str, str]] = {
    "": {name: name for name in ("bundle", "store", "update", "update_mb", "public_key", "device", "fleet", "mode")},
    "broker": {
        name: name
        for name in (
            "host",
            "port",
            "user",
            "password_file",
            "tls",
            "ca",
            "cert",
            "key",
            "protocol",
            "connect_timeout_s",
        )
    },
    "state": {
        "file": "state",
        "key_file": "state_key_file",
        "sync": "state_sync",
        "outbox_mb": "outbox_mb",
        "when_full": "when_full",
    },
    "train": {
        name: name
        for name in (
            *("data", "seed", "shift", "wait_s", "give_up_s", "measure_clean"),
            *("train_unperturbed", "save_front", "report"),
        )
    },
    "wire": {"codec": "codec", "chunk_bytes": "chunk_bytes"},
    "source": {
        "path": "source",
        "kind": "source_kind",
        "columns": "columns",
        "time_column": "time_column",
        "array": "array",
        "hop": "hop",
        "hz": "hz",
        "tolerance": "hz_tolerance",
        "valid": "valid",
        "silent_s": "silent_s",
    },
    "infer": {"decisions": "decisions", "decision_s": "decision_s", "max_windows": "max_windows"},
    "backlog": {"max_windows": "backlog_windows", "when_full": "backlog_full"},
    "budget": {"connect_every_s": "connect_every_s", "max_bytes_per_hour": "max_bytes_per_hour"},
    "log": {"level": "log_level"},
}
"""The keys of each table, and the option that each stands for (by its name in Python)."""

_SECRETS = {"password": "password_file", "passphrase": "password_file", "state_key": "key_file", "secret": "key_file"}
_MAX_BYTES = 1 << 20


def load_config(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The values of a file, as defaults for the parser of ``psgl-edge run``.

    Args:
        path: the file; a relative path in it is relative to its folder.
        parser: knows the options.

    Raises:
        ConfigError: no such file, no TOML, an unknown key or table, a value of another type, a secret.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} has more than {_MAX_BYTES} bytes: it is no device's configuration")
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is no TOML ({exc}): correct it") from exc
    actions = {action.dest: action for action in parser._actions}
    values: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, dict):
            if name not in KEYS or not name:
                raise ConfigError(f"{path}: there is no table [{name}]{_nearest(name, filter(None, KEYS))}")
            entries, table = value, name
        else:
            entries, table = {name: value}, ""
        for key, entry in entries.items():
            where = f"{path}: {key}" + (f" in [{table}]" if table else "")
            dest = KEYS[table].get(key)
            if dest is None:
                raise ConfigError(_unknown(path, table, key))
            values[dest] = _checked(where, actions[dest], entry)
    folder = path.resolve().parent
    for dest, value in values.items():
        if isinstance(value, Path):
            values[dest] = folder / value
    for dest in ("source", "decisions"):
        if values.get(dest, "-") != "-" and not (dest == "source" and values.get("source_kind") == "python"):
            values[dest] = str(folder / values[dest])
    return values


def reference(parser: argparse.ArgumentParser) -> str:
    """The keys as Markdown tables, made of the options themselves."""
    actions = {action.dest: action for action in parser._actions}
    lines: list[str] = []
    for table, keys in KEYS.items():
        title = f"`[{table}]`" if table else "Before the first table"
        lines += ["", title, "", "| key | value | meaning |", "|---|---|---|"]
        for key, dest in keys.items():
            action = actions[dest]
            meaning = (action.help or "").replace("%(default)s", str(action.default)).replace("|", "\\|")
            lines.append(f"| `{key}` | {_kind(action)} | {meaning} |")
    return "\n".join(lines).strip() + "\n"


def _kind(action: argparse.Action) -> str:
    if action.choices is not None:
        return " ".join(f"`{choice}`" for choice in action.choices)
    if action.nargs == 0:
        return "true or false"
    name = {Path: "path", int: "integer", float: "number"}.get(action.type, "text")  # type: ignore[call-overload]
    return f"list of {name}s" if action.nargs in ("+", 2) else str(name)


def _checked(where: str, action: argparse.Action, value: Any) -> Any:
    if action.nargs in ("+", 2):
        if not isinstance(value, list) or not value or (action.nargs == 2 and len(value) != 2):
            raise ConfigError(f"{where} is {_short(value)}: write: {_kind(action)}")
        return [_single(where, action, each) for each in value]
    return _single(where, action, value)


def _single(where: str, action: argparse.Action, value: Any) -> Any:
    wanted: tuple[type, ...] = (str,)
    if action.nargs == 0:
        wanted = (bool,)
    elif action.type is int:
        wanted = (int,)
    elif action.type is float:
        wanted = (int, float)
    elif action.dest in ("columns", "time_column"):
        wanted = (int, str)
    if not any(type(value) is kind for kind in wanted):  # a bool is no int here
        raise ConfigError(f"{where} is {_short(value)}: write: {_kind(action)}")
    if action.choices is not None and value not in action.choices:
        raise ConfigError(f"{where} is {_short(value)}: write one of {', '.join(map(str, action.choices))}")
    if action.type is Path:
        return Path(value)
    return float(value) if action.type is float else value


def _unknown(path: Path, table: str, key: str) -> str:
    where = f"in [{table}]" if table else "before the first table"
    if key in _SECRETS:
        return f"{path}: {key} {where} is a secret and may not stand here: write {_SECRETS[key]}, the path of its file"
    elsewhere = [other for other, keys in KEYS.items() if key in keys]
    if elsewhere:
        return f"{path}: there is no key {key!r} {where}: it belongs " + (
            f"into [{elsewhere[0]}]" if elsewhere[0] else "before the first table"
        )
    return f"{path}: there is no key {key!r} {where}{_nearest(key, KEYS[table])}"


def _nearest(name: str, names: Iterable[str]) -> str:
    known = list(names)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": do you mean {near[0]!r}?" if near else f": there are {', '.join(known)}"


def _short(value: object) -> str:
    return repr(value)[:40]
