"""Each reference model becomes a bundle whose graphs a device runs, and costs what the list says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_sdk.batch import Samples
from edge_sdk.bundle import load_bundle
from edge_sdk.front import Front
from export.build import build_bundle
from export.cli import main
from export.options import class_names
from export.own import own_options
from export.prepare import prepare, recipe_of
from server_sdk.assembly import back_path, trainer_from
from server_sdk.errors import ModelError
from server_sdk.reference.specification import build
from server_sdk.reference.zoo import ZOO, count, small_network


@pytest.mark.parametrize("name", ZOO)
def test_a_device_runs_and_trains_it(name: str, tmp_path: Path) -> None:
    model = ZOO[name]
    options = own_options(name, None, model.input_shape, class_names(model.classes), profile="vanilla")
    assert options.allow_models == () and options.model == model.spec()
    built = build_bundle(tmp_path / "net.psgl", options, None)
    assert built.bundle.stat().st_size < 200_000
    bundle = load_bundle(built.bundle)
    found = count(model.spec(), model.input_shape)
    assert bundle.manifest.cut_shape == found.cut_shape and found.cut_shape[0] == 4
    front, trainer = Front(bundle), trainer_from(bundle, back_path(built.bundle), rounds=1)
    x = np.random.default_rng(0).random((2, *model.input_shape), dtype=np.float32)
    state = front.initial_state()
    sent = front.forward(state, x, None, training=True)
    assert trainer.decide(sent.activations).probabilities.shape == (2, model.classes)
    front_size = sum(value.size for key, value in bundle.initial.items() if key.startswith("p."))
    whole = sum(each.numel() for each in build(model.spec(), 0).parameters())
    assert (front_size, front_size + found.back) == (found.front, whole)


def test_products_are_counted_as_by_hand() -> None:
    found = count(ZOO["watch128"].spec(), (6, 128))
    assert found.front_macs == 24 * 64 * 6 * 9 + 32 * 32 * 24 * 9 + 4 * 32 * 32
    assert found.back_macs == 64 * 32 * 4 * 9 + 64 * 32 * 64 * 9 + 64 * 6
    plain, separable = (count(ZOO[name].spec(), (3, 64, 64)).front_macs for name in ("rgb64", "separable64"))
    assert separable < plain / 2


def test_a_reference_model_takes_samples_of_other_sizes(samples: Callable[[int, int], Samples], tmp_path: Path) -> None:
    options = own_options("grey28", None, (1, 8, 8), class_names(3), code=4, arguments={"widths": [4, 6]})
    made = prepare(samples(30, 1), options, replace(recipe_of(options), steps=2))
    build_bundle(tmp_path / "net.psgl", made.options, None, network=made.network)
    assert load_bundle(tmp_path / "net.psgl").manifest.cut_shape == (4,)


@pytest.mark.parametrize(
    "wrong", [{"input_shape": (1, 7, 8)}, {"input_shape": (8,)}, {"classes": 1}, {"widths": (0,)}, {"bottleneck": 0}]
)
def test_a_size_out_of_range_is_said(wrong: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="axes of at least 8"):
        small_network(**({"input_shape": (1, 8, 8), "classes": 3} | wrong))


def test_the_list_has_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["model", *ZOO]
    assert "3x64x64" in lines[4] and "776,192" in lines[4] and "bottleneck 4x8x8" in lines[4]


def test_the_list_leaves_the_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    count(ZOO["grey28"].spec(), (1, 28, 28))
    assert torch.equal(before, torch.random.get_rng_state())
