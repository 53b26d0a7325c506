"""The guide: the small classifier that a bundle carries and whose logits steer the perturbation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from server_sdk.errors import ModelError
from server_sdk.reference.perturbation import space_to_depth

__all__ = ["Guide", "fit_guide", "takes_grid"]

_SMALLEST_EXTENT = 8


class Guide(nn.Module):
    """Two narrow convolutions and a linear layer on the space-to-depth grid; 0.34 M products for 1x28x28.

    Args:
        shape: ``(C, H, W)`` of an image or ``(C, T)`` of a signal; spatial extents even and at least 8.
        classes: number of classes K, at least 2.

    Raises:
        ModelError: another number of axes, an odd or too small extent, fewer than two classes.
    """

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        if len(shape) not in (2, 3):
            raise ModelError(f"input shape {shape} is neither (channels, time) nor (channels, height, width)")
        if not takes_grid(shape):
            raise ModelError(f"input grid {shape[1:]} needs even extents of at least {_SMALLEST_EXTENT}: pad the input")
        if classes < 2:
            raise ModelError(f"a guide needs at least 2 classes, not {classes}")
        self.shape = tuple(shape)
        self.classes = classes
        channels, *grid = shape
        axes = len(grid)
        self.conv1: nn.Module
        self.conv2: nn.Module
        if axes == 2:
            self.conv1 = nn.Conv2d(channels * 4, 16, 3, padding=1)
            self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
            self.pool: nn.Module = nn.MaxPool2d(2)
        else:
            self.conv1 = nn.Conv1d(channels * 2, 16, 3, padding=1)
            self.conv2 = nn.Conv1d(16, 32, 3, padding=1)
            self.pool = nn.MaxPool1d(2)
        cells = 1
        for extent in grid:
            cells *= extent // 2 // 2 // 2
        self.head = nn.Linear(32 * cells, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Float ``(N, C, *S)`` in 0..1 to logits ``(N, K)``."""
        hidden = self.pool(torch.relu(self.conv1(space_to_depth(x))))
        hidden = self.pool(torch.relu(self.conv2(hidden)))
        logits: Tensor = self.head(hidden.flatten(1))
        return logits


def takes_grid(shape: Sequence[int]) -> bool:
    """Whether a ``Guide`` takes samples of this shape: even spatial extents of at least 8."""
    return all(extent % 2 == 0 and extent >= _SMALLEST_EXTENT for extent in shape[1:])


def fit_guide(
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.int64],
    *,
    classes: int,
    seed: int,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    network: nn.Module | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> nn.Module:
    """Train a guide on samples that no device will perturb with it (cross-fitted).

    Args:
        x: float32 ``(N, C, H, W)`` or ``(N, C, T)`` in 0..1.
        y: int64 ``(N,)``, 0 to ``classes - 1``.
        seed: of initial weights and shuffling; the caller's random state is left alone.
        epochs: passes over the samples, at least 1.
        network: the guide to fit, from its weights on: x to logits (N, K), each row of its own sample only in
            evaluation mode; None: a new ``Guide``.
        progress: called after each epoch with (epochs done, epochs, mean cross-entropy of the epoch).

    Returns:
        The guide in evaluation mode, on the CPU.

    Raises:
        ModelError: samples and labels do not match, a label is out of range, ``epochs`` is below 1, or a network that
            does not take the samples or gives no logits of the classes.
    """
    if len(x) == 0 or len(x) != len(y):
        raise ModelError(f"the guide got {len(x)} samples and {len(y)} labels: give one label per sample")
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ModelError(f"labels lie in {int(y.min())}..{int(y.max())}, outside 0..{classes - 1}")
    if epochs < 1:
        raise ModelError(f"epochs is {epochs}: give at least 1")
    samples = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    labels = torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        guide = Guide(tuple(samples.shape[1:]), classes) if network is None else network.train()
        _check_logits(guide, samples, classes)
        optimizer = torch.optim.Adam(guide.parameters(), lr=learning_rate)
        for epoch in range(epochs):
            total = 0.0
            for chosen in torch.split(torch.randperm(len(samples)), batch_size):
                loss = nn.functional.cross_entropy(guide(samples[chosen]), labels[chosen])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                total += loss.item() * len(chosen)
            if progress is not None:
                progress(epoch + 1, epochs, total / len(samples))
    return guide.eval()


def _check_logits(guide: nn.Module, samples: Tensor, classes: int) -> None:
    if isinstance(guide, Guide):
        return
    try:
        with torch.no_grad():
            logits = guide.eval()(samples[:2])
    except RuntimeError as exc:
        shape = tuple(samples.shape[1:])
        raise ModelError(f"the guide does not take samples of {shape}: {str(exc).splitlines()[0]}") from exc
    guide.train()
    if logits.shape != (len(samples[:2]), classes):
        raise ModelError(f"the guide gives {tuple(logits.shape[1:])} for each sample: it must give {classes} logits")
