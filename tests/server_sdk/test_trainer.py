from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from server_sdk.errors import ModelError, ServerError, TrainingError
from server_sdk.fusion import fuse
from server_sdk.recovery import recover
from server_sdk.streams import STREAMS, Streams
from server_sdk.trainer import Trainer

CHANNELS, CLASSES = 4, 3
CUT = (CHANNELS, 6, 6)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def back(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            pool1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(CHANNELS, 5, 3, padding=1, bias=False),  # a bias before BatchNorm has gradients of noise
            bn3=nn.BatchNorm2d(5),
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            drop=nn.Dropout(dropout),
            head=nn.Linear(5 * 9, CLASSES),
        )
    )


def streams(names: tuple[str, ...] = STREAMS, *, dropout: float = 0.0, seed: int = 1) -> Streams:
    return Streams(lambda: back(dropout), CHANNELS, 2, names, seed=seed)


def batch(seed: int = 0, samples: int = 8) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    draw = np.random.default_rng(seed)
    activations = np.maximum(draw.normal(size=(samples, *CUT)), 0).astype(np.float32)
    return activations, draw.integers(0, CLASSES, samples)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def autograd(model: Streams, activations: NDArray[np.float32], labels: NDArray[np.int64], names: Any) -> Tensor:
    """The gradient of the sum of these streams' losses, with everything attached."""
    inputs = torch.tensor(activations, requires_grad=True)
    logits = copy.deepcopy(model).train()(inputs)
    loss = sum(nn.functional.cross_entropy(logits[name], torch.tensor(labels)) for name in names)
    return torch.autograd.grad(loss, inputs)[0]


@pytest.mark.parametrize(
    ("names", "gradient_from", "of"),
    [
        (STREAMS, "fused", ["fused"]),
        (STREAMS, "all", list(STREAMS)),
        (("attacked",), "fused", ["attacked"]),
        (("recovered",), "fused", ["recovered"]),
        (("attacked", "recovered"), "all", ["attacked", "recovered"]),
        (("attacked", "fused"), "fused", ["fused"]),
    ],
)
def test_gradient_is_that_of_the_chosen_loss_alone(names: tuple[str, ...], gradient_from: Any, of: list[str]) -> None:
    model = streams(names)
    activations, labels = batch()
    expected = autograd(model, activations, labels, of)
    result = Trainer(model, cut=CUT, gradient_from=gradient_from).step(activations, labels)
    assert result.gradient.dtype == np.float32
    assert result.gradient.shape == activations.shape
    torch.testing.assert_close(torch.tensor(result.gradient), expected, atol=1e-6, rtol=1e-4)
    assert result.gradient.flags.c_contiguous


def test_the_other_losses_would_show_in_the_gradient() -> None:
    activations, labels = batch()
    fused = Trainer(streams(), cut=CUT, gradient_from="fused").step(activations, labels).gradient
    everything = Trainer(streams(), cut=CUT, gradient_from="all").step(activations, labels).gradient
    assert np.abs(fused - everything).max() > 1e-3


def plain_torch(model: Streams, optimizer: str, momentum: float, rates: list[float]) -> dict[str, Tensor]:
    """The update written by hand: contiguous memory, plain optimizers, one optimizer a stream."""
    model = copy.deepcopy(model).train()
    for seed, rate in enumerate(rates):
        activations, labels = (torch.tensor(array) for array in batch(seed))
        recovered = recover(activations).recovered
        for name in model.names:
            stream = getattr(model, name)
            views = {"attacked": [activations], "recovered": [recovered], "fused": [activations, recovered]}[name]
            if seed == 0:
                options: dict[str, Any] = {"lr": rate, "fused": False, "foreach": False}
                kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
                stream.optimizer = kind(
                    stream.parameters(), **options, **({"momentum": momentum} if optimizer == "sgd" else {})
                )
            stream.optimizer.param_groups[0]["lr"] = rate
            stream.zero_grad()
            nn.functional.cross_entropy(stream(*views), labels).backward()
            stream.optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(("optimizer", "momentum"), [("adam", 0.0), ("sgd", 0.0), ("sgd", 0.9)])
def test_steps_equal_plain_torch(optimizer: Any, momentum: float) -> None:
    model = streams()
    rates = [0.01 * 0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(4)]
    expected = plain_torch(model, optimizer, momentum, rates)
    trainer = Trainer(model, cut=CUT, learning_rate=0.01, optimizer=optimizer, momentum=momentum, rounds=4)
    for seed in range(4):
        trainer.step(*batch(seed))
    for name, value in trainer.streams.state_dict().items():
        torch.testing.assert_close(value.contiguous(), expected[name], atol=2e-4, rtol=1e-3, msg=name)


