"""Train a front at export time so that what it sends says little beyond the class; on the device it stays as it is.

The recipe: a short code bounded by tanh, Gaussian noise on it, cross-entropy behind the noise plus the conditional
entropy bottleneck (``export/defences.py``), AdamW with a warm-up and a cosine. Baselines of the literature are trained
by the same loop with another penalty.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edge_sdk.batch import Samples, as_batch, as_labels
from export.defences import DEFENCES, Defence, defence_for
from export.errors import ExportError
from server_sdk.reference.perturbation import Perturbation, front_input, perturb
from server_sdk.reference.specification import ModelSpec, build
from server_sdk.reference.split import split

__all__ = ["Progress", "Recipe", "recipe_for", "train_network"]

Progress = Callable[[str, int, int, float], None]
"""Called with (stage, steps done, of how many, loss)."""

_Sees = Callable[[Tensor], Tensor]
_WARM_UP = 0.2
_RAMP = (0.1, 0.3)  # the penalty is off before, and whole after these shares of the steps
_REPORT_EVERY = 20


@dataclass(frozen=True)
class Recipe:
    """How a network is trained at export time.

    Attributes:
        defence: a name of ``DEFENCES``.
        steps: of the optimizer, at least 1.
        batch: samples of a step, at least 2.
        learning_rate: its highest, after a warm-up over a fifth of the steps; a cosine takes it to zero.
        weight_decay: of AdamW.
        strength: weight of the defence's penalty.
        noise: standard deviation of the Gaussian noise behind the cut.
        spread: of the bottleneck's fixed centres, in (0, 1]; None: the centres are learned.
        shift: augmentation: samples are moved by up to this many cells along each axis, repeating the border.
        flip: augmentation: half of the images are mirrored left to right.
        teacher: share of the targets that cross-fitted teachers say instead of the label, 0 to 1.
        teacher_steps: of each teacher.
        folds: the teachers: each judges the samples that it was not trained on.
        downsample: of the front's input, as in ``front_input``.
        compute: ``cpu`` or ``cuda``.
    """

    defence: str = "bottleneck"
    steps: int = 3000
    batch: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    strength: float = 0.3
    noise: float = 1.0
    spread: float | None = None
    shift: int = 2
    flip: bool = False
    teacher: float = 0.0
    teacher_steps: int = 800
    folds: int = 5
    downsample: int = 2
    compute: str = "cpu"

    def __post_init__(self) -> None:
        if self.defence not in DEFENCES or self.compute not in ("cpu", "cuda") or self.downsample not in (1, 2):
            raise ExportError(
                f"defence {self.defence!r}, compute {self.compute!r}, downsample {self.downsample}: the defence is one "
                f"of {', '.join(DEFENCES)}, compute cpu or cuda, downsample 1 or 2"
            )
        rates = (self.learning_rate, self.weight_decay, self.strength, self.noise)
        if min(self.steps, self.teacher_steps) < 1 or min(self.batch, self.folds) < 2 or not self.learning_rate > 0:
            raise ExportError("steps and learning rate are above 0, batch and folds at least 2: give such a recipe")
        if min(*rates, self.shift) < 0 or not all(map(math.isfinite, rates)) or not 0 <= self.teacher <= 1:
            raise ExportError(
                "weight decay, noise, strength and shift are at least 0 and finite, the teachers' share is 0 to 1: "
                "give such a recipe"
            )
        if self.spread is not None and not 0 < self.spread <= 1:
            raise ExportError(f"spread is {self.spread:g}: the code is in [-1, 1], choose one above 0 and at most 1")
        if self.defence == "bottleneck" and self.noise == 0:
            raise ExportError("the bottleneck is measured in units of the noise: give a noise above 0")


def recipe_for(input_shape: Sequence[int], classes: int) -> Recipe:
    """The recipe that was found good for samples of such a kind (docs/decisions).

    With two classes, decisions are ranked and not only counted, so an uncertain sample has to stay between the classes:
    fixed centres, less noise, and targets that cross-fitted teachers have softened.
    """
    signal = len(input_shape) == 2
    recipe = Recipe(shift=max(1, input_shape[-1] // 32) if signal else max(1, min(input_shape[1:]) // 14))
    if classes > 2:
        return recipe
    return replace(recipe, noise=0.5, spread=0.8, teacher=0.3, teacher_steps=1500 if signal else 800, steps=2000)


def train_network(
    samples: Samples,
    model: ModelSpec,
    recipe: Recipe,
    *,
    input_shape: tuple[int, ...],
    classes: int,
    seed: int,
    input_range: tuple[float, float] | None = None,
    teacher: ModelSpec | None = None,
    attack: tuple[Perturbation, nn.Module] | None = None,
    initial: nn.Module | None = None,
    allow_models: Collection[str] = (),
    progress: Progress | None = None,
) -> nn.Module:
    """Train a whole network, front and back, with a defence at its cut.

    Args:
        samples: of which nothing has to stay secret from the build machine. Those of one group are judged by the same
            teacher, who saw none of them.
        model: the network and its cut.
        input_shape: (C, H, W) or (C, T).
        classes: K.
        seed: of weights, order, augmentation and noise; the caller's random state is left alone. On a CPU with a fixed
            number of threads the same seed gives the same weights.
        input_range: of samples in a sensor's own units, see ``as_batch``.
        teacher: the teachers' network; needed where the recipe has some.
        attack: what the device does to its input, and the guide that steers it, which has seen none of the samples;
            the front sees what is left, the teachers see the samples.
        initial: the network with the weights to begin with, in place of the seed's; it is not changed.
        allow_models: factories outside this SDK that may be imported, which runs their code.

    Returns:
        The network in evaluation mode, on the CPU.

    Raises:
        ExportError: a recipe that does not fit the network, or a loss that is not finite.
        BatchError, ModelError: samples or a network that cannot be used.
    """
    if recipe.compute == "cuda" and not torch.cuda.is_available():
        raise ExportError("this torch sees no CUDA device: train on the CPU or install a CUDA build of torch")
    device = torch.device(recipe.compute)
    floats = as_batch(samples.x, input_shape, max_batch=len(samples), input_range=input_range)
    x = torch.from_numpy(floats).to(device)
    labels = torch.from_numpy(as_labels(samples.y, len(samples), classes))
    target = nn.functional.one_hot(labels, classes).float().to(device)
    if recipe.teacher > 0:
        if teacher is None:
            raise ExportError("the recipe has teachers: say which network they are")
        taught = _Network(teacher, None, tuple(allow_models))
        judged = _judgements(x, target, taught, recipe, seed, samples.groups, progress)
        target = (1 - recipe.teacher) * target + recipe.teacher * judged
    stage = "training without a defence" if recipe.defence == "none" else "training"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        network = _Network(model, initial, tuple(allow_models))
        return _fit(x, target, network, recipe, seed, stage, progress, _sees(attack, recipe, device))


@dataclass(frozen=True)
class _Network:
    spec: ModelSpec
    initial: nn.Module | None
    allow_models: tuple[str, ...]

    def make(self, seed: int) -> nn.Module:
        made = build(self.spec, seed, allow_models=self.allow_models)
        if self.initial is not None:
            made.load_state_dict(self.initial.state_dict())
        return made


def _sees(attack: tuple[Perturbation, nn.Module] | None, recipe: Recipe, device: torch.device) -> _Sees:
    """What the front makes of samples before its first layer."""
    if attack is None:
        return lambda x: front_input(x, None, recipe.downsample)
    perturbation, guide = attack[0], copy.deepcopy(attack[1]).to(device).eval().requires_grad_(False)
    how, epsilon = perturbation.normalisation, perturbation.epsilon

    def sees(x: Tensor) -> Tensor:
        decided = torch.full((len(x),), -1, device=x.device)
        sent = perturb(guide, x, decided, normalisation=how, epsilon=epsilon)
        return front_input(sent.perturbed, sent.map if perturbation.map_channel else None, recipe.downsample)

    return sees


def _fit(
    x: Tensor,
    target: Tensor,
    model: _Network,
    recipe: Recipe,
    seed: int,
    stage: str,
    progress: Progress | None,
    sees: _Sees,
) -> nn.Module:
    torch.manual_seed(seed)
    network = model.make(seed).to(x.device).train()
    front, back = split(network, model.spec.cut)
    network.eval()
    with torch.no_grad():
        cut_shape = tuple(front(sees(x[:1])).shape[1:])
    network.train()
    defence = defence_for(
        recipe.defence,
        input_shape=tuple(x.shape[1:]),
        cut_shape=cut_shape,
        classes=target.shape[1],
        noise=recipe.noise,
        strength=recipe.strength,
        spread=recipe.spread,
        device=x.device,
    )
    optimizer = torch.optim.AdamW(
        [*network.parameters(), *defence.parameters()], lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    for step in range(recipe.steps):
        share = step / recipe.steps
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _rate(share)
        chosen = torch.randint(len(x), (recipe.batch,)).to(x.device)
        loss = _step(x[chosen], target[chosen], front, back, defence, optimizer, recipe, _ramp(share), sees)
        if step % _REPORT_EVERY == _REPORT_EVERY - 1 or step == recipe.steps - 1:
            value = float(loss)
            if not math.isfinite(value):
                raise ExportError(f"the loss is {value} after {step + 1} steps: lower learning_rate or strength")
            if progress is not None:
                progress(stage, step + 1, recipe.steps, value)
    return network.eval().cpu()


def _step(
    x: Tensor,
    target: Tensor,
    front: nn.Module,
    back: nn.Module,
    defence: Defence,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    ramp: float,
    sees: _Sees,
) -> Tensor:
    seen = _augmented(x, recipe)
    activations = front(sees(seen))
    logits = back(activations + recipe.noise * torch.randn_like(activations))
    loss = nn.functional.cross_entropy(logits, target)
    if ramp > 0:
        loss = loss + ramp * defence.penalty(seen, activations, target)
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    defence.learn(seen, activations)
    return loss.detach()


def _rate(share: float) -> float:
    if share < _WARM_UP:
        return share / _WARM_UP
    return 0.5 * (1.0 + math.cos(math.pi * (share - _WARM_UP) / (1 - _WARM_UP)))


def _ramp(share: float) -> float:
    begin, end = _RAMP
    return min(max((share - begin) / (end - begin), 0.0), 1.0)


def _augmented(x: Tensor, recipe: Recipe) -> Tensor:
    """Each sample moved on its own, by whole cells; images mirrored."""
    for axis in range(2, x.ndim):
        if recipe.shift:
            size = x.shape[axis]
            by = torch.randint(-recipe.shift, recipe.shift + 1, (len(x), 1)).to(x.device)
            index = (torch.arange(size, device=x.device)[None] + by).clamp(0, size - 1)
            shape = [len(x), 1, *(size if other == axis else 1 for other in range(2, x.ndim))]
            x = torch.gather(x, axis, index.reshape(shape).expand_as(x))
    if recipe.flip and x.ndim == 4:
        mirrored = (torch.rand(len(x), 1, 1, 1) < 0.5).to(x.device)
        x = torch.where(mirrored, x.flip(3), x)
    return x


def _judgements(
    x: Tensor,
    target: Tensor,
    model: _Network,
    recipe: Recipe,
    seed: int,
    groups: npt.NDArray[np.int64] | None,
    progress: Progress | None,
) -> Tensor:
    """What teachers say of samples that they have not seen (cross-fitting): (N, K)."""
    names = np.arange(len(x)) if groups is None else np.asarray(groups)
    present = np.random.default_rng(seed).permutation(np.unique(names))
    if len(present) < recipe.folds:
        raise ExportError(f"{len(present)} groups of samples for {recipe.folds} teachers: use fewer folds")
    plain = replace(
        recipe,
        defence="none",
        teacher=0.0,
        noise=0.0,
        steps=recipe.teacher_steps,
        batch=min(recipe.batch, 64),
        learning_rate=2e-3,
    )
    judged = torch.zeros_like(target)
    sees = _sees(None, recipe, x.device)
    for number, part in enumerate(np.array_split(present, recipe.folds), start=1):
        held = torch.from_numpy(np.flatnonzero(np.isin(names, part))).to(x.device)
        kept = torch.from_numpy(np.flatnonzero(~np.isin(names, part))).to(x.device)
        stage = f"teacher {number} of {recipe.folds}"
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            teacher = _fit(x[kept], target[kept], model, plain, seed + 1000 * number, stage, progress, sees)
            teacher = teacher.to(x.device)
        with torch.inference_mode():
            for rows in torch.split(held, 512):
                judged[rows] = torch.softmax(teacher(sees(x[rows])), dim=1)
    return judged
