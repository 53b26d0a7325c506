"""Models of one's own: what is built of them is what torch computes with them, and what cannot be is said."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from edge_sdk.batch import Samples, as_batch
from edge_sdk.bundle import load_bundle
from edge_sdk.dataset import save_dataset
from edge_sdk.errors import ConfigError, PsglError
from edge_sdk.front import Front
from edge_sdk.verification import verify
from export.build import build_bundle
from export.cli import main
from export.errors import ExportError
from export.harden import recipe_for
from export.options import class_names
from export.own import initial_network, own_options
from export.prepare import prepare, recipe_of, train_undefended
from server_sdk.assembly import back_path, trainer_from
from server_sdk.audit.twin import Twin
from server_sdk.audit.victim import Victim
from server_sdk.errors import ModelError
from server_sdk.reference.coded import coded, uncoded, uncoded_name
from server_sdk.reference.specification import ModelSpec, build
from tests.models import write_module

SHAPE = (1, 8, 8)
NET, GUIDE, BACK = (f"psgl_test_models:{name}" for name in ("MyNet", "MyGuide", "MyBack"))
Draw = Callable[[int, int], Samples]


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("models")
    sys.path.insert(0, str(folder))
    yield write_module(folder, "psgl_test_models")
    sys.path.remove(str(folder))
    sys.modules.pop("psgl_test_models", None)


def weights_of(path: Path, seed: int, **arguments: object) -> torch.nn.Module:
    """A model with statistics as after a training, and its file."""
    model = build(ModelSpec(NET, arguments), seed, allow_models=(NET,))
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)
    safetensors.torch.save_model(model, str(path))
    return model.eval()


def test_three_lines_make_a_bundle_that_perturbs_and_computes_what_the_model_does(
    samples: Draw, tmp_path: Path
) -> None:
    whole = weights_of(tmp_path / "net.safetensors", 5)
    options = own_options(
        NET, "layer2", SHAPE, class_names(3), profile="paper", guide=GUIDE, weights=tmp_path / "net.safetensors"
    )
    made = prepare(samples(60, 1), options, guide_epochs=2)
    built = build_bundle(tmp_path / "net.psgl", made.options, made.guide, network=made.network)
    bundle = load_bundle(built.bundle)
    assert bundle.manifest.cut_shape == (8, 4, 4) and bundle.manifest.input_shape == SHAPE
    assert bundle.manifest.server["downsample"] == 1 and not bundle.manifest.server["map_channel"]
    assert set(bundle.initial) >= {"p.stem.weight", "p.layer1.bn1.weight", "b.layer2.bn2.running_var"}
    x = as_batch(samples(6, 3).x, SHAPE, max_batch=6)
    front = Front(bundle)
    sent = front.forward(front.initial_state(), x, None, training=False)
    assert np.abs(sent.perturbed - x).max() == pytest.approx(0.2, abs=1e-6)
    with pytest.raises(ModelError, match=f"--allow-model {NET}"):
        trainer_from(bundle, back_path(built.bundle), rounds=1)
    trainer = trainer_from(bundle, back_path(built.bundle), rounds=1, allow_models=(NET,))
    with torch.no_grad():
        wanted = torch.softmax(whole(torch.from_numpy(sent.perturbed)), dim=1)
    streams = trainer.decide(sent.activations)
    assert streams.probabilities.shape == (6, 3)
    attacked = trainer.streams.attacked.eval()(torch.from_numpy(sent.activations))
    assert torch.allclose(torch.softmax(attacked, dim=1), wanted, atol=1e-4)
    twin = Twin(Victim(bundle, front.initial_state()), front.initial_state(), allow_models=(NET,))
    assert np.allclose(twin.send(torch.from_numpy(x)).detach().numpy(), sent.activations, atol=1e-3)


def test_a_guide_of_ones_own_decides_where_nothing_perturbs(samples: Draw, tmp_path: Path) -> None:
    options = own_options(NET, "layer2", SHAPE, class_names(3), profile="vanilla", guide=GUIDE)
    options = replace(options, offline_guide=True)
    made = prepare(samples(60, 1), options, guide_epochs=2)
    assert made.guide is not None
    with pytest.raises(ExportError, match="a guide that decides without a server: give build_bundle one"):
        build_bundle(tmp_path / "net.psgl", options, None)
    bundle = load_bundle(build_bundle(tmp_path / "net.psgl", made.options, made.guide).bundle)
    assert set(bundle.graphs) == {"infer", "guide", "train", "prepare", "backward"}
    assert verify(bundle, runs=1).passed and bundle.manifest.costs["guide"].macs > 0
    front = Front(bundle)
    x = as_batch(samples(5, 3).x, SHAPE, max_batch=5)
    said = front.guide(front.forward(front.initial_state(), x, None, training=False))
    with torch.no_grad():
        assert said is not None and np.allclose(said, made.guide(torch.from_numpy(x)).numpy(), atol=1e-5)


@pytest.mark.parametrize("cut", ["stem", "layer1", "layer2", "layer3", "pool"])
def test_the_example_can_be_cut_behind_each_stage(cut: str, tmp_path: Path) -> None:
    arguments = {"channels": 3, "classes": 2, "width": 2}
    options = own_options(
        "examples.own_model.residual:Residual", cut, (3, 12, 12), class_names(2), profile="vanilla", arguments=arguments
    )
    built = build_bundle(tmp_path / "net.psgl", options, None)
    assert built.worst_error < 1e-4 and load_bundle(built.bundle).manifest.cut_shape[0] in (2, 4, 8)


def test_a_hardened_bundle_of_ones_own_network(samples: Draw, tmp_path: Path) -> None:
    weights_of(tmp_path / "net.safetensors", 5)
    sent = {}
    for back in (None, BACK):
        options = own_options(
            NET, "layer2", SHAPE, class_names(3), code=6, back=back, weights=tmp_path / "net.safetensors"
        )
        recipe = recipe_of(options)
        assert recipe.downsample == 1 and recipe.defence == recipe_for(SHAPE, 3).defence
        made = prepare(samples(60, 1), options, replace(recipe, steps=3))
        built = build_bundle(tmp_path / "net.psgl", made.options, None, network=made.network)
        bundle = load_bundle(built.bundle)
        assert (bundle.manifest.cut_shape, bundle.manifest.bits, bundle.manifest.frozen) == ((6,), 4, True)
        allowed = tuple(name for name in (NET, back) if name)
        trainer = trainer_from(bundle, back_path(built.bundle), rounds=1, allow_models=allowed)
        x = as_batch(samples(5, 3).x, SHAPE, max_batch=5)
        front = Front(bundle, noise_key=bytes(32))
        clean = front.forward(front.initial_state(), x, None, training=False, noise=0.0).activations
        with torch.no_grad():
            wanted = torch.softmax(made.network(torch.from_numpy(x)), dim=1)
        assert np.abs(clean).max() <= 1
        assert np.allclose(trainer.decide(clean).probabilities, wanted.numpy(), atol=1e-4)
        sent[back] = back_path(built.bundle).stat().st_size
        plain = train_undefended(samples(60, 1), options, replace(recipe, steps=2))
        assert type(plain).__name__ == "MyNet", "one compares with the same network without a code"
    assert sent[None] != sent[BACK]


def test_weights_go_where_their_names_say(tmp_path: Path) -> None:
    whole = weights_of(tmp_path / "net.safetensors", 5, width=2).state_dict()
    for profile, back in (("vanilla", None), ("hardened", None), ("hardened", BACK)):
        options = own_options(
            NET,
            "layer2",
            SHAPE,
            class_names(3),
            profile=profile,
            back=back,
            arguments={"width": 2},
            weights=tmp_path / "net.safetensors",
        )
        network = initial_network(options)
        names = {uncoded_name(options.model, name): name for name in network.state_dict()}
        state = network.state_dict()
        found = {own: state[name] for own, name in names.items() if own in whole}
        assert found and all(torch.equal(value, whole[own]) for own, value in found.items())
        assert ("head.weight" in found) == (back is None) and "stem.weight" in found
    assert initial_network(own_options(NET, "layer2", SHAPE, class_names(3))) is None


def test_a_coded_specification_remembers_its_network() -> None:
    spec = ModelSpec(NET, {"width": 2}, "layer1")
    assert uncoded(coded(spec, SHAPE)) == spec == uncoded(spec)
    with pytest.raises(ModelError, match="a code of 0 values"):
        build(coded(spec, SHAPE, code=0), 0, allow_models=(NET,))
    with pytest.raises(ModelError, match="does not take the input"):
        build(coded(spec, (2, 8, 8)), 0, allow_models=(NET,))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"cut": "layer9"}, "no layer 'layer9' to cut behind: the layers are stem, layer1"),
        ({"cut": "layer1.conv2"}, "still needs the value 'relu'"),
        ({"classes": class_names(4)}, "must give 4 logits"),
        ({"input_shape": (3, 8, 8)}, "does not take samples of"),
        ({"arguments": {"depth": 2}}, "refuses its arguments"),
        ({"model": "psgl_test_models:Nothing"}, "cannot be imported"),
        ({"back": BACK}, "leave out the back"),
    ],
)
def test_what_cannot_be_built_of_a_model_says_what_to_do(
    changed: dict[str, object], words: str, tmp_path: Path
) -> None:
    given = {"model": NET, "cut": "layer2", "input_shape": SHAPE, "classes": class_names(3), "profile": "vanilla"}
    with pytest.raises(PsglError, match=words):
        build_bundle(tmp_path / "x.psgl", own_options(**(given | changed)), None)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_used(tmp_path: Path) -> None:
    weights_of(tmp_path / "wide.safetensors", 0, width=2)
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04.")
    safetensors.torch.save_file({"stem.weight": torch.ones(1)}, str(tmp_path / "few.safetensors"))
    extra = build(ModelSpec(NET), 0, allow_models=(NET,)).state_dict() | {"more": torch.ones(1)}
    safetensors.torch.save_file(extra, str(tmp_path / "more.safetensors"))
    for name, kind, words in (
        ("wide", ExportError, "does not fit the model"),
        ("pickle", ExportError, "is no safetensors file"),
        ("few", ExportError, r"lacks 'head\.bias'"),
        ("more", ExportError, "has 'more', which the model lacks"),
        ("none", ConfigError, "cannot be read"),
    ):
        options = own_options(NET, "layer2", SHAPE, class_names(3), weights=tmp_path / f"{name}.safetensors")
        with pytest.raises(kind, match=words):
            initial_network(options)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ((NET, "--data", "d.npz"), "name the front's last layer (--cut)"),
        (
            ("MyNet", "--cut", "x", "--data", "d.npz"),
            "there is no model 'MyNet': give module:name of yours, or one of grey28",
        ),
        (("--cut", "layer2", "--data", "d.npz"), "--cut is for a model of your own"),
        ((NET, "--cut", "layer2"), "without --data, give --input and --classes"),
        ((NET, "--cut", "layer2", "--input", "8x8x8x8", "--classes", "3"), "give CxHxW, for instance 1x28x28"),
        ((NET, "--cut", "layer2", "--input", "1x8x8", "--classes", "1"), "--classes must be at least 2"),
        ((NET, "--cut", "layer2", "--input", "1x8x8", "--classes", "3"), "trains its front on samples: give --data"),
        ((NET, "--cut", "layer2", "--data", "d.npz", "--input", "1x8x9"), "the samples of d.npz are 1x8x8"),
        ((NET, "--cut", "layer2", "--data", "d.npz", "--classes", "4"), "d.npz has 3"),
        ((NET, "--cut", "layer2", "--data", "d.npz", "--argument", "width=wide"), "a JSON value"),
        ((NET, "--cut", "layer2", "--data", "d.npz", "--code", "0"), "--code must be at least 1"),
        ((NET, "--cut", "layer2", "--data", "d.npz", "--profile", "paper", "--back", BACK), "leave out the back"),
    ],
)
def test_options_that_contradict_each_other_are_one_line(
    line: tuple[str, ...],
    words: str,
    samples: Draw,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    save_dataset(tmp_path / "d.npz", samples(30, 1), samples(9, 2))
    assert main(["build", *line, "-o", "net.psgl"]) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["d.npz"]
