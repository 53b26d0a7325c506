"""The decoder on cases whose answer is known: what is invertible must be inverted, what is constant cannot be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from edge_sdk.batch import Samples
from server_sdk.audit.attacks import Knowledge, LearnedDecoder
from server_sdk.audit.metrics import likeness
from server_sdk.errors import ServerError

Images = Callable[[int, int], np.ndarray]
KINDS = ("convolution", "mlp")


@pytest.fixture
def images(samples: Callable[[int, int], Samples]) -> Images:
    return lambda count, seed: samples(count, seed).x.astype(np.float32) / 255


def mixed(x: np.ndarray) -> np.ndarray:
    """An invertible front: 2x2 blocks become channels, which an orthogonal matrix mixes."""
    blocks = torch.nn.functional.pixel_unshuffle(torch.from_numpy(x), 2).numpy()
    matrix = np.linalg.qr(np.random.default_rng(3).normal(size=(4, 4)))[0].astype(np.float32)
    return np.einsum("oc,nchw->nohw", matrix, blocks).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_an_invertible_front_is_inverted(images: Images, kind: str) -> None:
    own, x = images(600, 1), images(60, 2)
    decoder = LearnedDecoder(kind, epochs=100, width=16)
    found = likeness(decoder.rebuild(Knowledge(own, mixed(own)), mixed(x), seed=0), x)
    assert found.nmse < (0.06 if kind == "convolution" else 0.1), found
    assert found.ssim is not None and found.ssim > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_front_is_not_inverted(images: Images, kind: str) -> None:
    own, x = images(300, 1), images(60, 2)
    seen = np.ones((300, 4, 4, 4), np.float32)
    decoder = LearnedDecoder(kind, epochs=10, width=16)
    found = likeness(decoder.rebuild(Knowledge(own, seen), seen[:60], seed=0), x)
    assert found.nmse > 0.97, "nothing can be better than the mean"


def test_the_decision_alone_gives_the_mean_of_its_class(images: Images, samples: Callable[[int, int], Samples]) -> None:
    own, x = images(300, 1), images(60, 2)
    told, asked = (np.eye(3, dtype=np.float32)[samples(n, s).y] for n, s in ((300, 1), (60, 2)))
    made = LearnedDecoder("mlp", epochs=40, width=8).rebuild(Knowledge(own, told), asked, seed=0)
    means = np.stack([own[told[:, label] == 1].mean(axis=0) for label in range(3)])
    best = likeness(means[asked.argmax(axis=1)], x)
    found = likeness(made, x)
    assert found.nmse == pytest.approx(best.nmse, rel=0.08)
    assert found.ssim is not None and best.ssim is not None
    assert found.ssim > best.ssim - 0.01, "what is kept is what shows most"


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_and_the_callers_generator_is_left_alone(images: Images, kind: str) -> None:
    own, x = images(40, 1), images(6, 2)
    knowledge, decoder = Knowledge(own, mixed(own)), LearnedDecoder(kind, epochs=2, width=4)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (decoder.rebuild(knowledge, mixed(x), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("shape", "target"), [((3, 5), (2, 14)), ((3, 4, 4), (1, 7, 9)), ((2, 8, 8), (3, 8, 8)), ((6,), (1, 8, 8))]
)
def test_every_cut_and_every_input(shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    knowledge = Knowledge(generator.random((12, *target), np.float32), generator.random((12, *shape), np.float32))
    done = []
    for kind in KINDS:
        decoder = LearnedDecoder(kind, epochs=2, width=4, least_steps=1)
        if decoder.fits(shape):
            heard: list[int] = []
            made = decoder.rebuild(
                knowledge, knowledge.seen[:5], seed=0, progress=lambda done, of, loss, heard=heard: heard.append(done)
            )
            assert made.shape == (5, *target) and made.dtype == np.float32
            assert made.min() >= 0 and made.max() <= 1
            assert heard == [1, 2]
            done.append(kind)
    assert done == (["mlp"] if len(shape) == 1 else list(KINDS))


@pytest.mark.parametrize("kind", KINDS)
def test_many_held_out_samples_judge_by_likeness(kind: str, images: Images) -> None:
    own, x = images(240, 1), images(30, 2)
    decoder = LearnedDecoder(kind, epochs=20, width=16)
    made = decoder.rebuild(Knowledge(own, mixed(own)), mixed(x), seed=0)
    found = likeness(made, x)
    assert found.ssim is not None and found.ssim > 0.9


def test_few_samples_are_gone_through_more_often() -> None:
    generator = np.random.default_rng(0)
    knowledge = Knowledge(generator.random((12, 1, 8, 8), np.float32), generator.random((12, 6), np.float32))
    heard: list[tuple[int, int]] = []
    LearnedDecoder("mlp", epochs=2, width=1, least_steps=30).rebuild(
        knowledge, knowledge.seen, seed=0, progress=lambda done, of, loss: heard.append((done, of))
    )
    assert heard[-1] == (8, 8), "twelve samples are four batches of three: 30 steps take eight passes"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_learned_by_heart(kind: str) -> None:
    """Of codes that say nothing of the inputs a decoder can make nothing but their mean, however long it trains."""
    generator = np.random.default_rng(0)
    shape = (2, 4, 4) if kind == "convolution" else (32,)
    own, x = (generator.random((n, 1, 8, 8), np.float32) for n in (60, 40))
    codes, seen = (generator.normal(size=(n, *shape)).astype(np.float32) for n in (60, 40))
    made = LearnedDecoder(kind, epochs=150, width=16).rebuild(Knowledge(own, codes), seen, seed=0)
    assert likeness(made, x).nmse < 1.15


def test_what_does_not_fit_is_refused() -> None:
    x, seen = np.zeros((4, 1, 8, 8), np.float32), np.zeros((4, 6), np.float32)
    with pytest.raises(ServerError, match="no spatial axes"):
        LearnedDecoder("convolution").rebuild(Knowledge(x, seen), seen, seed=0)
    with pytest.raises(ServerError, match="the victims' are"):
        LearnedDecoder("mlp").rebuild(Knowledge(x, seen), seen[:, :5], seed=0)
    with pytest.raises(ServerError, match="give both"):
        Knowledge(x, seen[:3])
