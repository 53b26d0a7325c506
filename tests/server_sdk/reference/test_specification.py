from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server_sdk.errors import ModelError
from server_sdk.reference.specification import ModelSpec, build

REFERENCE = ModelSpec(
    "server_sdk.reference.networks:reference_network",
    {"in_channels": 3, "grid": [8, 8], "classes": 4},
    "relu2",
)
REFERENCE_NESTED = {"factory": REFERENCE.factory, "arguments": REFERENCE.arguments}


def test_the_seed_decides_the_weights() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, again, other = build(REFERENCE, 1), build(REFERENCE, 1), build(REFERENCE, 2)
    assert torch.equal(before, torch.random.get_rng_state())
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_foreign_factories_need_consent() -> None:
    foreign = ModelSpec("torch.nn:Linear", {"in_features": 2, "out_features": 3}, "0")
    with pytest.raises(ModelError, match=r"--allow-model torch\.nn:Linear"):
        build(foreign, 0)
    with pytest.raises(ModelError, match="runs its code"):
        build(foreign, 0, allow_models=("torch.nn:Sequential", "torch.nn"))
    assert isinstance(build(foreign, 0, allow_models=("torch.nn:Linear",)), torch.nn.Linear)


def test_a_network_inside_the_arguments_needs_the_same_consent() -> None:
    """A bundle names what it likes, also behind a factory of this SDK."""
    nested = {"factory": "torch.nn:Linear", "arguments": {"in_features": 4, "out_features": 2}}
    arguments = {"network": REFERENCE_NESTED, "cut": "relu2", "input_shape": [3, 8, 8], "code": 4, "back": nested}
    spec = ModelSpec("server_sdk.reference.coded:coded_network", arguments, "tanh")
    with pytest.raises(ModelError, match=r"--allow-model torch\.nn:Linear"):
        build(spec, 0)
    model = build(spec, 0, allow_models=("torch.nn:Linear",))
    assert model.eval()(torch.rand(2, 3, 8, 8)).shape == (2, 2)
    again = build(spec, 0, allow_models=("torch.nn:Linear",)).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_a_factory_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "psgl_test_failing.py").write_text("def make():\n    raise RuntimeError('no such file')\n")
    (tmp_path / "psgl_test_broken.py").write_text("1 / 0\n")
    for name, words in (
        ("psgl_test_failing:make", "fails: RuntimeError: no such file"),
        ("psgl_test_broken:make", "cannot be imported .ZeroDivisionError"),
        ("psgl_test_missing:make", "put its folder on PYTHONPATH"),
    ):
        with pytest.raises(ModelError, match=f"'{name}' .*{words}"):
            build(ModelSpec(name), 0, allow_models=(name,))


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("server_sdk.reference.networks", {}, "module:function"),
        ("server_sdk.reference.networks:nothing", {}, "cannot be imported"),
        ("server_sdk.reference.nowhere:f", {}, "cannot be imported"),
        ("server_sdk.reference.networks:reference_network", {"depth": 3}, "refuses its arguments"),
        ("server_sdk.reference.specification:ModelSpec", {"factory": "a:b"}, "not a torch.nn.Module"),
        ("server_sdk.reference_evil:f", {}, "allow-model"),
        ("server_sdk.references.networks:f", {}, "allow-model"),
    ],
)
def test_bad_factories_are_refused(factory: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(ModelSpec(factory, arguments), 0)
