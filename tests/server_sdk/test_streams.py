from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from server_sdk.errors import ModelError, ServerError
from server_sdk.recovery import recover
from server_sdk.streams import STREAMS, FusionConvolution, Streams, seeded

CHANNELS, CLASSES = 4, 3


def back() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            pool1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(CHANNELS, 5, 3, padding=1),
            bn3=nn.BatchNorm2d(5),
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            head=nn.Linear(5 * 9, CLASSES),
        )
    )


def back1d() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(CHANNELS, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 8, CLASSES))


def batch(samples: int = 4, *size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, CHANNELS, *(size or (6, 6)), generator=generator).relu()


def test_names_in_the_state_are_stable() -> None:
    names = set(Streams(back, CHANNELS, 2).state_dict())
    own = {"conv3.weight", "conv3.bias", "head.weight", "head.bias"}
    own |= {f"bn3.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    fusion = {name.replace("bn3", "bn") for name in own if name.startswith("bn3")} | {"conv.weight"}
    assert names == {
        *(f"attacked.{name}" for name in own),
        *(f"recovered.{name}" for name in own),
        *(f"fused.back.{name}" for name in own),
        *(f"fused.fusion.{name}" for name in fusion),
    }


@pytest.mark.parametrize(
    "names",
    [
        ("attacked",),
        ("recovered",),
        ("fused",),
        ("attacked", "recovered"),
        ("attacked", "fused"),
        ("fused", "attacked"),
    ],
)
def test_any_subset_works_in_the_listed_order(names: tuple[str, ...]) -> None:
    streams = Streams(back, CHANNELS, 2, names)
    logits = streams(batch())
    assert list(logits) == [name for name in STREAMS if name in names] == list(streams.names)
    assert all(each.shape == (4, CLASSES) for each in logits.values())


def test_each_stream_takes_its_view() -> None:
    streams = Streams(back, CHANNELS, 2, threshold=0.3).eval()
    activations = batch()
    logits = streams(activations)
    recovered = recover(activations, threshold=0.3).recovered
    torch.testing.assert_close(logits["attacked"], streams.attacked(activations))
    torch.testing.assert_close(logits["recovered"], streams.recovered(recovered))
    torch.testing.assert_close(logits["fused"], streams.fused.back(streams.fused.fusion(activations, recovered)))
    trace = Streams(back, CHANNELS, 2, threshold=0.3, recovered_view="trace").eval()
    torch.testing.assert_close(trace(activations)["recovered"], trace.recovered(activations - recovered))


def test_a_batch_can_be_recovered_as_one_matrix() -> None:
    streams = Streams(back, CHANNELS, 2, threshold=0.3, recovered_over="batch").eval()
    activations = batch()
    tall = activations.reshape(4 * CHANNELS, 36)
    left, sigma, right = torch.linalg.svd(tall, full_matrices=False)
    residual = (left * sigma.clamp_max(0.3 * sigma.max()) @ right).reshape(activations.shape)
    torch.testing.assert_close(streams(activations)["recovered"], streams.recovered(residual), atol=1e-4, rtol=1e-4)
    alone = Streams(back, CHANNELS, 2, threshold=0.3).eval()
    torch.testing.assert_close(streams(activations[:1])["fused"], alone(activations[:1])["fused"])
    assert not torch.allclose(streams(activations)["recovered"], alone(activations)["recovered"])
    assert streams(activations[:0])["fused"].shape == (0, CLASSES)


def test_fusion_convolution_is_the_sum_of_the_formula() -> None:
    fusion = FusionConvolution(CHANNELS)
    activations, recovered = batch(seed=1), batch(seed=2)
    found = fusion(activations, recovered)
    both = nn.functional.conv2d(torch.cat([activations, recovered], 1), fusion.conv.weight, padding=1)
    normal = (both - both.mean((0, 2, 3), keepdim=True)) / (
        both.var((0, 2, 3), keepdim=True, correction=0) + fusion.bn.eps
    ).sqrt()
    torch.testing.assert_close(found, normal.clamp_min(0) + activations, atol=1e-5, rtol=1e-5)
    assert fusion.conv.weight.shape == (CHANNELS, 2 * CHANNELS, 3, 3)


def test_signals() -> None:
    logits = Streams(back1d, CHANNELS, 1)(batch(4, 8))
    assert {name: tuple(each.shape) for name, each in logits.items()} == dict.fromkeys(STREAMS, (4, CLASSES))


def test_initialisation_is_seeded_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = Streams(back, CHANNELS, 2, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = Streams(back, CHANNELS, 2, seed=3).state_dict()
    other = Streams(back, CHANNELS, 2, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["attacked.conv3.weight"], other["attacked.conv3.weight"])


def test_every_stream_has_its_own_initial_weights_whatever_the_others() -> None:
    state = Streams(back, CHANNELS, 2).state_dict()
    kernels = [state[f"{name}.conv3.weight"] for name in ("attacked", "recovered", "fused.back")]
    for index, kernel in enumerate(kernels):
        assert not torch.equal(kernel, kernels[index - 1])
    alone = Streams(back, CHANNELS, 2, ("fused",)).state_dict()
    assert all(torch.equal(alone[name], state[name]) for name in alone)


def test_load_back_fills_the_first_stream_only() -> None:
    initial = back().state_dict()
    for names, prefix in (
        (STREAMS, "attacked"),
        (("recovered", "fused"), "recovered"),
        (("fused",), "fused.back"),
    ):
        streams = Streams(back, CHANNELS, 2, names)
        before = copy.deepcopy(streams.state_dict())
        streams.load_back(initial)
        for name, value in streams.state_dict().items():
            expected = initial[name.removeprefix(f"{prefix}.")] if name.startswith(f"{prefix}.") else before[name]
            assert torch.equal(value, expected)
        initial["head.bias"] += 1.0  # copied, not shared
        assert not torch.equal(streams.state_dict()[f"{prefix}.head.bias"], initial["head.bias"])


def test_load_back_does_without_the_batch_counter() -> None:
    initial = {name: value for name, value in back().state_dict().items() if "num_batches" not in name}
    streams = Streams(back, CHANNELS, 2)
    streams.load_back(initial)
    assert torch.equal(streams.state_dict()["attacked.conv3.weight"], initial["conv3.weight"])


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_load_back_refuses_other_weights_and_changes_nothing(damage: str) -> None:
    initial = dict(back().state_dict())
    if damage == "missing":
        del initial["head.bias"]
    elif damage == "unknown":
        initial["conv9.weight"] = torch.zeros(1)
    else:
        initial["head.weight"] = torch.zeros(2, 2)
    streams = Streams(back, CHANNELS, 2)
    before = copy.deepcopy(streams.state_dict())
    with pytest.raises(ModelError, match=r"(head\.bias|conv9\.weight|head\.weight).*beside the bundle"):
        streams.load_back(initial)
    assert all(torch.equal(before[name], value) for name, value in streams.state_dict().items())


def test_through_cuts_the_gradient_of_the_others() -> None:
    streams = Streams(back, CHANNELS, 2)
    for through, reaching in ((None, set(STREAMS)), (("fused",), {"fused"}), (("recovered",), {"recovered"})):
        activations = batch().requires_grad_()
        logits = streams(activations, through=through)
        for name, each in logits.items():
            (pulled,) = torch.autograd.grad(each.sum(), activations, retain_graph=True, allow_unused=True)
            assert (pulled is not None) == (name in reaching)


def test_an_in_place_first_layer_leaves_the_activations_alone() -> None:
    def in_place() -> nn.Sequential:
        return nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(CHANNELS * 36, CLASSES))

    activations = batch() - 0.5
    before = activations.clone()
    Streams(in_place, CHANNELS, 2)(activations)
    assert torch.equal(activations, before)


def test_seeded_draws_repeat_and_restore() -> None:
    before = torch.get_rng_state()
    draws = []
    for entropy in ((1, 2), (1, 2), (1, 3)):
        with seeded(*entropy):
            draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"names": ("attacked", "raw")}, "no stream 'raw': use some of attacked, recovered, fused"),
        ({"names": ()}, "no stream is named"),
        ({"seed": -1}, "seed of at least 0"),
        ({"recovered_view": "both"}, "'residual' or 'trace'"),
        ({"recovered_over": "round"}, "'sample' or 'batch'"),
    ],
)
def test_refusals_name_the_remedy(options: dict[str, object], remedy: str) -> None:
    with pytest.raises(ServerError, match=remedy):
        Streams(back, CHANNELS, 2, **options)  # type: ignore[arg-type]


def test_dimensions_are_checked() -> None:
    with pytest.raises(ServerError, match="0 to 2 dimensions"):
        Streams(back, CHANNELS, 3)  # type: ignore[arg-type]
    with pytest.raises(ServerError, match="at least 1 channel"):
        Streams(back, 0, 2)


def test_vectors_have_the_attacked_stream_alone() -> None:
    streams = Streams(lambda: nn.Linear(CHANNELS, CLASSES), CHANNELS, 0, ("attacked",))
    activations = torch.randn(5, CHANNELS)
    assert torch.equal(streams(activations)["attacked"], streams.attacked(activations))
    for names in (STREAMS, ("recovered",), ("attacked", "fused")):
        with pytest.raises(ModelError, match="use the stream attacked alone, or a cut with spatial axes"):
            Streams(lambda: nn.Linear(CHANNELS, CLASSES), CHANNELS, 0, names)


def test_a_factory_that_shares_weights_is_refused() -> None:
    one = back()
    with pytest.raises(ModelError, match="a new one at each call"):
        Streams(lambda: one, CHANNELS, 2)
