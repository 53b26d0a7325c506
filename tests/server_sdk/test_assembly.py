"""A bundle and the weights beside it become a trainer, or a clear refusal."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from server_sdk.assembly import back_path, trainer_from
from server_sdk.errors import ModelError


def test_the_first_stream_starts_from_the_exported_weights_and_no_two_alike(built: dict[str, Any]) -> None:
    trainer = built["paper"].trainer()
    exported = safetensors.torch.load_file(back_path(built["paper"].path))
    state = trainer.streams.state_dict()
    for name, value in exported.items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(state[f"attacked.{name}"], value, rtol=0, atol=0)
    heads = [state[f"{stream}.head.weight"] for stream in ("attacked", "recovered", "fused.back")]
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    again = built["paper"].trainer().streams.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())


def test_a_vector_cut(built: dict[str, Any]) -> None:
    made = built["hardened"]
    trainer = made.trainer()
    assert (trainer.cut, trainer.classes, trainer.streams.names) == ((32,), 3, ("attacked",))
    manifest = made.bundle.manifest
    recovered = replace(manifest, server={**manifest.server, "streams": ["attacked", "recovered"]})
    with pytest.raises(ModelError, match="use the stream attacked alone"):
        trainer_from(replace(made.bundle, manifest=recovered), back_path(made.path), rounds=1)
    volume = replace(manifest, cut_shape=(4, 2, 2, 2))
    with pytest.raises(ModelError, match="at most two spatial axes"):
        trainer_from(replace(made.bundle, manifest=volume), back_path(made.path), rounds=1)


def test_weights_that_are_not_this_bundles(built: dict[str, Any], tmp_path: Path) -> None:
    bundle = built["paper"].bundle
    with pytest.raises(ModelError, match="not readable"):
        trainer_from(bundle, tmp_path / "none", rounds=1)
    with pytest.raises(ModelError, match="another bundle"):
        trainer_from(built["vanilla"].bundle, shutil.copy(__file__, tmp_path / "x"), rounds=1)


@pytest.mark.parametrize(
    "change",
    [
        {"streams": ["attacked", "unknown"]},
        {"gradient_from": "nobody"},
        {"model": {"factory": "os:system", "arguments": {"command": "true"}, "cut": "x"}},
        {"model": None},
        {"threshold": "much"},
    ],
)
def test_a_server_part_that_must_not_be_followed(built: dict[str, Any], change: dict[str, Any]) -> None:
    bundle = built["vanilla"].bundle
    changed = replace(bundle, manifest=replace(bundle.manifest, server={**bundle.manifest.server, **change}))
    with pytest.raises(ModelError):
        trainer_from(changed, back_path(built["vanilla"].path), rounds=1)
