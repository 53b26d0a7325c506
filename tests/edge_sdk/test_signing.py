"""A bundle that is signed is used only with its signature, its key and its bytes."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.bundle import MANIFEST, SIGNATURE, load_bundle, write_bundle
from edge_sdk.cli import main
from edge_sdk.errors import BundleError, ConfigError
from edge_sdk.signing import PUBLIC_KEY_VARIABLE, PublicKey, SigningKey, generate, public_key_from
from export.cli import main as export


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("key", "other"):
        assert export(["keygen", "-o", str(folder / f"{name}.pem")]) == 0
    return folder


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def signed(built: dict[str, Any], keys: Path, tmp_path: Path) -> Path:
    made = built["hardened"]
    files = {name: data for name, data in contents(made.path).items() if name != MANIFEST}
    path = tmp_path / "signed.psgl"
    assert write_bundle(path, made.bundle.manifest, files, sign_key=SigningKey(keys / "key.pem")) == made.bundle.id
    return path


def test_a_signed_bundle_is_used_with_its_key(signed: Path, keys: Path, built: dict[str, Any]) -> None:
    assert load_bundle(signed, public_key=PublicKey(keys / "key.pub.pem")).id == built["hardened"].bundle.id
    assert load_bundle(signed).id == built["hardened"].bundle.id, "without a key nobody asks for a signature"
    again = signed.with_name("again.psgl")
    files = {name: data for name, data in contents(signed).items() if name not in (MANIFEST, SIGNATURE)}
    write_bundle(again, built["hardened"].bundle.manifest, files, sign_key=SigningKey(keys / "key.pem"))
    assert again.read_bytes() == signed.read_bytes(), "equal keys and bundles give equal bytes"


def test_openssl_agrees(signed: Path, keys: Path, tmp_path: Path) -> None:
    for name in (MANIFEST, SIGNATURE):
        (tmp_path / name).write_bytes(contents(signed)[name])
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-rawin", "-inkey", str(keys / "key.pub.pem")]
    command += ["-in", str(tmp_path / MANIFEST), "-sigfile", str(tmp_path / SIGNATURE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_what_must_not_be_used(signed: Path, keys: Path, built: dict[str, Any], tmp_path: Path) -> None:
    key = PublicKey(keys / "key.pub.pem")
    files = contents(signed)
    with pytest.raises(BundleError, match=r"is not signed, and .*key\.pub\.pem says that it must be: .*--sign-key"):
        load_bundle(built["hardened"].path, public_key=key)
    with pytest.raises(
        BundleError, match=r"not signed with the key of .*other\.pub\.pem, or was changed since: do not"
    ):
        load_bundle(signed, public_key=PublicKey(keys / "other.pub.pem"))
    edited = json.loads(files[MANIFEST])
    edited["learning_rate"] = 0.5
    for name, change in (
        ("manifest", {MANIFEST: json.dumps(edited).encode()}),
        ("space", {MANIFEST: files[MANIFEST] + b" "}),
        ("bit", {SIGNATURE: bytes([files[SIGNATURE][0] ^ 1]) + files[SIGNATURE][1:]}),
        ("short", {SIGNATURE: files[SIGNATURE][:63]}),
        ("empty", {SIGNATURE: b""}),
        ("no json", {MANIFEST: b"{"}),
    ):
        with pytest.raises(BundleError, match="not signed with the key"):
            load_bundle(zipped(tmp_path / name, {**files, **change}), public_key=key)
    with pytest.raises(BundleError, match=r"infer\.onnx was changed after export"):
        load_bundle(zipped(tmp_path / "graph", {**files, "infer.onnx": files["infer.onnx"] + b"?"}), public_key=key)
    with pytest.raises(BundleError, match="declares 65 bytes, the limit is 64"):
        load_bundle(zipped(tmp_path / "long", {**files, SIGNATURE: bytes(65)}))


def test_a_key_pair_is_made_for_its_owner_alone_and_never_replaced(tmp_path: Path) -> None:
    public = generate(tmp_path / "deep" / "key.pem")
    assert public == tmp_path / "deep" / "key.pub.pem"
    assert (tmp_path / "deep" / "key.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="never replaced"):
        generate(tmp_path / "deep" / "key.pem")


def test_files_that_are_no_keys(keys: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no public key"):
        PublicKey(keys / "key.pem")
    with pytest.raises(ConfigError, match="holds no private key"):
        SigningKey(_private(tmp_path / "public", (keys / "key.pub.pem").read_bytes()))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        PublicKey(tmp_path / "none")
    (tmp_path / "open.pem").write_bytes((keys / "key.pem").read_bytes())
    (tmp_path / "open.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="open to other users: chmod 600"):
        SigningKey(tmp_path / "open.pem")
    subprocess.run(["openssl", "genpkey", "-algorithm", "x25519", "-out", "x.pem"], cwd=tmp_path, check=True)
    with pytest.raises(ConfigError, match="not Ed25519"):
        SigningKey(_private(tmp_path / "y.pem", (tmp_path / "x.pem").read_bytes()))


def _private(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def test_where_the_key_comes_from(keys: Path) -> None:
    public = str(keys / "key.pub.pem")
    assert public_key_from(None, {}) is None
    for found in (public_key_from(None, {PUBLIC_KEY_VARIABLE: public}), public_key_from(Path(public), {})):
        assert found is not None and str(found.file) == public
    with pytest.raises(ConfigError, match="is empty"):
        public_key_from(None, {PUBLIC_KEY_VARIABLE: ""})


def test_a_key_without_the_package_is_refused(signed: Path, keys: Path) -> None:
    code = "import sys; sys.modules['cryptography'] = None\nfrom edge_sdk.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "verify", str(signed), "--runs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, "without a key nobody needs the package"
    done = subprocess.run(
        [*command, "--public-key", str(keys / "key.pub.pem")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "pip install 'psgl[secure]'" in done.stderr


def test_the_commands(
    signed: Path, keys: Path, built: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    public = ["--public-key", str(keys / "key.pub.pem")]
    assert main(["verify", str(signed), "--runs", "2", "--json", *public]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and found["checks"][0]["graph"] == "infer" and found["runs"] == 2
    assert main(["verify", str(signed), "--runs", "2"]) == 0
    assert "tolerance 0.002" in capsys.readouterr().out
    plain = str(built["hardened"].path)
    assert main(["verify", plain, *public]) == 2 and "is not signed" in capsys.readouterr().err
    run = ["run", plain, "--data", "none.npz", "--device", "d"]
    assert main([*run, *public]) == 2 and "is not signed" in capsys.readouterr().err
    monkeypatch.setenv(PUBLIC_KEY_VARIABLE, public[1])
    assert main(run) == 2 and "is not signed" in capsys.readouterr().err
    assert main(["verify", plain, "--runs", "0"]) == 2