def test_losses_are_the_mean_cross_entropies() -> None:
    model = streams()
    activations, labels = batch()
    logits = copy.deepcopy(model).train()(torch.tensor(activations))
    result = Trainer(model, cut=CUT).step(activations, labels)
    assert list(result.losses) == list(STREAMS)
    for name, loss in result.losses.items():
        assert loss == pytest.approx(nn.functional.cross_entropy(logits[name], torch.tensor(labels)).item(), rel=1e-5)


def test_training_lowers_every_loss() -> None:
    trainer = Trainer(streams(), cut=CUT, learning_rate=0.01)
    results = [trainer.step(*batch()) for _ in range(40)]
    for name in STREAMS:
        assert results[-1].losses[name] < 0.3 * results[0].losses[name]


def test_rate_is_a_cosine_above_zero() -> None:
    trainer = Trainer(streams(), cut=CUT, learning_rate=0.5, rounds=4, optimizer="sgd")
    rates = [trainer.step(*batch(seed)).rate for seed in range(6)]
    half = math.sqrt(0.5)
    expected = [1.0, 0.5 * (1 + half), 0.5, 0.5 * (1 - half), 0.5 * (1 - half), 0.5 * (1 - half)]
    assert rates == pytest.approx(expected)
    assert trainer.round == 6
    assert Trainer(streams(), cut=CUT).step(*batch()).rate == 1.0
    assert Trainer(streams(), cut=CUT, rounds=1).rate == 1.0


def test_decide_fuses_in_evaluation_mode_and_changes_nothing() -> None:
    trainer = Trainer(streams(dropout=0.5), cut=CUT)
    for seed in range(3):
        trainer.step(*batch(seed))
    before = trainer.state_dict()
    generator = torch.get_rng_state()
    activations, _ = batch(9)
    decisions = trainer.decide(activations)
    assert same(trainer.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), generator)
    model = copy.deepcopy(trainer.streams).eval()
    with torch.no_grad():
        logits = model(torch.tensor(activations))
    expected = fuse({name: each.softmax(1) for name, each in logits.items()})
    np.testing.assert_allclose(decisions.probabilities, expected.numpy(), atol=1e-5)
    assert decisions.probabilities.dtype == np.float32
    for name in STREAMS:
        assert decisions.streams[name].dtype == np.int64
        np.testing.assert_array_equal(decisions.streams[name], logits[name].argmax(1).numpy())
    for index in range(len(activations)):  # statistics of the batch would make this differ
        alone = trainer.decide(activations[index : index + 1])
        np.testing.assert_allclose(alone.probabilities[0], decisions.probabilities[index], atol=1e-5)


def test_decide_between_steps_does_not_change_the_training() -> None:
    first, second = (Trainer(streams(dropout=0.3), cut=CUT) for _ in range(2))
    for seed in range(3):
        first.step(*batch(seed))
        second.decide(batch(50)[0])
        second.step(*batch(seed))
    assert same(first.state_dict(), second.state_dict())


def test_base_weights_reach_the_decision() -> None:
    trainer = Trainer(streams(), cut=CUT, base_weights={"attacked": 1.0, "recovered": 1e-9, "fused": 1e-9})
    activations, _ = batch()
    with torch.no_grad():
        attacked = copy.deepcopy(trainer.streams).eval()(torch.tensor(activations))["attacked"].softmax(1)
    np.testing.assert_allclose(trainer.decide(activations).probabilities, attacked.numpy(), atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_two_trainers_end_in_the_same_bits(dropout: float) -> None:
    trainers = [Trainer(streams(dropout=dropout), cut=CUT, rounds=9) for _ in range(2)]
    gradients = []
    for trainer in trainers:
        torch.rand(len(gradients) + 1)  # the global generator must not matter
        gradients.append([trainer.step(*batch(seed)).gradient for seed in range(5)])
    assert same(trainers[0].state_dict(), trainers[1].state_dict())
    for first, second in zip(*gradients, strict=True):
        np.testing.assert_array_equal(first, second)


def test_dropout_draws_anew_each_round_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    trainer = Trainer(streams(dropout=0.5), cut=CUT, learning_rate=1e-30)
    losses = [trainer.step(*batch()).losses["fused"] for _ in range(3)]
    assert len(set(losses)) == 3
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("optimizer", "momentum"), [("adam", 0.0), ("sgd", 0.0), ("sgd", 0.9)])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_snapshot_continues_to_the_bit(tmp_path: Path, optimizer: Any, momentum: float, steps: int) -> None:
    options: dict[str, Any] = {"optimizer": optimizer, "momentum": momentum, "rounds": 8, "cut": CUT}
    original = Trainer(streams(dropout=0.2), **options)
    for seed in range(steps):
        original.step(*batch(seed))
    original.save(tmp_path / "state.safetensors")
    kept = original.state_dict()
    continued = Trainer(streams(dropout=0.2, seed=1), **options)
    for _ in range(2):
        continued.step(*batch(77))  # what was there before must not matter
    continued.load(tmp_path / "state.safetensors")
    assert same(continued.state_dict(), kept)
    assert continued.round == steps
    for seed in range(10, 13):
        first, second = original.step(*batch(seed)), continued.step(*batch(seed))
        np.testing.assert_array_equal(first.gradient, second.gradient)
        assert first.rate == second.rate
    assert same(original.state_dict(), continued.state_dict())
    assert not same(original.state_dict(), kept)  # a copy, not a view
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_state_of_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    trainer = Trainer(streams(), cut=CUT)
    trainer.step(*batch())
    before = trainer.state_dict()
    others = [
        Trainer(streams(("attacked",)), cut=CUT),
        Trainer(streams(), cut=CUT, optimizer="sgd", momentum=0.5),
    ]
    others[1].step(*batch())
    damaged = before | {"streams.fused.back.head.weight": torch.zeros(1)}
    partial = {name: value for name, value in before.items() if "head.bias.exp_avg" not in name}
    for state in (others[0].state_dict(), others[1].state_dict(), damaged, partial, {}):
        with pytest.raises(ModelError, match="use the same model and optimizer"):
            trainer.load_state_dict(state)
        assert same(trainer.state_dict(), before)
    file = tmp_path / "state.safetensors"
    with pytest.raises(ModelError, match="cannot be read"):
        trainer.load(file)
    file.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="use another snapshot"):
        trainer.load(file)
    with pytest.raises(ServerError, match="cannot be written"):
        trainer.save(tmp_path / "missing" / "state.safetensors")
    assert same(trainer.state_dict(), before)


