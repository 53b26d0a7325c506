"""The export as a whole: what it writes, what it refuses, that it repeats itself, that its own check can fail."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_sdk.batch import Samples, as_batch
from edge_sdk.bundle import load_bundle
from edge_sdk.errors import BatchError
from edge_sdk.front import Front, FrontState
from edge_sdk.verification import verify
from export.build import build_bundle, prepare_guide
from export.errors import ExportError
from export.graphs import Optimizer, build_graphs
from export.offline_guide import guide_graph
from export.options import BuildOptions, class_names, measured_range, model_of
from export.parity import check_parity
from server_sdk.assembly import back_path, trainer_from
from server_sdk.errors import ModelError
from server_sdk.reference.guide import Guide
from server_sdk.reference.perturbation import Perturbation, front_input
from server_sdk.reference.profiles import PROFILES, ServerPart
from server_sdk.reference.specification import ModelSpec, build
from server_sdk.reference.split import split
from server_sdk.streams import STREAMS

OPTIONS = BuildOptions("vanilla", (1, 8, 8), class_names(3))
HARDENED = ModelSpec(
    "server_sdk.reference.networks:hardened_network",
    {"in_channels": 4, "grid": [4, 4], "classes": 3, "widths": [4, 4, 6, 6]},
    "tanh",
)
SPEC: dict[str, Any] = {
    "factory": "server_sdk.reference.networks:reference_network",
    "arguments": {"in_channels": 5, "grid": [4, 4], "classes": 3},
}


def test_equal_seeds_give_equal_bundles(built: dict[str, Any], tmp_path: Path) -> None:
    again = build_bundle(tmp_path / "again.psgl", OPTIONS, None)
    assert again.bundle_id == built["vanilla"].bundle.id
    assert again.back.read_bytes() == back_path(built["vanilla"].path).read_bytes()
    assert again.worst_error < 1e-3
    other = build_bundle(tmp_path / "other.psgl", replace(OPTIONS, seed=1), None)
    assert other.bundle_id != again.bundle_id


def test_bundles_are_small(built: dict[str, Any]) -> None:
    assert all(built[profile].path.stat().st_size < 120_000 for profile in PROFILES)


def test_what_cannot_be_exported(tmp_path: Path, guide: Guide) -> None:
    with pytest.raises(ExportError, match="no profile 'nothing'"):
        build_bundle(tmp_path / "x", replace(OPTIONS, profile="nothing"), None)
    with pytest.raises(ExportError, match="guide"):
        build_bundle(tmp_path / "x", replace(OPTIONS, profile="paper"), None)
    with pytest.raises(ModelError, match="relu2"):
        build_bundle(tmp_path / "x", replace(OPTIONS, model=ModelSpec(**SPEC, cut="nowhere")), None)
    assert list(tmp_path.iterdir()) == []


FROZEN = BuildOptions("hardened", (1, 8, 8), class_names(3), model=HARDENED)


def test_a_trained_network_goes_into_the_bundle_and_beside_it(tmp_path: Path) -> None:
    network = build(HARDENED, 5)
    for layer in network.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    made = build_bundle(tmp_path / "net.psgl", FROZEN, None, network=network)
    assert network.training and all(torch.equal(value, kept[name]) for name, value in network.state_dict().items())
    bundle = load_bundle(made.bundle)
    manifest = bundle.manifest
    assert (manifest.frozen, manifest.noise, manifest.noise_kind, manifest.bits) == (True, 1.0, "gaussian", 4)
    assert (manifest.span, manifest.bound, manifest.cut_shape) == ((-3.0, 3.0), 1.0, (32,))
    assert set(bundle.graphs) == {"infer"} and not any(name.startswith("s.") for name in bundle.initial)
    x = np.random.default_rng(0).random((5, 1, 8, 8), dtype=np.float32)
    front = Front(bundle, noise_key=bytes(32))
    sent = front.forward(front.initial_state(), x, None, training=False, noise=0.0).activations
    whole = network.eval()
    with torch.no_grad():
        seen = front_input(torch.from_numpy(x), None, 2)
        activations = split(whole, "tanh")[0](seen)
        assert np.allclose(sent, activations.numpy(), atol=1e-5) and np.abs(sent).max() <= 1
        wanted = torch.softmax(whole(seen), dim=1)
    trainer = trainer_from(bundle, back_path(made.bundle), rounds=3)
    assert np.allclose(trainer.decide(sent).probabilities, wanted.numpy(), atol=1e-5), "the back begins trained"
    assert ServerPart.from_manifest(manifest.server).streams == ("attacked",)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "trained before it is exported"),
        ({"profile": "vanilla", "model": None, "frozen": True}, "trained before it is exported"),
    ],
)
def test_a_frozen_front_needs_a_trained_network(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=words):
        build_bundle(tmp_path / "x", replace(FROZEN, **options), None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 3}, "bits=3"),
        ({"span": (1.0, 1.0)}, "range"),
        ({"span": (0.0, 1e60)}, "range"),
        ({"noise_kind": "uniform"}, "gaussian, laplace"),
        ({"noise": -1.0}, "at least 0"),
        ({"bound": 0.5}, "ends in Tanh, which does not keep activations within 0.5"),
        ({"model": replace(HARDENED, cut="codebn")}, "ends in BatchNorm1d"),
        ({"model": ModelSpec(HARDENED.factory, {**HARDENED.arguments, "code": 8}, "tanh")}, "not the one"),
    ],
)
def test_a_hardened_front_that_cannot_be(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=words):
        build_bundle(tmp_path / "x", replace(FROZEN, **options), None, network=build(HARDENED, 5))
    assert list(tmp_path.iterdir()) == []


def test_what_stands_in_the_place_of_the_profiles(tmp_path: Path) -> None:
    options = replace(OPTIONS, noise=0.5, noise_kind="laplace", bits=2, span=(-0.1, 0.7))
    manifest = load_bundle(build_bundle(tmp_path / "x.psgl", options, None).bundle).manifest
    assert (manifest.noise, manifest.noise_kind, manifest.bits) == (0.5, "laplace", 2)
    assert manifest.span == (float(np.float32(-0.1)), float(np.float32(0.7)))
    assert not manifest.frozen and manifest.bound == 0


def test_perturbation_and_streams_are_switches(tmp_path: Path, guide: Guide) -> None:
    off = replace(OPTIONS, profile="paper", perturb="none", streams=("attacked",))
    assert model_of(off) == model_of(OPTIONS)
    manifest = load_bundle(build_bundle(tmp_path / "x.psgl", off, None).bundle).manifest
    assert (manifest.normalisation, manifest.server["streams"]) == (None, ["attacked"])
    on = replace(OPTIONS, perturb="max", epsilon=0.1, streams=("attacked", "fused"))
    manifest = load_bundle(build_bundle(tmp_path / "y.psgl", on, guide).bundle).manifest
    assert (manifest.normalisation, manifest.epsilon) == ("max", 0.1)
    assert manifest.server["map_channel"] and manifest.server["streams"] == ["attacked", "fused"]
    assert model_of(on).arguments["in_channels"] == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epsilon": 0.1}, "no perturbation to spend it"),
        ({"profile": "paper", "perturb": "none", "epsilon": 0.1}, "no perturbation to spend it"),
        ({"streams": ()}, "streams are none"),
        ({"streams": ("attacked", "other")}, "name some of attacked, recovered, fused"),
    ],
)
def test_switches_that_cannot_be(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=words):
        build_bundle(tmp_path / "x", replace(OPTIONS, **options), None)
    assert list(tmp_path.iterdir()) == []


def test_weights_in_8_bits_are_those_of_every_graph(tmp_path: Path, guide: Guide) -> None:
    before = copy.deepcopy(guide.state_dict())
    whole, small = (
        build_bundle(
            tmp_path / f"{bits}.psgl",
            replace(FROZEN, weight_bits=bits, offline_guide=True),
            guide,
            network=build(HARDENED, 5),
        )
        for bits in (32, 8)
    )
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    exact, rounded = load_bundle(whole.bundle), load_bundle(small.bundle)
    assert small.bundle.stat().st_size < 0.7 * whole.bundle.stat().st_size and small.worst_error < 1e-3
    assert small.back.read_bytes() == whole.back.read_bytes()
    for name, tensor in exact.initial.items():
        found = rounded.initial[name]
        assert found.dtype == np.float32 and found.shape == tensor.shape
        assert np.abs(found - tensor).max() <= np.abs(tensor).max() / 250
        assert (found == tensor).all() == (name[:2] != "p." or tensor.ndim < 2), name
    assert verify(rounded, runs=1).passed
    assert len(rounded.graphs["guide"]) < 0.5 * len(exact.graphs["guide"])
    assert rounded.manifest.costs == exact.manifest.costs
    x = np.random.default_rng(0).random((7, 1, 8, 8), np.float32)
    fronts = (Front(bundle, noise_key=bytes(32)) for bundle in (exact, rounded))
    said, roughly = (front.guide(front.forward(front.initial_state(), x, None, training=False)) for front in fronts)
    assert said is not None and roughly is not None
    assert 0 < np.abs(said - roughly).max() < 0.05 * np.abs(said).max()


@pytest.mark.parametrize(("profile", "bits"), [("vanilla", 8), ("hardened", 4)])
def test_weights_in_few_bits_that_cannot_be(profile: str, bits: int, tmp_path: Path) -> None:
    options = replace(FROZEN if profile == "hardened" else OPTIONS, weight_bits=bits)
    with pytest.raises(ExportError, match="8 or 32 can be, and 8 alone where the front is frozen"):
        build_bundle(tmp_path / "x", options, None, network=build(HARDENED, 5) if profile == "hardened" else None)


def test_a_code_has_nothing_to_recover(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="vectors of 32 values, of which there is nothing to recover"):
        build_bundle(tmp_path / "x", replace(FROZEN, streams=STREAMS), None, network=build(HARDENED, 5))


def test_the_range_of_a_sensor_comes_from_its_samples() -> None:
    x = np.arange(-5000, 5001, dtype=np.int16).reshape(-1, 1, 73)[:130]
    samples = Samples(x, np.arange(130))
    low, high = np.percentile(x, (0.1, 99.9))
    assert measured_range(samples) == (low, high) and x.min() < low < high < x.max()
    assert measured_range(Samples(x.astype(np.uint8), samples.y)) is None
    with pytest.raises(ExportError, match="--input-range LOW HIGH"):
        measured_range(Samples(np.zeros_like(x), samples.y))


def test_a_bundle_of_signals_in_a_sensors_units(tmp_path: Path) -> None:
    """Many normal beats, and others that are inverted: build from int16, and the device's graphs tell them apart."""
    generator = np.random.default_rng(0)
    y = np.arange(80) % 2
    beat = 900 * np.exp(-(((np.arange(64) - 30) / 4) ** 2))
    x = (np.where(y, -1, 1)[:, None] * beat + generator.normal(0, 40, (80, 64))).astype(np.int16)[:, None]
    samples = Samples(x, y)
    guide = prepare_guide(samples, 2, seed=0, epochs=6, input_range=(-1000.0, 1000.0))
    options = BuildOptions("paper", (1, 64), ("N", "other"), input_range=(-1000.0, 1000.0))
    build_bundle(tmp_path / "ecg.psgl", options, guide)
    bundle = load_bundle(tmp_path / "ecg.psgl")
    assert bundle.manifest.input_range == (-1000.0, 1000.0)
    batch = as_batch(x, (1, 64), max_batch=80, input_range=bundle.manifest.input_range)
    done = Front(bundle).forward(FrontState(0, bundle.initial), batch, None, training=False)
    assert done.guide is not None and (done.guide.argmax(axis=1) == y).mean() > 0.95
    with pytest.raises(BatchError, match="--input-range"):
        prepare_guide(samples, 2, seed=0, epochs=1)


