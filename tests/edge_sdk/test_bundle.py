"""A bundle is data that is checked to the last byte before it is used."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.bundle import MANIFEST, load_bundle, write_bundle
from edge_sdk.codec import pack_tensors
from edge_sdk.errors import BundleError
from edge_sdk.packing import Packing

Rewrite = Callable[[dict[str, bytes]], None]


def rewritten(path: Path, out: Path, change: Rewrite) -> Path:
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out


def manifest(**changes: Any) -> Rewrite:
    def change(files: dict[str, bytes]) -> None:
        files[MANIFEST] = json.dumps({**json.loads(files[MANIFEST]), **changes}).encode()

    return change


def test_a_bundle_comes_back_as_it_was_written(built: dict[str, Any], tmp_path: Path) -> None:
    paper = built["paper"].bundle
    assert paper.manifest.profile == "paper" and paper.manifest.input_shape == (1, 8, 8)
    assert paper.manifest.normalisation == "sign" and paper.manifest.epsilon == 0.2
    assert set(paper.graphs) == {"train", "infer", "prepare", "backward"}
    with zipfile.ZipFile(built["paper"].path) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name != MANIFEST}
    again = write_bundle(tmp_path / "again.psgl", paper.manifest, files)
    assert again == paper.id, "equal bundles have equal ids"
    assert (tmp_path / "again.psgl").read_bytes() == built["paper"].path.read_bytes()


def test_a_frozen_bundle_holds_the_inference_and_a_guide_that_only_decides(
    built: dict[str, Any], tmp_path: Path
) -> None:
    made = built["hardened"]
    assert set(made.bundle.graphs) == set(made.bundle.manifest.graphs) == {"infer", "guide"}
    assert made.bundle.manifest.decides_alone and not built["vanilla"].bundle.manifest.decides_alone
    assert made.bundle.manifest.packing == Packing(4, -3.0, 3.0)
    with zipfile.ZipFile(made.path) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name != MANIFEST}
    assert set(files) == {"infer.onnx", "guide.onnx", "initial.cbor", "parity.cbor"}
    with pytest.raises(BundleError, match=r"nothing of train\.onnx"):
        write_bundle(tmp_path / "x", made.bundle.manifest, {**files, "train.onnx": b"x"})
    with pytest.raises(BundleError, match=r"needs infer\.onnx"):
        write_bundle(tmp_path / "x", made.bundle.manifest, {"initial.cbor": files["initial.cbor"]})
    with pytest.raises(BundleError, match=r"needs train\.onnx"):
        write_bundle(tmp_path / "x", replace(made.bundle.manifest, frozen=False), files)
    with pytest.raises(BundleError, match="of other graphs than backward, guide, infer, prepare, train"):
        load_bundle(rewritten(made.path, tmp_path / "thawed", manifest(frozen=False)))
    step = pack_tensors({**made.bundle.initial, "s.step": np.zeros((), np.float32)})
    write_bundle(tmp_path / "stepping", made.bundle.manifest, {**files, "initial.cbor": step})
    with pytest.raises(BundleError, match=r"frozen front has an optimizer's 's\.step'"):
        load_bundle(tmp_path / "stepping")


def _another_guide(which: str, **changes: Any) -> Rewrite:
    def change(files: dict[str, bytes]) -> None:
        document = json.loads(files[MANIFEST])
        for side in ("inputs", "outputs"):
            for tensor in document["interfaces"]["guide"][side]:
                if tensor["name"] == which:
                    tensor.update(changes)
        files[MANIFEST] = json.dumps(document).encode()

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_another_guide("guide", shape=["N", 4]), "guide does not give one float32 logit for each class"),
        (_another_guide("guide", dtype="int64"), "guide does not give one float32 logit for each class"),
        (_another_guide("guide", name="logits"), "guide does not give one float32 logit for each class"),
        (_another_guide("x", shape=["N", 1, 9, 9]), "x of guide is float32"),
        (_another_guide("x", name="image"), "guide takes no x"),
        (manifest(normalisation="sign"), "a guide that perturbs and another that only decides"),
    ],
)
def test_a_guide_that_cannot_decide(change: Rewrite, words: str, built: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=words):
        load_bundle(rewritten(built["hardened"].path, tmp_path / "x", change))


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_kind": "uniform"},
        {"noise_kind": 1},
        {"frozen": 1},
        {"frozen": None},
        {"bits": 3},
        {"bits": True},
        {"bits": 4.0},
        {"span": [1.0]},
        {"span": [0.0, 1.0, 2.0]},
        {"span": [0, 1]},
        {"span": [1.0, 0.0]},
        {"span": [0.0, 0.1]},
        {"span": "wide"},
        {"bound": -1.0},
        {"bound": "much"},
    ],
)
def test_a_manifest_that_says_impossible_things_of_the_wire(
    changes: dict[str, Any], built: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="export the bundle again"):
        load_bundle(rewritten(built["hardened"].path, tmp_path / "x", manifest(**changes)))


@pytest.mark.parametrize("name", ["frozen", "noise_kind", "bits", "span", "bound", "interfaces", "costs"])
def test_a_bundle_from_before_these_fields_is_refused(name: str, built: dict[str, Any], tmp_path: Path) -> None:
    def without(files: dict[str, bytes]) -> None:
        document = json.loads(files[MANIFEST])
        del document[name]
        files[MANIFEST] = json.dumps(document).encode()

    with pytest.raises(BundleError, match=f"is incomplete .*{name}.*: export the bundle again"):
        load_bundle(rewritten(built["vanilla"].path, tmp_path / "x", without))


def test_the_range_of_a_sensor_is_recorded_and_may_be_missing(built: dict[str, Any], tmp_path: Path) -> None:
    vanilla = built["vanilla"].bundle
    assert vanilla.manifest.input_range is None
    with zipfile.ZipFile(built["vanilla"].path) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name != MANIFEST}
    write_bundle(tmp_path / "ranged.psgl", replace(vanilla.manifest, input_range=(-300.0, 500.0)), files)
    assert load_bundle(tmp_path / "ranged.psgl").manifest.input_range == (-300.0, 500.0)

    def forget(files: dict[str, bytes]) -> None:
        document = json.loads(files[MANIFEST])
        del document["input_range"]
        files[MANIFEST] = json.dumps(document).encode()

    older = rewritten(built["vanilla"].path, tmp_path / "older.psgl", forget)
    assert load_bundle(older).manifest.input_range is None


def test_cut_off_anywhere(built: dict[str, Any], tmp_path: Path) -> None:
    data = built["vanilla"].path.read_bytes()
    for share in (0.0, 0.01, 0.5, 0.9, 0.999):
        cut = tmp_path / "cut.psgl"
        cut.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(BundleError, match="whole bundle"):
            load_bundle(cut)


def test_every_changed_byte_is_found(built: dict[str, Any], tmp_path: Path) -> None:
    original = built["vanilla"].path.read_bytes()
    reference = load_bundle(built["vanilla"].path)
    changed = tmp_path / "changed.psgl"
    for position in range(0, len(original), max(1, len(original) // 150)):
        changed.write_bytes(original[:position] + bytes([original[position] ^ 0x10]) + original[position + 1 :])
        try:
            loaded = load_bundle(changed)
        except BundleError:
            continue
        # Some bytes of a zip mean nothing (dates, attributes); what is read must then be the same.
        assert loaded.id == reference.id and loaded.graphs == reference.graphs


def drop_graph(files: dict[str, bytes]) -> None:
    del files["infer.onnx"]


def add_stranger(files: dict[str, bytes]) -> None:
    files["extra.onnx"] = b"?"


def escape(files: dict[str, bytes]) -> None:
    files["../escape"] = b"?"


def change_graph(files: dict[str, bytes]) -> None:
    files["train.onnx"] = files["train.onnx"][:-1] + b"?"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_graph, "files that its manifest names"),
        (add_stranger, "files that its manifest names"),
        (escape, "do not use it"),
        (change_graph, "changed after export"),
        (manifest(version=1), "version 1, this SDK reads version 2: export it again"),
        (manifest(format="else"), "not a bundle"),
        (manifest(classes=["only"]), "two classes"),
        (manifest(input_shape=[0, 8, 8]), "incomplete"),
        (manifest(input_shape="1x8x8"), "incomplete"),
        (manifest(learning_rate=float("nan")), "not JSON"),
        (manifest(max_batch=True), "incomplete"),
        (manifest(input_range=[1, 1]), "not a range"),
        (manifest(input_range=[0, 1, 2]), "not a range"),
        (manifest(input_range=[0, True]), "not a range"),
        (manifest(input_range="all"), "not a list"),
        (lambda files: files.pop(MANIFEST), "needs one manifest.json"),
        (lambda files: files.update({MANIFEST: b"[" * 100_000}), "not JSON"),
    ],
)
def test_a_bundle_that_must_not_be_used(built: dict[str, Any], tmp_path: Path, change: Rewrite, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        load_bundle(rewritten(built["vanilla"].path, tmp_path / "bad.psgl", change))


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(built: dict[str, Any], tmp_path: Path) -> None:
    def bomb(files: dict[str, bytes]) -> None:
        files[MANIFEST] = b" " * (2 << 20)

    with pytest.raises(BundleError, match="the limit is"):
        load_bundle(rewritten(built["vanilla"].path, tmp_path / "bomb.psgl", bomb))


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="psgl-export build"):
        load_bundle(tmp_path / "none.psgl")
    with pytest.raises(BundleError, match="cannot be read"):
        load_bundle(tmp_path)


def test_a_failed_write_leaves_the_old_bundle(built: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "net.psgl"
    target.write_bytes(built["vanilla"].path.read_bytes())
    with pytest.raises(BundleError, match=r"needs train\.onnx"):
        write_bundle(target, built["vanilla"].bundle.manifest, {})
    assert load_bundle(target).id == built["vanilla"].bundle.id
    assert list(tmp_path.iterdir()) == [target]
