"""Bundles that somebody made to harm: refused with one sentence, without memory, whatever the bytes."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tracemalloc
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_sdk import bundle as bundles
from edge_sdk.bundle import FORMAT_VERSION, Bundle, Manifest, load_bundle, write_bundle
from edge_sdk.codec import pack_tensors
from edge_sdk.errors import BundleError
from tests.fuzz.seeds import described

GRAPHS = ("train", "infer", "prepare", "backward")
MANIFEST = described(Manifest("paper", (1, 8, 8), ("a", "b"), (4, 2, 2), "sgd", 0.1, "sign", 0.2))
INITIAL = pack_tensors({"p.w": np.ones((2, 2), np.float32), "b.m": np.zeros(2, np.float32)})
PARITY = pack_tensors({"infer.activations": np.ones((2, 4, 2, 2), np.float32)})
FILES = {"initial.cbor": INITIAL, "parity.cbor": PARITY, **{f"{name}.onnx": name.encode() * 9 for name in GRAPHS}}

in_one_folder = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def archive(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as made:
        for name, data in files.items():
            made.writestr(zipfile.ZipInfo(name), data, method)
    return target.getvalue()


def document(contents: dict[str, bytes], **changes: Any) -> bytes:
    hashes = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in contents.items()}
    whole = {"format": "psgl-bundle", "version": FORMAT_VERSION, **asdict(MANIFEST), "files": hashes, **changes}
    return json.dumps(whole).encode()


def made(contents: dict[str, bytes] = FILES, method: int = zipfile.ZIP_DEFLATED, **changes: Any) -> bytes:
    return archive({"manifest.json": document(contents, **changes), **contents}, method)


def load(folder: Path, data: bytes) -> Bundle:
    path = folder / "net.psgl"
    path.write_bytes(data)
    return load_bundle(path)


def refusal(folder: Path, data: bytes) -> str:
    with pytest.raises(BundleError) as caught:
        load(folder, data)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 1000
    return text


def test_the_bundle_made_here_is_valid(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        assert load(tmp_path, made(method=method)).manifest == MANIFEST


@given(st.binary(max_size=300))
@in_one_folder
def test_any_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    assert refusal(tmp_path, data)


@given(st.data())
@settings(in_one_folder, max_examples=300)
def test_changed_bytes_are_refused_or_mean_the_same(tmp_path: Path, draw: st.DataObject) -> None:
    original = made()
    changed = bytearray(original)
    for _ in range(draw.draw(st.integers(1, 3))):
        start = draw.draw(st.integers(0, len(changed) - 1))
        end = draw.draw(st.integers(start, min(len(changed), start + 4)))
        changed[start:end] = draw.draw(st.binary(max_size=4))
    try:
        loaded = load(tmp_path, bytes(changed))
    except BundleError as exc:
        assert str(exc).isprintable()
    else:
        expected = load(tmp_path, original)
        assert (loaded.id, loaded.manifest, loaded.graphs) == (expected.id, expected.manifest, expected.graphs)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


@given(st.sampled_from([*asdict(MANIFEST), "files", "format", "version"]), JSON)
@settings(in_one_folder, max_examples=300)
def test_any_value_in_the_manifest_is_refused_or_kept(tmp_path: Path, name: str, value: Any) -> None:
    try:
        loaded = load(tmp_path, made(**{name: value}))
    except BundleError as exc:
        assert str(exc).isprintable() and len(str(exc)) < 1000
    else:
        kept = asdict(loaded.manifest).get(name, value)
        assert (list(kept) if isinstance(kept, tuple) else kept) == value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": "abc"}, "is not a list"),
        ({"classes": {"a": 1, "b": 2}}, "is not a list"),
        ({"server": [["a", 1]]}, "is not a map"),
        ({"versions": "x"}, "is not a map"),
        ({"learning_rate": 10**400}, "incomplete"),
        ({"learning_rate": 2**53 + 1}, "more digits than a float64"),
        ({"input_range": [0, 2**53 + 1]}, "more digits than a float64"),
        ({"profile": ["x" * 5000]}, "xxx): export"),
        ({"version": "x" * 5000}, "of version 'xxx"),
        ({"version": "1\n\x002"}, r"of version '1\n\x002'"),
    ],
)
def test_a_manifest_that_says_something_else(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, made(**changes))


@pytest.mark.parametrize("change", [{"bytes": 1}, {"more": 1}, {"sha256": "0" * 64}])
def test_a_file_that_is_not_as_the_manifest_says(tmp_path: Path, change: dict[str, Any]) -> None:
    hashes = json.loads(document(FILES))["files"]
    hashes["train.onnx"] |= change
    data = archive({"manifest.json": document(FILES, files=hashes), **FILES})
    assert "train.onnx was changed" in refusal(tmp_path, data)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_no_bundle_has_is_refused_before_it_takes_memory(tmp_path: Path, method: int) -> None:
    data = made(method=method)
    tracemalloc.start()
    try:
        assert "compressed in a way" in refusal(tmp_path, data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_files_that_are_too_large_together_are_refused_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = made({**FILES, **{f"x{number}.onnx": b"\0" * (1 << 20) for number in range(8)}})
    assert len(data) < 1 << 16
    assert load(tmp_path, data)
    monkeypatch.setattr(bundles, "_MAX_BUNDLE_BYTES", 4 << 20)
    tracemalloc.start()
    try:
        assert "bytes in all" in refusal(tmp_path, data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_could_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "_MAX_BUNDLE_BYTES", (1 << 20) + 100)
    with pytest.raises(BundleError, match="in all"):
        write_bundle(tmp_path / "net.psgl", MANIFEST, FILES)
    with pytest.raises(BundleError, match=r"the manifest is .* fewer layers"):
        monkeypatch.undo()
        write_bundle(tmp_path / "net.psgl", replace(MANIFEST, server={"x": "y" * (1 << 20)}), FILES)
    assert not list(tmp_path.iterdir())


def test_a_file_that_declares_less_than_it_holds(tmp_path: Path) -> None:
    bomb = made({**FILES, "train.onnx": b"\0" * (1 << 20)})
    lying = bomb.replace(struct.pack("<I", 1 << 20), struct.pack("<I", 100))
    tracemalloc.start()
    try:
        assert "not a whole bundle" in refusal(tmp_path, lying)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_list_of_files_without_end_is_not_read(tmp_path: Path) -> None:
    many = archive({f"x{number}": b"" for number in range(20_000)}, zipfile.ZIP_STORED)
    tracemalloc.start()
    try:
        assert "short list of files" in refusal(tmp_path, many)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_zip64_list_of_files_is_not_read(tmp_path: Path) -> None:
    plain = made()
    end = plain[-22:]
    size, offset = struct.unpack("<II", end[12:20])
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 6, 6, size, offset)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(plain) - 22, 1)
    assert "short list of files" in refusal(tmp_path, plain[:-22] + record + locator + end)


def test_a_file_that_begins_behind_the_end(tmp_path: Path) -> None:
    data = bytearray(made())
    struct.pack_into("<I", data, data.rfind(b"PK\1\2") + 42, len(data) - 10)
    assert "not a whole bundle" in refusal(tmp_path, bytes(data))


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    files = {"manifest.json": document(FILES), **FILES, "\u00e9\u00e9": b"x"}
    broken = archive(files).replace("\u00e9\u00e9".encode(), b"\xff\xfe\xfd\xfc")
    assert "not a whole bundle" in refusal(tmp_path, broken)
