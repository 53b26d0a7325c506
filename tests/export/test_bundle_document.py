"""docs/bundle.md and the code say the same, and a bundle can be read by that page alone."""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import onnx
import onnx.reference
import pytest

from edge_sdk import bundle, interface, manifest, signing, vectors, verification
from edge_sdk.interface import Cost, Interface, TensorType
from edge_sdk.manifest import Manifest

DOCUMENT = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text()


def section(number: int) -> str:
    return re.split(r"^## \d+ .*$", DOCUMENT, flags=re.MULTILINE)[number]


def first_columns(text: str) -> list[list[str]]:
    """The names in the first column of each table."""
    tables: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
        elif set(line) <= set("|-"):
            tables.append([])
            inside = True
        elif inside:
            tables[-1] += re.findall(r"`([^`]+)`", line.split("|")[1])
    return tables


def number(text: int) -> str:
    return f"{text:,}"


def test_the_fields_are_those_of_the_code() -> None:
    whole, tensor, cost = first_columns(section(3))
    assert sorted(whole) == sorted([*(one.name for one in fields(Manifest)), "format", "version", "files"])
    assert tensor == [one.name for one in fields(TensorType)] and cost == [one.name for one in fields(Cost)]
    assert all(f"`{one.name}`" in section(3) for one in fields(Interface))


def test_the_entries_and_graphs_are_those_of_the_code() -> None:
    (entries,) = first_columns(section(2))
    graphs = vectors.ORDER
    assert {*Manifest("p", (1, 8, 8), ("a", "b"), (4,), "sgd", 0.1).graphs, "guide"} == {*graphs}
    assert set(entries) == {
        *(f"{graph}.onnx" for graph in graphs),
        *(bundle.MANIFEST, bundle.INITIAL, bundle.PARITY, bundle.SIGNATURE),
    }
    assert set(first_columns(section(4))[0]) == set(graphs)
    assert ", ".join(f"`{graph}`" for graph in vectors.ORDER) in section(6)


def test_the_limits_are_those_of_the_code() -> None:
    for limit in ("_MAX_MANIFEST_BYTES", "_MAX_FILE_BYTES", "_MAX_BUNDLE_BYTES", "_MAX_DIRECTORY_BYTES"):
        assert number(getattr(bundle, limit)) in section(2), limit
    assert f"At most {bundle._MAX_FILES} entries" in section(2)
    assert f"the first {bundle.ID_DIGITS} hexadecimal digits" in section(7)
    assert f"{signing.SIGNATURE_BYTES} bytes" in section(8) and signing.PUBLIC_KEY_VARIABLE in section(8)
    assert f"more than {vectors.MOST_VALUES} elements" in section(6) and str(verification.TOLERANCE) in section(6)
    assert f"`opset` ({interface.OPSETS.start} to {interface.OPSETS.stop - 1};" in section(3)
    assert set(re.findall(r"`(\w+)`", re.search(r"\| `dtype` .*", section(3))[0])) - {"dtype"} == set(interface.DTYPES)  # type: ignore[index]
    assert f"# The bundle, format version {manifest.FORMAT_VERSION}" in DOCUMENT


def tensor_of(value: Any) -> np.ndarray:
    """RFC 8746 as sections 5 and 6 describe it."""
    dims, inner = value.value
    kinds = {85: "<f4", 79: "<i8"}
    return np.frombuffer(inner.value, kinds[inner.tag]).reshape(dims)


@pytest.mark.parametrize("profile", ["hardened", "paper"])
def test_a_bundle_is_read_by_the_page_alone(profile: str, built: dict[str, Any]) -> None:
    """zipfile, json, hashlib, cbor2 and onnx's own interpreter; nothing of this SDK and no onnxruntime."""
    data = built[profile].path.read_bytes()
    assert data[-22:-18] == b"PK\5\6" and struct.unpack("<H", data[-2:]) == (0,), "no comment"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert list(files)[1:] == sorted(list(files)[1:])
    text = files.pop("manifest.json")
    said = json.loads(text)
    assert said["format"] == "psgl-bundle" and said["version"] == 2
    assert hashlib.sha256(text).hexdigest()[:32] == built[profile].bundle.id
    found = {name: {"bytes": len(one), "sha256": hashlib.sha256(one).hexdigest()} for name, one in files.items()}
    assert found == said["files"]
    initial = {name: tensor_of(value) for name, value in cbor2.loads(files["initial.cbor"]).items()}
    parity = {name: tensor_of(value) for name, value in cbor2.loads(files["parity.cbor"]).items()}
    known = {**initial, **{name[6:]: array for name, array in parity.items() if name.startswith("given.")}}
    for graph in ("infer", "train", "prepare", "backward"):
        if f"{graph}.onnx" not in files:
            assert said["frozen"]
            continue
        model = onnx.load_from_string(files[f"{graph}.onnx"])
        onnx.checker.check_model(model, full_check=True)
        stated = said["interfaces"][graph]
        assert [(one.domain, one.version) for one in model.opset_import] == [("", stated["opset"])]
        assert [one.name for one in model.graph.input] == [one["name"] for one in stated["inputs"]]
        assert [one.name for one in model.graph.output] == [one["name"] for one in stated["outputs"]]
        feed = {one["name"]: known[one["name"]] for one in stated["inputs"]}
        outputs = onnx.reference.ReferenceEvaluator(model).run(None, feed)
        given = {one["name"]: np.asarray(array) for one, array in zip(stated["outputs"], outputs, strict=True)}
        for name, array in given.items():
            if name[:2] in ("f.", "r."):
                continue
            expected = parity[f"{graph}.{name}"]
            kept = array if array.size <= 256 else array.reshape(-1)[[i * array.size // 256 for i in range(256)]]
            assert kept.shape == expected.shape
            assert np.abs(kept - expected).max() <= 0.002 * max(np.abs(expected).max(), 1e-6), (graph, name)
        known |= given if graph != "infer" else {}
