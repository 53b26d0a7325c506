"""What a front is trained to hide: the penalty that each defence adds to the loss at export time.

The defences of the literature and ours stand behind one switch, so that they can be compared on equal terms.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from export.errors import ExportError

__all__ = ["DEFENCES", "Adversary", "Bottleneck", "Defence", "DistanceCorrelation", "Plain", "defence_for"]

DEFENCES = ("bottleneck", "nopeek", "adversarial", "none")
"""Every defence there is, by name."""


class Defence(Protocol):
    """A penalty on activations, and what it learns itself."""

    def parameters(self) -> list[nn.Parameter]:
        """What is learned together with the network."""

    def penalty(self, x: Tensor, activations: Tensor, target: Tensor) -> Tensor:
        """What is added to the loss.

        Args:
            x: (N, *input_shape) in [0, 1], as the front saw it.
            activations: (N, *cut_shape), before the noise.
            target: (N, K), probabilities of the classes: the label, or what teachers make of it.

        Returns:
            A scalar.
        """

    def learn(self, x: Tensor, activations: Tensor) -> None:
        """Make a step of what is learned against the network; called after each of the network's own."""


class Plain:
    """No defence: a front that is trained like any other."""

    def parameters(self) -> list[nn.Parameter]:
        """None."""
        return []

    def penalty(self, x: Tensor, activations: Tensor, target: Tensor) -> Tensor:
        """Zero."""
        return activations.new_zeros(())

    def learn(self, x: Tensor, activations: Tensor) -> None:
        """Nothing."""


