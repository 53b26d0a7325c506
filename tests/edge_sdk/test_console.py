"""Options of a broker, and every way out of a command: one line, an exit code, no traceback."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from edge_sdk.console import add_broker_options, connection_from, new_parser, require, run
from edge_sdk.errors import BatchError, ConfigError


def connection(*arguments: str) -> object:
    parser = new_parser("x", "y", "z")
    add_broker_options(parser)
    return connection_from(parser.parse_args(arguments))


def test_user_password_and_tls_reach_the_connection(tmp_path: Path) -> None:
    for name in ("pw", "ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).write_text("secret\nrest")
    files = [
        f"--{option}={tmp_path / name}" for option, name in (("ca", "ca.pem"), ("cert", "cert.pem"), ("key", "key.pem"))
    ]
    made = connection("--host", "h", "--user", "u", f"--password-file={tmp_path / 'pw'}", *files)
    assert (made.host, made.port, made.user, made.password) == ("h", 8883, "u", "secret")  # type: ignore[attr-defined]
    assert str(made.ca_file) == str(tmp_path / "ca.pem") and str(made.key_file).endswith("key.pem")  # type: ignore[attr-defined]
    assert "secret" not in repr(made)


def test_the_password_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSGL_PASSWORD", "p")
    assert connection("--user", "u").password == "p"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="--user"):
        connection()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--ca", "/no/such"], "no file"), (["--password-file", "/no/such", "--user", "u"], "no file")],
)
def test_missing_files_are_named(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        connection(*arguments)


def test_a_certificate_needs_its_key(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("")
    with pytest.raises(ConfigError, match="both"):
        connection("--cert", str(tmp_path / "cert.pem"))


def raising(error: BaseException) -> int:
    raise error


def test_errors_become_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: raising(BatchError("do this")), debug=False) == 2
    assert capsys.readouterr().err == "error: do this\n"
    assert run(lambda: raising(KeyError("inner\nworkings")), debug=False) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "--debug" in told
    with pytest.raises(KeyError):
        run(lambda: raising(KeyError("x")), debug=True)
    with pytest.raises(BatchError):
        run(lambda: raising(BatchError("x")), debug=True)


def test_sigterm_ends_a_command_as_ctrl_c_does(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    closed = []

    def command() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            return 0
        finally:
            closed.append(True)

    try:
        assert run(command, debug=False) == 130
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert closed and capsys.readouterr().err == "stopped\n"


def test_a_missing_extra_is_named() -> None:
    require("server", "json")
    with pytest.raises(ConfigError, match=r"psgl\[server\]"):
        require("server", "no_such_module_anywhere")
