"""Whatever the instant at which an install ends, the store has the bundle before or the bundle after."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk import bundle_store
from edge_sdk.bundle import MANIFEST, load_bundle, write_bundle
from edge_sdk.bundle_store import BundleStore
from edge_sdk.cli import main
from edge_sdk.codec import pack_tensors
from edge_sdk.errors import BundleError, StateError
from edge_sdk.signing import PublicKey, SigningKey, generate

CALLS = ("fsync", "replace", "rename", "mkdir", "symlink", "unlink", "open", "rmdir", "readlink")


@pytest.fixture(scope="module")
def bundles(built: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three bundles that differ in a learning rate alone."""
    made, folder = built["hardened"], tmp_path_factory.mktemp("made")
    with zipfile.ZipFile(made.path) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name != MANIFEST}
    for number in range(3):
        write_bundle(folder / f"{number}.psgl", replace(made.bundle.manifest, learning_rate=0.1 + number), files)
    return [folder / f"{number}.psgl" for number in range(3)]


@pytest.fixture(scope="module")
def ids(bundles: list[Path]) -> list[str]:
    return [load_bundle(path).id for path in bundles]


def test_install_and_roll_back(bundles: list[Path], ids: list[str], tmp_path: Path) -> None:
    store = BundleStore(tmp_path / "store")
    assert store.names() == (None, None)
    with pytest.raises(BundleError, match="no bundle before the current one"):
        store.rollback()
    for number, expected in ((0, (ids[0], None)), (1, (ids[1], ids[0])), (1, (ids[1], ids[0])), (2, (ids[2], ids[1]))):
        assert store.install(bundles[number]).id == ids[number]
        assert store.names() == expected and load_bundle(store.current).id == ids[number]
    store.rollback()
    assert store.names() == (ids[1], ids[2]) and load_bundle(store.current).id == ids[1]
    store.rollback()
    assert store.names() == (ids[2], ids[1])
    kept = {entry.name for entry in (tmp_path / "store").iterdir()}
    assert {name for name in kept if name.endswith(".psgl")} == {f"{ids[2]}.psgl", f"{ids[1]}.psgl"}
    assert len(kept) == 5, "two bundles, one set, the two links"


def test_what_must_not_be_installed_changes_nothing(
    bundles: list[Path], ids: list[str], built: dict[str, Any], tmp_path: Path
) -> None:
    store = BundleStore(tmp_path / "store")
    store.install(bundles[0])
    generate(tmp_path / "key.pem")
    with pytest.raises(BundleError, match="is not signed"):
        store.install(bundles[1], public_key=PublicKey(tmp_path / "key.pub.pem"))
    damaged = tmp_path / "damaged.psgl"
    damaged.write_bytes(bundles[1].read_bytes()[:-100])
    with pytest.raises(BundleError, match="not a whole bundle"):
        store.install(damaged)
    with pytest.raises(BundleError, match="there is no bundle"):
        store.install(tmp_path / "none.psgl")
    bundle = load_bundle(bundles[1])
    with zipfile.ZipFile(bundles[1]) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name != MANIFEST}
    off = {**bundle.initial, "p.code.weight": bundle.initial["p.code.weight"] + np.float32(0.1)}
    write_bundle(tmp_path / "off.psgl", bundle.manifest, {**files, "initial.cbor": pack_tensors(off)})
    with pytest.raises(BundleError, match=r"does not compute on this machine .*\(graph infer\)"):
        store.install(tmp_path / "off.psgl")
    assert store.names() == (ids[0], None) and load_bundle(store.current).id == ids[0]
    write_bundle(tmp_path / "signed.psgl", bundle.manifest, files, sign_key=SigningKey(tmp_path / "key.pem"))
    store.install(tmp_path / "signed.psgl", public_key=PublicKey(tmp_path / "key.pub.pem"))
    assert store.names() == (ids[1], ids[0])


class Fault(OSError):
    """A disk that refuses."""