@pytest.mark.parametrize("fails", ["loss", "gradient", "batch"])
def test_a_step_that_fails_leaves_everything_as_it_was(fails: str) -> None:
    trainer = Trainer(streams(), cut=CUT)
    trainer.step(*batch())
    head = trainer.streams.fused.back.head
    activations, labels = batch(1)
    if fails == "loss":
        head.weight.data.fill_(3e38)
        head.weight.data[0].fill_(-3e38)
    elif fails == "gradient":
        head.register_full_backward_hook(lambda *_: (torch.full((8, 45), math.inf),))
    else:
        trainer.streams.fused.back.drop.register_forward_hook(lambda *_: 1 / torch.zeros(3, 3) @ torch.zeros(2, 2))
    before = trainer.state_dict()
    generator = torch.get_rng_state()
    message = {"loss": "losses are", "gradient": "gradient is not finite", "batch": "failed on 8 samples"}[fails]
    with pytest.raises(TrainingError, match=message):
        trainer.step(activations, labels)
    assert same(trainer.state_dict(), before)
    assert trainer.round == 1
    assert torch.equal(torch.get_rng_state(), generator)


def test_training_goes_on_after_a_failed_step() -> None:
    first, second = (Trainer(streams(), cut=CUT) for _ in range(2))
    hook = first.streams.fused.back.head.register_forward_hook(lambda *arguments: arguments[2] * math.nan)
    with pytest.raises(TrainingError):
        first.step(*batch(5))
    hook.remove()
    for trainer in (first, second):
        trainer.step(*batch(6))
    assert same(first.state_dict(), second.state_dict())


def test_batches_that_do_not_fit_are_refused() -> None:
    trainer = Trainer(streams(), cut=CUT)
    before = trainer.state_dict()
    activations, labels = batch()
    poisoned = activations.copy()
    poisoned[3, 1, 2, 2] = np.nan
    for wrong, remedy in (
        (activations.astype(np.float64), "send float32"),
        (activations[:, :3], "send float32"),
        (activations[0], "send float32"),
        (activations[:0], "N at least 1"),
        (np.float32(1.0).reshape(()), "send float32"),
        (poisoned, "NaN or infinity"),
        (poisoned * np.float32(0) + np.float32(np.inf), "NaN or infinity"),
    ):
        with pytest.raises(ServerError, match=remedy):
            trainer.step(wrong, labels)
        for names in (STREAMS, ("attacked",)):
            with pytest.raises(ServerError, match=remedy):
                Trainer(streams(names), cut=CUT).decide(wrong)
    for bad, remedy in (
        (labels[:-1], r"send int64 \(8,\)"),
        (labels.astype(np.float32), r"send int64 \(8,\)"),
        (labels.reshape(-1, 1), r"send int64 \(8,\)"),
        (np.where(labels == 0, CLASSES, labels), "classes from 0 to 2"),
        (labels - 1, "classes from 0 to 2"),
    ):
        with pytest.raises(ServerError, match=remedy):
            trainer.step(activations, bad)
    assert same(trainer.state_dict(), before)


