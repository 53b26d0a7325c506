"""Who made a bundle: Ed25519 (RFC 8032) over the bytes of its manifest, which names the hash of everything else.

Needs the ``cryptography`` package (``pip install 'psgl[secure]'``), which is imported only when a key is in use. Keys
are PEM files, private ones PKCS #8 and public ones SubjectPublicKeyInfo, as openssl's genpkey writes them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_sdk.errors import BundleError, ConfigError

__all__ = ["PUBLIC_KEY_VARIABLE", "SIGNATURE_BYTES", "PublicKey", "SigningKey", "generate", "public_key_from"]

SIGNATURE_BYTES = 64
PUBLIC_KEY_VARIABLE = "PSGL_PUBLIC_KEY"

_MAX_PEM_BYTES = 4096
_MAKE = "psgl-export keygen -o key.pem makes a pair"


class PublicKey:
    """Checks signatures.

    Args:
        file: PEM.

    Raises:
        ConfigError: the file cannot be read or holds no public Ed25519 key, or ``cryptography`` is missing.
    """

    def __init__(self, file: str | Path) -> None:
        serialization, ed25519 = _library()
        data = _read(Path(file), "public key")
        try:
            key = serialization.load_pem_public_key(data)
        except Exception as exc:  # cryptography raises types of many kinds on bytes that are no key
            raise ConfigError(f"{file} holds no public key (PEM): {_MAKE}, key.pub.pem is the public one") from exc
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise ConfigError(f"{file} holds a key that is not Ed25519: {_MAKE}")
        self._key = key
        self.file = Path(file)

    def check(self, manifest: bytes, signature: bytes | None, source: object) -> None:
        """Check the signature of a manifest.

        Args:
            manifest: the exact bytes.
            signature: 64 bytes, or None of a bundle without one.
            source: what errors call the bundle.

        Raises:
            BundleError: there is none, or it is not of this key and these bytes.
        """
        if signature is None:
            raise BundleError(
                f"{source} is not signed, and {self.file} says that it must be: "
                "export it with psgl-export build --sign-key"
            )
        try:
            self._key.verify(signature, manifest)
        except Exception as exc:  # InvalidSignature, whatever the reason
            raise BundleError(
                f"{source} was not signed with the key of {self.file}, or was changed since: do not use it; get it "
                "again from who signs, or give their public key"
            ) from exc


class SigningKey:
    """Signs manifests.

    Args:
        file: PEM, readable by its owner alone.

    Raises:
        ConfigError: the file cannot be read, is open to other users or holds no private Ed25519 key, or
            ``cryptography`` is missing.
    """

    def __init__(self, file: str | Path) -> None:
        serialization, ed25519 = _library()
        data = _read(Path(file), "signing key", private=True)
        try:
            key = serialization.load_pem_private_key(data, password=None)
        except Exception as exc:  # as above; the text of the reason could quote the key
            raise ConfigError(f"{file} holds no private key (PEM, without a password): {_MAKE}") from exc
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise ConfigError(f"{file} holds a key that is not Ed25519: {_MAKE}")
        self._key = key

    def sign(self, manifest: bytes) -> bytes:
        """64 bytes; the same bytes have the same signature (RFC 8032, 5.1.6)."""
        signature: bytes = self._key.sign(manifest)
        return signature


def generate(file: Path) -> Path:
    """Make a key pair.

    Args:
        file: where the private key goes, readable by its owner alone; a file that stands there is never replaced.

    Returns:
        The public key's file beside it: ``key.pem`` has ``key.pub.pem``.

    Raises:
        ConfigError: a file stands there or cannot be written, or ``cryptography`` is missing.
    """
    serialization, ed25519 = _library()
    key = ed25519.Ed25519PrivateKey.generate()
    beside = file.with_name(f"{file.stem}.pub{file.suffix or '.pem'}")
    plain = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public = key.public_key().public_bytes(serialization.Encoding.PEM, form)
    for path, data, mode in ((file, private, 0o600), (beside, public, 0o644)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
        except FileExistsError as exc:
            raise ConfigError(f"{path} stands there already, and a key is never replaced: name another file") from exc
        except OSError as exc:
            raise ConfigError(f"{path} cannot be written: {exc.strerror or exc}") from exc
    return beside


def public_key_from(file: Path | None, environment: Mapping[str, str]) -> PublicKey | None:
    """The public key that the operator configured.

    Args:
        file: of an option; it goes before the environment.
        environment: where the variable ``PSGL_PUBLIC_KEY`` may name the file, for example ``os.environ``.

    Returns:
        None where none is configured: signatures are not looked at then.

    Raises:
        ConfigError: as `PublicKey`.
    """
    if file is None:
        named = environment.get(PUBLIC_KEY_VARIABLE)
        if named is None:
            return None
        if not named:
            raise ConfigError(f"the variable {PUBLIC_KEY_VARIABLE} is empty: name a file, or unset it")
        file = Path(named)
    return PublicKey(file)


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as exc:
        raise ConfigError(
            "signed bundles need the cryptography package: pip install 'psgl[secure]', or configure no key"
        ) from exc
    return serialization, ed25519


def _read(file: Path, what: str, *, private: bool = False) -> bytes:
    try:
        with file.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            data = stream.read(_MAX_PEM_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"the {what} {file} cannot be read: {exc.strerror or exc}") from exc
    if private and mode & 0o077:
        raise ConfigError(f"the {what} {file} is open to other users: chmod 600 {file}")
    if len(data) > _MAX_PEM_BYTES:
        raise ConfigError(f"the {what} {file} is too long: {_MAKE}")
    return data
