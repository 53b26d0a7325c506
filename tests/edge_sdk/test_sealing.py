"""Encryption at rest: what is sealed opens only whole, under its key, for what it belongs to."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import pytest

from edge_sdk.errors import ConfigError, StateError
from edge_sdk.sealing import KEY_BYTES, KEY_VARIABLE, Sealer, load_key

KEY = bytes(range(KEY_BYTES))


def key_file(folder: Path, content: str, mode: int = 0o600) -> Path:
    path = folder / "state.key"
    path.write_text(content)
    path.chmod(mode)
    return path


def test_what_is_sealed_opens() -> None:
    sealer = Sealer(KEY)
    for plain in (b"", b"x", bytes(100_000)):
        sealed = sealer.seal(plain, b"session|1")
        assert len(sealed) == len(plain) + Sealer.OVERHEAD_BYTES
        assert Sealer(KEY).open(sealed, b"session|1") == plain


def test_the_cipher_is_aes_256_gcm() -> None:
    """Test case 14 of McGrew and Viega, The Galois/Counter Mode of Operation, 2005."""
    sealed = bytes(12) + bytes.fromhex("cea7403d4d606b6e074ec5d3baf39d18" + "d0d1c8a799996bf0265b98b5d48ab919")
    assert Sealer(bytes(32)).open(sealed, b"") == bytes(16)


def test_the_same_is_never_sealed_alike() -> None:
    sealer = Sealer(KEY)
    sealed = {sealer.seal(b"batch", b"") for _ in range(200)}
    assert len({each[:12] for each in sealed}) == len({each[12:] for each in sealed}) == 200


def test_every_changed_byte_is_found() -> None:
    sealer = Sealer(KEY)
    sealed = sealer.seal(b"a batch of a patient", b"1")
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 1
        with pytest.raises(StateError, match="does not open"):
            sealer.open(bytes(changed), b"1")
    for end in range(len(sealed)):
        with pytest.raises(StateError):
            sealer.open(sealed[:end], b"1")


def test_another_key_and_another_step_do_not_open() -> None:
    sealed = Sealer(KEY).seal(b"batch", b"session|1")
    with pytest.raises(StateError, match="does not open"):
        Sealer(KEY).open(sealed, b"session|2")
    with pytest.raises(StateError, match="does not open"):
        Sealer(KEY[::-1]).open(sealed, b"session|1")


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33])
def test_other_lengths_are_no_key(length: int) -> None:
    with pytest.raises(ConfigError, match="32 bytes"):
        Sealer(bytes(length))


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r"pip install 'psgl\[secure\]'"):
        Sealer(KEY)


@pytest.mark.parametrize("text", [KEY.hex(), KEY.hex().upper(), base64.b64encode(KEY).decode()])
def test_a_key_comes_from_a_file_or_the_environment(tmp_path: Path, text: str) -> None:
    file = key_file(tmp_path, f"{text}\n")
    assert load_key(file, {}) == KEY
    assert load_key(None, {KEY_VARIABLE: f" {text}\n"}) == KEY
    assert load_key(file, {KEY_VARIABLE: "00" * 32}) == KEY, "the file goes first"


def test_no_key_is_no_error() -> None:
    assert load_key(None, {"PATH": "/bin"}) is None


@pytest.mark.parametrize("text", ["", "secret", "0" * 63, "g" * 64, "00" * 31, "00" * 33, "A" * 44, "A" * 43, "é" * 64])
def test_what_is_no_key_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    for file, environment in ((key_file(tmp_path, text), {}), (None, {KEY_VARIABLE: text})):
        with pytest.raises(ConfigError, match=r"holds no key.*openssl rand") as raised:
            load_key(file, environment)
        assert not text or text not in str(raised.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        load_key(key_file(tmp_path, KEY.hex(), mode), {})


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_key(tmp_path / "missing", {})
    with pytest.raises(ConfigError, match="cannot be read"):
        load_key(tmp_path, {})


def test_a_long_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long"):
        load_key(key_file(tmp_path, KEY.hex() + " " * 5000), {})