class Bottleneck(Plain):
    """Conditional entropy bottleneck: a code that says little beyond the class.

    With a code ``z = mu(x) + noise`` of standard deviation sigma and one centre c_k for each class, ``||mu - c_y||^2 /
    (2 sigma^2)`` bounds I(X; Z | Y) from above (Fischer, "The Conditional Entropy Bottleneck", arXiv 2002.05379, with
    Gaussians of equal spread). Soft targets pull a sample to the mean of the centres by its classes' probabilities, so
    that an uncertain sample stays between them.

    Args:
        classes: K.
        code: values of the code, a vector.
        noise: sigma, above 0.
        strength: weight of the bound.
        spread: None: the centres are learned. Else they stand at rows of a Hadamard matrix times this: two classes at
            opposite ends, more at right angles where the code is a power of two long, and nearer where it is not.

    Raises:
        ExportError: a noise of 0, or a code shorter than fixed centres need.
    """

    def __init__(
        self,
        classes: int,
        code: int,
        noise: float,
        strength: float = 0.3,
        *,
        spread: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        if noise <= 0:
            raise ExportError("the bottleneck is measured in units of the noise: give a noise above 0")
        self.noise = noise
        self.strength = strength
        if spread is None:
            begin = 0.1 * torch.randn(classes, code)
        else:
            begin = spread * _codewords(classes, code)
        self.centres = nn.Parameter(begin.to(device or torch.device("cpu")), requires_grad=spread is None)

    def parameters(self) -> list[nn.Parameter]:
        """The centres (K, code), where they are learned."""
        return [self.centres] if self.centres.requires_grad else []

    def penalty(self, x: Tensor, activations: Tensor, target: Tensor) -> Tensor:
        """The bound, times its strength, in nats; see ``Defence.penalty``."""
        distance = (activations - target @ self.centres).square().sum(dim=1).mean()
        return self.strength * distance / (2 * self.noise**2)


class DistanceCorrelation(Plain):
    """NoPeek: inputs and activations shall not vary together.

    Source: Vepakomma, Singh, Gupta and Raskar, "NoPeek: Information leakage reduction to share activations in
    distributed deep learning", arXiv 2008.09161: the squared sample distance correlation of a batch.

    Args:
        strength: its weight beside the cross-entropy.
    """

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def penalty(self, x: Tensor, activations: Tensor, target: Tensor) -> Tensor:
        """Between 0 and the strength; see ``Defence.penalty``."""
        mine, theirs = _centred(activations.flatten(1)), _centred(x.flatten(1))
        together = (mine * theirs).mean()
        scale = (mine.square().mean() * theirs.square().mean()).clamp_min(1e-12).sqrt()
        return self.strength * together / scale


class Adversary(Plain):
    """A decoder that learns to invert the front, which learns that it cannot.

    Source: Li et al., "ResSFL: A Resistance Transfer Framework for Defending Model Inversion Attack in Split Federated
    Learning", arXiv 2205.04007: min-max training against an inversion model, here with the squared error, which is
    rewarded up to that of the mean sample.

    Args:
        input_shape: (C, H, W) or (C, T).
        cut_shape: of the activations.
        strength: weight of the decoder's error in units of the mean sample's.
        rate: learning rate of the decoder.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        cut_shape: tuple[int, ...],
        strength: float = 1.0,
        *,
        rate: float = 1e-3,
        device: torch.device | None = None,
    ) -> None:
        self.strength = strength
        hidden = 512
        self._decoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(cut_shape), hidden),
            nn.ReLU(),
            nn.Linear(hidden, math.prod(input_shape)),
            nn.Sigmoid(),
        ).to(device or torch.device("cpu"))
        self._optimizer = torch.optim.Adam(self._decoder.parameters(), lr=rate)

    def penalty(self, x: Tensor, activations: Tensor, target: Tensor) -> Tensor:
        """Minus the decoder's error, between minus the strength and 0; see ``Defence.penalty``."""
        return -self.strength * self._error(x, activations).clamp(max=1.0)

    def learn(self, x: Tensor, activations: Tensor) -> None:
        """One step of the decoder."""
        self._optimizer.zero_grad()
        torch.autograd.backward(self._error(x, activations.detach()))
        self._optimizer.step()

    def _error(self, x: Tensor, activations: Tensor) -> Tensor:
        wanted = x.flatten(1)
        spread = (wanted - wanted.mean(dim=0)).square().mean().clamp_min(1e-6)
        error: Tensor = (self._decoder(activations) - wanted).square().mean() / spread
        return error


def defence_for(
    name: str,
    *,
    input_shape: tuple[int, ...],
    cut_shape: tuple[int, ...],
    classes: int,
    noise: float,
    strength: float,
    spread: float | None,
    device: torch.device,
) -> Defence:
    """The defence of that name.

    Raises:
        ExportError: no such defence, or one that the cut does not allow.
    """
    if name == "bottleneck":
        if len(cut_shape) != 1:
            raise ExportError(f"the bottleneck needs a vector at the cut, this one is {cut_shape}: cut behind a Linear")
        return Bottleneck(classes, cut_shape[0], noise, strength, spread=spread, device=device)
    if name == "nopeek":
        return DistanceCorrelation(strength)
    if name == "adversarial":
        return Adversary(input_shape, cut_shape, strength, device=device)
    if name == "none":
        return Plain()
    raise ExportError(f"there is no defence {name!r}: use {', '.join(DEFENCES)}")


def _codewords(classes: int, code: int) -> Tensor:
    """Rows of a Hadamard matrix (Sylvester 1867), cut to the code's length: +-1 (K, code); two get one row and its
    opposite."""
    rows = torch.ones(1, 1)
    while len(rows) < max(code, classes + 1):
        rows = torch.cat([torch.cat([rows, rows], dim=1), torch.cat([rows, -rows], dim=1)])
    if classes == 2:
        return torch.stack([rows[1, :code], -rows[1, :code]])
    words = rows[1 : classes + 1, :code]
    if len(torch.unique(words, dim=0)) < classes:
        raise ExportError(f"{classes} classes do not fit into a code of {code}: use a longer code or learned centres")
    return words


def _centred(rows: Tensor) -> Tensor:
    """Pairwise distances of a batch, doubly centred (Szekely, Rizzo and Bakirov 2007)."""
    # The root has no gradient at zero, where a sample meets itself.
    square = rows.square().sum(dim=1)
    distance = (square[:, None] + square[None] - 2 * rows @ rows.T).clamp_min(1e-8).sqrt()
    return distance - distance.mean(dim=0, keepdim=True) - distance.mean(dim=1, keepdim=True) + distance.mean()
