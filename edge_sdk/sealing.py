"""Encryption at rest: AES-256-GCM under one key that the device is given (NIST SP 800-38D).

Needs the ``cryptography`` package (``pip install 'psgl[secure]'``), which only this file imports, and only when a key
is in use. A key never appears in an error.
"""

from __future__ import annotations

import base64
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from edge_sdk.errors import ConfigError, StateError

__all__ = ["KEY_BYTES", "KEY_VARIABLE", "Sealer", "load_key"]

KEY_BYTES = 32
KEY_VARIABLE = "PSGL_STATE_KEY"

_NONCE_BYTES = 12  # 96 bits, what SP 800-38D 5.2.1.1 recommends
_TAG_BYTES = 16
_MAX_KEY_FILE_BYTES = 4096
_FORM = (
    f"a key is {KEY_BYTES} bytes as {2 * KEY_BYTES} hexadecimal digits or base64, for example of openssl rand -hex 32"
)


class Sealer:
    """Encrypts and authenticates bytes; thread-safe.

    Every nonce is 96 random bits, so that one key is good for 2^32 calls of ``seal`` (SP 800-38D 8.3): more than a
    century at one step a second.

    Args:
        key: 32 secret random bytes.

    Raises:
        ConfigError: the key has another length, or the ``cryptography`` package is missing.
    """

    OVERHEAD_BYTES = _NONCE_BYTES + _TAG_BYTES

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ConfigError(f"a key of {len(key)} bytes: {_FORM}")
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as exc:
            raise ConfigError(
                "encryption at rest needs the cryptography package: pip install 'psgl[secure]', or configure no key"
            ) from exc
        self._cipher = AESGCM(key)
        self._invalid = InvalidTag

    def seal(self, plain: bytes, about: bytes) -> bytes:
        """Encrypt.

        Args:
            plain: what to hide, below 2^31 bytes.
            about: what it belongs to; not hidden, but ``open`` wants the same again.

        Returns:
            nonce (12 bytes), ciphertext, tag (16 bytes): 28 bytes longer than ``plain``.
        """
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plain, about)

    def open(self, sealed: bytes, about: bytes) -> bytes:
        """Decrypt what ``seal`` returned.

        Raises:
            StateError: another key, another ``about``, or a changed byte; which of them cannot be told.
        """
        if len(sealed) < self.OVERHEAD_BYTES:
            raise StateError(f"{len(sealed)} bytes are no sealed data: start again from what was sealed")
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], memoryview(sealed)[_NONCE_BYTES:], about)
        except self._invalid as exc:
            raise StateError("sealed data does not open: give the key it was sealed with, or it is damaged") from exc


def load_key(file: Path | None, environment: Mapping[str, str]) -> bytes | None:
    """Find the key that the operator configured.

    Args:
        file: a file that holds nothing but the key and that only its owner can read; it goes before the environment.
        environment: where the variable ``PSGL_STATE_KEY`` may hold the key, for example ``os.environ``.

    Returns:
        32 bytes, or None where no key is configured.

    Raises:
        ConfigError: the file cannot be read, others may read it, or its content is no key.
    """
    if file is None:
        text = environment.get(KEY_VARIABLE)
        return None if text is None else _parse(text, f"the variable {KEY_VARIABLE}")
    try:
        with file.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            data = stream.read(_MAX_KEY_FILE_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"the key file {file} cannot be read: {exc.strerror or exc}") from exc
    if mode & 0o077:
        raise ConfigError(f"the key file {file} is open to other users: chmod 600 {file}")
    if len(data) > _MAX_KEY_FILE_BYTES:
        raise ConfigError(f"the key file {file} is too long: {_FORM}")
    return _parse(data.decode("ascii", "replace"), f"the key file {file}")


def _parse(text: str, source: str) -> bytes:
    text = text.strip()
    try:
        key = bytes.fromhex(text) if len(text) == 2 * KEY_BYTES else base64.b64decode(text, validate=True)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{source} holds no key: {_FORM}")
    return key