SPEC: dict[str, Any] = {
    "factory": "server_sdk.reference.networks:reference_network",
    "arguments": {"in_channels": 5, "grid": [4, 4], "classes": 3},
}


@pytest.mark.parametrize("wrong", ["weights", "guide", "epsilon", "optimizer"])
def test_the_check_before_writing_finds_a_wrong_graph(wrong: str, guide: Guide) -> None:
    front, _ = split(build(ModelSpec(**SPEC, cut="relu2"), 0), "relu2")
    perturbation, optimizer = Perturbation("sign", 0.2), Optimizer("sgd", learning_rate=0.1, momentum=0.9)
    graphs = build_graphs(
        front, guide, input_shape=(1, 8, 8), perturbation=perturbation, downsample=2, optimizer=optimizer
    )
    arguments: dict[str, Any] = {
        "front": front,
        "guide": guide,
        "perturbation": perturbation,
        "optimizer": optimizer,
    }
    assert check_parity(graphs, input_shape=(1, 8, 8), downsample=2, **arguments) < 1e-3
    if wrong == "weights":
        arguments["front"], _ = split(build(ModelSpec(**SPEC, cut="relu2"), 1), "relu2")
    elif wrong == "guide":
        arguments["guide"] = Guide((1, 8, 8), 3).eval()
    elif wrong == "epsilon":
        tampered = {**graphs.tensors}
        name = next(iter(tampered))
        tampered[name] = tampered[name] + np.float32(0.1)
        graphs = replace(graphs, tensors=tampered)
    else:
        arguments["optimizer"] = Optimizer("sgd", learning_rate=0.2, momentum=0.9)
        given = arguments["optimizer"]
        front_before = {name: value.clone() for name, value in front.state_dict().items()}
        with pytest.raises(ExportError, match="backward"):
            # The rate is an input, so only another rule can be wrong: adam's graph against sgd's answer.
            adam = build_graphs(
                front,
                guide,
                input_shape=(1, 8, 8),
                perturbation=perturbation,
                downsample=2,
                optimizer=Optimizer("adam", learning_rate=0.2),
            )
            check_parity(
                replace(graphs, step=replace(adam.step, train=graphs.step.train), tensors=adam.tensors),
                input_shape=(1, 8, 8),
                downsample=2,
                **(arguments | {"optimizer": replace(given, momentum=0.0)}),
            )
        assert all(torch.equal(value, front_before[name]) for name, value in front.state_dict().items())
        return
    with pytest.raises(ExportError, match="differs from torch"):
        check_parity(graphs, input_shape=(1, 8, 8), downsample=2, **arguments)


