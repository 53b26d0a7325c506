"""The commands as an operator types them, over a real broker: they work together, and every bad day is one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk import topics
from edge_sdk.batch import Samples
from edge_sdk.paho_transport import PahoTransport
from edge_sdk.transport import Connection
from edge_sdk.wire import Message, encode
from server_sdk.assembly import back_path
from server_sdk.broker import EmbeddedBroker, find_mosquitto

Draw = Callable[[int, int], Samples]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as embedded:
        yield embedded


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run here, so that what they keep by default is a test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def data(tmp_path: Path, samples: Draw) -> Path:
    train, test = samples(48, 1), samples(12, 2)
    np.savez(tmp_path / "data.npz", x_train=train.x, y_train=train.y, x_test=test.x, y_test=test.y)
    return tmp_path / "data.npz"


def start(module: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(module: str, *arguments: object, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    process = start(module, *arguments)
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error of a command that could not go on."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def test_server_and_device_train_together_while_hostile_bytes_arrive(
    broker: EmbeddedBroker, built: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    where = ("--port", broker.port, "--fleet", "ward")
    bundle = built["paper"].path
    server = start(
        *("server_sdk.cli", "train", bundle, "--rounds", 10, "--batch", 8, "--evaluate-every", 5),
        *("--out", tmp_path / "server", "--json", *where),
    )
    assert server.stdout is not None
    assert [json.loads(server.stdout.readline())["event"] for _ in range(2)] == ["checkpoint", "waiting"]
    foe = PahoTransport(Connection("127.0.0.1", broker.port), "foe")
    foe.open()
    for payload in (b"", b"\xff" * 100, b"\x9f" * 2000, b"\xd8\x23\x66(a+)+$"):
        for topic in (
            topics.up_step("ward", "ward-1"),
            topics.up_state("ward", "x"),
            topics.down_step("ward", "ward-1"),
        ):
            foe.publish(topic, payload)
    foe.close()
    device = run(
        *("edge_sdk.cli", "run", bundle, "--data", data, "--device", "ward-1", *where),
        *("--report", tmp_path / "report.json", "--save-front", tmp_path / "front.cbor"),
    )
    assert device.returncode == 0, device.stderr
    assert "round 10" in device.stdout
    out, err = server.communicate(timeout=30)
    assert server.returncode == 0, err
    end = json.loads(out.splitlines()[-1])
    assert end["event"] == "end" and end["rounds"] == 10 and sum(end["rejected"].values()) >= 8
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["torch_loaded"] is False and report["steps"] == 10
    assert (tmp_path / "server" / "server.safetensors").exists() and (tmp_path / "front.cbor").exists()


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
@pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("mosquitto_passwd")), reason="openssl or mosquitto_passwd is missing"
)
def test_tls_certificates_users_and_passwords_of_both_sides(
    built: dict[str, Any], data: Path, tmp_path: Path, authority: Path
) -> None:
    users = authority / "users"
    users.touch()
    for user in ("trainer", "ward-1"):
        subprocess.run(["mosquitto_passwd", "-b", str(users), user, f"secret-{user}"], check=True, capture_output=True)
        (tmp_path / user).write_text(f"secret-{user}\n")
    users.chmod(0o644)
    with EmbeddedBroker() as spare:
        port = spare.port
    secured = (
        *(f"listener {port} 127.0.0.1", "allow_anonymous false"),
        *(f"password_file {users}", f"cafile {authority}/ca.pem", "require_certificate true"),
        *(f"certfile {authority}/broker.pem", f"keyfile {authority}/broker.key"),
    )
    certificates = ("--ca", authority / "ca.pem", "--cert", authority / "client.pem", "--key", authority / "client.key")

    def login(user: str, password_of: str) -> tuple[object, ...]:
        return ("--port", port, *certificates, "--user", user, "--password-file", tmp_path / password_of)

    bundle = built["vanilla"].path
    device = ("edge_sdk.cli", "run", bundle, "--data", data, "--device", "ward-1")
    with EmbeddedBroker("mosquitto", options=secured):
        assert "correct user and password" in one_line(run(*device, *login("ward-1", "trainer")))
        train = ("--rounds", 3, "--batch", 8, "--out", tmp_path / "out", "--json")
        server = start("server_sdk.cli", "train", bundle, *train, *login("trainer", "trainer"))
        trained = run(*device, *login("ward-1", "ward-1"))
        _, err = server.communicate(timeout=30)
    assert trained.returncode == 0, trained.stderr
    assert server.returncode == 0, err


def test_a_device_with_another_shape_or_bundle(
    broker: EmbeddedBroker, built: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    wide = np.zeros((6, 12, 12), np.uint8)
    np.savez(tmp_path / "wide.npz", x_train=wide, y_train=np.arange(6) % 2, x_test=wide, y_test=np.arange(6) % 2)
    device = ("edge_sdk.cli", "run", built["paper"].path, "--port", broker.port, "--fleet", "other", "--device", "d")
    assert "has samples of shape (1, 12, 12)" in one_line(run(*device, "--data", tmp_path / "wide.npz"))
    told = PahoTransport(Connection("127.0.0.1", broker.port), "announcer")
    told.open()
    fields = {"bundle": built["vanilla"].bundle.id, "status": "training", "rounds": 1, "evaluate_every": 0, "batch": 1}
    told.publish(topics.down_model("other"), encode(Message("model", "r", "", 0, fields, {}))[0], retain=True)
    assert "copy the server's bundle" in one_line(run(*device, "--data", data))
    told.close()


def test_bundles_that_must_not_be_used(built: dict[str, Any], data: Path, tmp_path: Path) -> None:
    whole = built["paper"].path.read_bytes()
    cut = tmp_path / "cut.psgl"
    cut.write_bytes(whole[: len(whole) // 2])
    old = tmp_path / "old.psgl"
    with zipfile.ZipFile(built["paper"].path) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            text = source.read(name)
            target.writestr(name, text.replace(b'"version": 2', b'"version": 9') if name == "manifest.json" else text)
    for bundle, words in ((cut, "not a whole bundle"), (old, "version 9"), (tmp_path / "none", "psgl-export build")):
        device = run("edge_sdk.cli", "run", bundle, "--data", data, "--device", "d")
        server = run("server_sdk.cli", "train", bundle)
        assert words in one_line(device) and words in one_line(server)
    lone = shutil.copy(built["paper"].path, tmp_path / "lone.psgl")
    assert "back's weights" in one_line(run("server_sdk.cli", "train", lone))
    shutil.copy(built["vanilla"].path, tmp_path / "mixed.psgl")
    shutil.copy(back_path(built["paper"].path), tmp_path / "mixed.back.safetensors")
    assert "another bundle" in one_line(run("server_sdk.cli", "train", tmp_path / "mixed.psgl"))


def test_a_broker_that_stays_dead(built: dict[str, Any], data: Path) -> None:
    with EmbeddedBroker() as gone:
        port = gone.port
    dead = ("--port", port, "--connect-timeout-s", 1)
    for command in (
        ("edge_sdk.cli", "run", built["vanilla"].path, "--data", data, "--device", "d", *dead),
        ("server_sdk.cli", "train", built["vanilla"].path, *dead),
    ):
        assert f"127.0.0.1:{port}" in one_line(run(*command))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("edge_sdk.cli", "run", "{b}", "--data", "{d}", "--device", "a/b"), "cannot name"),
        (("edge_sdk.cli", "run", "{b}", "--data", "{d}", "--device", "all"), "reserved"),
        (("edge_sdk.cli", "run", "{b}", "--data", "{d}", "--device", "d", "--chunk-bytes", "3"), "--chunk-bytes"),
        (("server_sdk.cli", "train", "{b}", "--rounds", "0"), "--rounds"),
        (("server_sdk.cli", "train", "{b}", "--batch", "100000"), "--batch"),
        (("export.cli", "build", "--data", "{d}", "-o", "x", "--epsilon", "2"), "--epsilon"),
        (("export.cli", "build", "--data", "{d}", "-o", "x", "--input-range", "5", "-5"), "lower one first"),
        (("export.cli", "build", "--data", "none.npz", "-o", "x"), "no data file"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], words: str, built: dict[str, Any], data: Path) -> None:
    filled = [text.format(b=built["vanilla"].path, d=data) for text in arguments]
    assert words in one_line(run(*filled))


@pytest.mark.parametrize(
    "command",
    [("edge_sdk.cli", "run"), ("server_sdk.cli", "train"), ("export.cli", "build"), ("examples.quickstart",)]
    + [("edge_sdk.cli", name) for name in ("check", "verify", "install", "rollback")]
    + [("export.cli", name) for name in ("report", "keygen", "sweep")],
)
def test_help_shows_examples(command: tuple[str, ...]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0 and "examples:" in done.stdout
