"""A device's TOML file: every option of the command, checked, with the nearest name for a typing error."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.cli import run_parser
from edge_sdk.config import KEYS, load_config, reference
from edge_sdk.errors import ConfigError
from edge_sdk.logs import FIELDS
from edge_sdk.status import Condition

ROOT = Path(__file__).resolve().parents[2]
LINE_ONLY = {"help", "debug", "config", "fresh", "json"}
"""Options that make no sense in the file of a service."""


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    return run_parser()


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "device.toml"
    path.write_text(text)
    return path


def test_every_option_has_one_key_and_every_key_an_option(parser: argparse.ArgumentParser) -> None:
    options = {action.dest for action in parser._actions} - LINE_ONLY
    keys = [dest for table in KEYS.values() for dest in table.values()]
    assert sorted(keys) == sorted(options)


def test_the_documentation_is_made_of_the_options(parser: argparse.ArgumentParser) -> None:
    text = (ROOT / "docs" / "device.md").read_text()
    assert reference(parser) in text, "paste what edge_sdk.config.reference(run_parser()) gives into docs/device.md"


def test_the_example_of_a_gateway_is_read(parser: argparse.ArgumentParser) -> None:
    values = load_config(ROOT / "examples" / "gateway" / "device.toml", parser)
    assert values["mode"] == "infer" and values["columns"] == ["II"] and values["hz"] == 128.0
    assert values["ca"] == Path("/etc/psgl/ca.pem") and values["decisions"] == "/var/lib/psgl/decisions.jsonl"


def test_values_become_defaults_and_paths_are_relative_to_the_file(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    text = """
    bundle = "net.psgl"
    device = "d1"
    [broker]
    tls = true
    connect_timeout_s = 5
    [source]
    path = "ecg.csv"
    valid = [-5, 5.5]
    columns = [1, "II"]
    """
    values = load_config(written(tmp_path, text), parser)
    assert values == {
        "bundle": tmp_path / "net.psgl",
        "device": "d1",
        "tls": True,
        "connect_timeout_s": 5.0,
        "source": str(tmp_path / "ecg.csv"),
        "valid": [-5.0, 5.5],
        "columns": [1, "II"],
    }
    parser.set_defaults(**values)
    given = parser.parse_args(["other.psgl", "--connect-timeout-s", "9"])
    assert (given.bundle, given.connect_timeout_s, given.device) == (Path("other.psgl"), 9.0, "d1")
    python = load_config(written(tmp_path, '[source]\nkind = "python"\npath = "driver:read"'), parser)
    assert python["source"] == "driver:read"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bundel = 'x'", "no key 'bundel' before the first table: do you mean 'bundle'"),
        ("[brokr]\nhost = 'x'", "no table [brokr]: do you mean 'broker'"),
        ("[broker]\nhots = 'x'", "no key 'hots' in [broker]: do you mean 'host'"),
        ("[broker]\nzzz = 1", "no key 'zzz' in [broker]: there are host, port"),
        ("host = 'x'", "'host' before the first table: it belongs into [broker]"),
        ("[broker]\nfleet = 'x'", "'fleet' in [broker]: it belongs before the first table"),
        ("[broker]\npassword = 'hunter2'", "is a secret and may not stand here: write password_file"),
        ("[broker]\nport = '1883'", "port in [broker] is '1883': write: integer"),
        ("[broker]\nport = true", "port in [broker] is True"),
        ("[broker]\ntls = 1", "tls in [broker] is 1: write: true or false"),
        ("mode = 'dance'", "mode is 'dance': write one of train, infer, train-then-infer"),
        ("[source]\nvalid = [1]", "valid in [source] is [1]: write: list of numbers"),
        ("[source]\ncolumns = 'II'", "write: list of texts"),
        ("[source]\ncolumns = [1.5]", "columns in [source] is 1.5"),
        ("broker = 'x'", "no key 'broker' before the first table"),
        ("a = ", "is no TOML"),
        ("[broker", "is no TOML"),
    ],
)
def test_a_wrong_file_is_one_line_with_the_remedy(
    text: str, words: str, parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_config(written(tmp_path, text), parser)
    assert "device.toml" in str(caught.value) and "hunter2" not in str(caught.value)


def test_files_that_are_none(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.toml", parser)
    huge: Any = tmp_path / "huge.toml"
    huge.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="no device's configuration"):
        load_config(huge, parser)
    huge.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no TOML"):
        load_config(huge, parser)


def test_the_documentation_has_every_state_and_every_field_of_the_log() -> None:
    text = (ROOT / "docs" / "device.md").read_text()
    for condition in Condition:
        assert f"| `{condition.value}` | {condition.sentence} |" in text
    assert ", ".join(f"`{name}`" for name in FIELDS) in text