def attempt(action: Callable[[], object], at: int, end: Callable[[], None]) -> bool:
    """Run with the call number ``at`` to the operating system failing before or after its work; whether it came so far.

    Calls count only inside the store's own file: that is what has to be whole at every point.
    """
    count = 0
    kept = {name: getattr(os, name) for name in CALLS}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                end()
            return kept[name](*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name))
    try:
        action()
    finally:
        for name in CALLS:
            setattr(os, name, kept[name])
    return count >= at


def fail() -> None:
    raise Fault(28, "No space left on device")


@pytest.mark.parametrize("action", ["install", "rollback"])
def test_a_disk_that_refuses_at_any_call_leaves_before_or_after(
    action: str, bundles: list[Path], ids: list[str], tmp_path: Path
) -> None:
    before = BundleStore(tmp_path / "before")
    before.install(bundles[0])
    before.install(bundles[1])
    after = (ids[2], ids[1]) if action == "install" else (ids[0], ids[1])
    outcomes = set()
    for at in range(1, 200):
        folder = tmp_path / f"{at}"
        shutil.copytree(tmp_path / "before", folder, symlinks=True)
        store = BundleStore(folder)
        try:
            reached = attempt(lambda s=store: s.install(bundles[2]) if action == "install" else s.rollback(), at, fail)
        except (StateError, BundleError):
            reached = True
        names = store.names()
        assert names in ((ids[1], ids[0]), after), f"call {at}"
        assert load_bundle(store.current).id == names[0] and load_bundle(folder / f"{names[1]}.psgl").id == names[1]
        outcomes.add(names)
        store.install(bundles[2])
        assert store.names()[0] == ids[2] and len(list(folder.iterdir())) == 5, f"the next install tidies, call {at}"
        if not reached:
            break
    assert outcomes == {(ids[1], ids[0]), after} and at > 8


def _killed(folder: Path, bundle: Path, at: int) -> None:
    attempt(lambda: BundleStore(folder).install(bundle), at, lambda: os._exit(9))
    os._exit(0)


def test_a_process_that_is_killed_at_any_call_leaves_before_or_after(
    bundles: list[Path], ids: list[str], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    outcomes = set()
    for at in range(1, 200):
        folder = tmp_path / f"{at}"
        if at % 2:
            BundleStore(folder).install(bundles[0])
        child = context.Process(target=_killed, args=(folder, bundles[1], at))
        child.start()
        child.join(60)
        store = BundleStore(folder)
        before = (ids[0], None) if at % 2 else (None, None)
        after = (ids[1], ids[0] if at % 2 else None)
        assert store.names() in (before, after), f"call {at}"
        outcomes.add(store.names() == after)
        store.install(bundles[1])
        assert store.names() == after and load_bundle(store.current).id == ids[1]
        if child.exitcode == 0 and at > 1:
            break
    assert outcomes == {True, False} and child.exitcode == 0


def test_one_install_at_a_time(bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BundleStore(tmp_path / "store")

    def verify_and_install(*arguments: Any, **options: Any) -> Any:
        with pytest.raises(StateError, match="another program changes the store"):
            BundleStore(tmp_path / "store").install(bundles[1])
        return real(*arguments, **options)

    real = bundle_store.verify
    monkeypatch.setattr(bundle_store, "verify", verify_and_install)
    store.install(bundles[0])


def test_a_folder_that_is_no_store(bundles: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be written"):
        BundleStore(tmp_path / "file").install(bundles[0])
    (tmp_path / "odd" / "state").mkdir(parents=True)
    (tmp_path / "odd" / "state" / "current").symlink_to("/etc/passwd")
    with pytest.raises(StateError, match="is no link of a store"):
        BundleStore(tmp_path / "odd").install(bundles[0])


def test_the_commands(bundles: list[Path], ids: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", str(tmp_path / "store")]
    for number in (0, 1):
        assert main(["install", str(bundles[number]), *store]) == 0
    assert main(["rollback", *store]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/store/current: bundle {ids[0]}"
    assert main(["verify", str(tmp_path / "store" / "current"), "--runs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bundle"] == ids[0]
    assert main(["rollback", "--store", str(tmp_path / "none")]) == 2