def test_the_check_before_writing_finds_a_wrong_guide_that_only_decides(guide: Guide) -> None:
    front, _ = split(
        build(ModelSpec(**{**SPEC, "arguments": {**SPEC["arguments"], "in_channels": 4}}, cut="relu2"), 0), "relu2"
    )
    optimizer = Optimizer("sgd", learning_rate=0.1)
    made = build_graphs(front, None, input_shape=(1, 8, 8), perturbation=None, downsample=2, optimizer=optimizer)
    graphs = replace(made, guide=guide_graph(guide, (1, 8, 8)))
    assert check_parity(graphs, front, guide, (1, 8, 8), None, 2, optimizer) < 1e-3
    with pytest.raises(ExportError, match="graph 'guide' differs from torch"):
        check_parity(graphs, front, Guide((1, 8, 8), 3).eval(), (1, 8, 8), None, 2, optimizer)
    with pytest.raises(ExportError, match="the guide does not take the input"):
        guide_graph(guide, (2, 8, 8))


def test_the_manifest_says_what_was_exported(built: dict[str, Any]) -> None:
    manifest = load_bundle(built["paper"].path).manifest
    assert manifest.cut_shape == (32, 4, 4) and manifest.classes == ("0", "1", "2")
    assert manifest.optimizer == "adam" and manifest.perturb_towards == "guide"
    assert set(manifest.versions) == {"psgl", "torch", "onnx", "onnxruntime"}
    assert manifest.server["streams"] == ["attacked", "recovered", "fused"]