def test_read_only_arrays_are_taken_and_nothing_is_written_to_the_callers() -> None:
    activations, labels = batch()
    kept = activations.copy()
    activations.flags.writeable = False
    labels.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient = Trainer(streams(), cut=CUT).step(activations, labels).gradient
    other = kept.copy()
    np.testing.assert_array_equal(Trainer(streams(), cut=CUT).step(other, labels).gradient, gradient)
    np.testing.assert_array_equal(other, kept)


def test_cut_is_learnt_from_the_first_batch_or_checked_at_once() -> None:
    trainer = Trainer(streams())
    with pytest.raises(ServerError, match="give 4 channels and 2 spatial sizes"):
        trainer.decide(np.zeros((2, 5, 6, 6), np.float32))
    with pytest.raises(ServerError, match="does not take activations"):
        trainer.decide(np.zeros((2, 4, 9, 9), np.float32))
    assert trainer.cut == ()
    trainer.step(*batch())
    assert (trainer.cut, trainer.classes) == (CUT, CLASSES)
    assert same(trainer.state_dict(), (lambda t: (t.step(*batch()), t.state_dict())[1])(Trainer(streams(), cut=CUT)))
    for cut in ((), (4,), (5, 6, 6), (4, 6), (4, 0, 6)):
        with pytest.raises(ServerError, match="give 4 channels"):
            Trainer(streams(), cut=cut)
    with pytest.raises(ServerError, match="does not take activations"):
        Trainer(streams(), cut=(4, 9, 9))


def test_vectors(tmp_path: Path) -> None:
    def made() -> Trainer:
        layers = (nn.Linear(CHANNELS, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES))
        return Trainer(
            Streams(lambda: nn.Sequential(*map(copy.deepcopy, layers)), CHANNELS, 0, ("attacked",)), cut=(4,)
        )

    activations, labels = batch()[0][:, :, 0, 0], batch()[1]
    first = made()
    losses = [first.step(activations, labels).losses["attacked"] for _ in range(40)]
    assert losses[-1] < losses[0] and first.step(activations, labels).gradient.shape == (8, CHANNELS)
    assert first.decide(activations[:3]).probabilities.shape == (3, CLASSES)
    first.save(tmp_path / "state")
    second = made()
    second.load(tmp_path / "state")
    assert np.array_equal(first.step(activations, labels).gradient, second.step(activations, labels).gradient)
    with pytest.raises(ServerError, match="give 4 channels and 0 spatial sizes"):
        Trainer(first.streams, cut=(4, 1))
    with pytest.raises(TrainingError, match="failed on 1 samples"):
        first.step(activations[:1], labels[:1])  # BatchNorm of one vector


def test_signals() -> None:
    def back1d() -> nn.Sequential:
        return nn.Sequential(nn.Conv1d(4, 5, 3, padding=1), nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(40, 2))

    model = Streams(back1d, 4, 1, seed=0)
    draw = np.random.default_rng(0)
    activations, labels = draw.normal(size=(6, 4, 8)).astype(np.float32), draw.integers(0, 2, 6)
    expected = autograd(model, activations, labels, ["fused"])
    result = Trainer(model, cut=(4, 8)).step(activations, labels)
    np.testing.assert_allclose(result.gradient, expected.numpy(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"learning_rate": 0.0}, "give a rate above 0"),
        ({"learning_rate": math.nan}, "give a rate above 0"),
        ({"optimizer": "sgd", "momentum": 1.0}, "momentum in"),
        ({"optimizer": "lion"}, "use 'adam' or 'sgd'"),
        ({"gradient_from": "attacked"}, "use 'fused' or 'all'"),
        ({"rounds": 0}, "at least 1, or None"),
        ({"device": "tpu9"}, "use cpu, cuda"),
        ({"device": "meta"}, "use cpu, cuda"),
        ({"base_weights": {"fused": 1.0}}, "give it a positive one"),
    ],
)
def test_refusals_name_the_remedy(options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ServerError, match=remedy):
        Trainer(streams(), cut=CUT, **options)


def test_fused_gradient_needs_the_fused_stream() -> None:
    with pytest.raises(ServerError, match="use 'all'"):
        Trainer(streams(("attacked", "recovered")), cut=CUT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(ServerError, match="torch sees 0 GPUs: use cpu"):
        Trainer(streams(), cut=CUT, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu() -> None:
    on_cpu, on_gpu = Trainer(streams(), cut=CUT), Trainer(streams(), cut=CUT, device="cuda")
    first, second = on_cpu.step(*batch()), on_gpu.step(*batch())
    np.testing.assert_allclose(first.gradient, second.gradient, atol=1e-4)
    first_decision, second_decision = on_cpu.decide(batch(1)[0]), on_gpu.decide(batch(1)[0])
    np.testing.assert_allclose(first_decision.probabilities, second_decision.probabilities, atol=1e-3)
