from __future__ import annotations

import pytest
import torch

from server_sdk.errors import ModelError
from server_sdk.reference.specification import ModelSpec, build

REFERENCE = ModelSpec(
    "server_sdk.reference.networks:reference_network",
    {"in_channels": 3, "grid": [8, 8], "classes": 4},
    "relu2",
)


def test_the_seed_decides_the_weights() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, again, other = build(REFERENCE, 1), build(REFERENCE, 1), build(REFERENCE, 2)
    assert torch.equal(before, torch.random.get_rng_state())
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_foreign_factories_need_consent() -> None:
    foreign = ModelSpec("torch.nn:Sequential", {}, "0")
    with pytest.raises(ModelError, match="allow_foreign=True"):
        build(foreign, 0)
    assert build(foreign, 0, allow_foreign=True) is not None


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("server_sdk.reference.networks", {}, "module:function"),
        ("server_sdk.reference.networks:nothing", {}, "cannot be imported"),
        ("server_sdk.reference.nowhere:f", {}, "cannot be imported"),
        ("server_sdk.reference.networks:reference_network", {"depth": 3}, "refuses its arguments"),
        ("server_sdk.reference.specification:ModelSpec", {"factory": "a:b"}, "not a torch.nn.Sequential"),
        ("server_sdk.reference_evil:f", {}, "allow_foreign"),
        ("server_sdk.references.networks:f", {}, "allow_foreign"),
    ],
)
def test_bad_factories_are_refused(factory: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(ModelSpec(factory, arguments), 0)
