"""Split networks in one process: trained through the server's own trainer, the devices' side in torch.

Batches, perturbation, front, streams, recovery and fusion are the SDK's; broker, wire and ONNX graphs are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.reproduction.plan import Attack, Settings
from benchmarks.reproduction.samples import Labelled
from server_sdk.reference.networks import reference_network
from server_sdk.reference.perturbation import Perturbed, front_input, normalise, saliency_map
from server_sdk.reference.specification import ModelSpec, build
from server_sdk.reference.split import split
from server_sdk.streams import STREAMS, Streams
from server_sdk.trainer import Trainer

__all__ = ["Saliency", "SplitNetwork", "unperturbed"]

_FACTORY = "server_sdk.reference.networks:reference_network"
_CUT = "relu2"
_DOWNSAMPLE = 2
_PART = 512


def unperturbed(x: Tensor) -> Perturbed:
    """Samples as they are: epsilon 0, so that the map's channel is all zero; no guide is asked."""
    return Perturbed(x, torch.zeros_like(x), x.new_empty(len(x), 0))


class SplitNetwork:
    """Front and streams of the reference network.

    Args:
        shape: (C, H, W) of a sample.
        classes: K.
        seed: of the initial weights.
        defended: with map channel and all streams; without, the plain network: no map channel, one stream.
        device: where it is once it is trained; training itself is the CPU's, whose bits repeat.
        kind: ``trace`` gives the streams M instead of R, ``batch`` decomposes a whole batch as one matrix.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        seed: int,
        *,
        defended: bool,
        kind: str = "residual",
        device: str = "cpu",
    ) -> None:
        channels, *axes = shape
        stacked = channels * _DOWNSAMPLE ** len(axes) + int(defended)
        arguments: dict[str, Any] = {
            "in_channels": stacked,
            "grid": [size // _DOWNSAMPLE for size in axes],
            "classes": classes,
        }
        self.front, back = split(build(ModelSpec(_FACTORY, arguments, _CUT), seed), _CUT)
        self.shape, self.classes = shape, classes
        self.defended = defended
        self.device = torch.device(device)
        with torch.inference_mode():
            self.cut = tuple(self.front.eval()(torch.zeros(1, stacked, *arguments["grid"])).shape[1:])
        self.streams = Streams(
            lambda: split(reference_network(**arguments), _CUT)[1],
            self.cut[0],
            2,
            STREAMS if defended else ("attacked",),
            seed=seed,
            recovered_view="trace" if kind == "trace" else "residual",
            recovered_over="batch" if kind == "batch" else "sample",
        )
        self.streams.load_back(back.state_dict())

    def sees(self, sent: Perturbed) -> Tensor:
        """What the front takes of perturbed samples: (N, 4C + 1, H/2, W/2), without the map's channel if undefended."""
        return front_input(sent.perturbed, sent.map if self.defended else None, _DOWNSAMPLE)

    def train(self, sent: Perturbed, labels: Tensor, settings: Settings, seed: int) -> None:
        """Train front and streams, batch by batch, in an order that the seed decides."""
        inputs = self.sees(sent)
        steps = settings.epochs * max(1, len(inputs) // settings.batch)
        trainer = Trainer(self.streams, cut=self.cut, learning_rate=settings.back_rate, rounds=steps)
        optimizer = torch.optim.Adam(self.front.parameters(), lr=settings.front_rate)
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.int64)
        self.front.train()
        for _ in range(steps):
            while len(order) < min(settings.batch, len(inputs)):
                order = torch.cat([order, torch.randperm(len(inputs), generator=generator)])
            chosen, order = order[: settings.batch], order[settings.batch :]
            activations = self.front(inputs[chosen])
            result = trainer.step(activations.detach().numpy(), labels[chosen].numpy())
            optimizer.zero_grad()
            torch.autograd.backward(activations, torch.from_numpy(result.gradient))
            for group in optimizer.param_groups:
                group["lr"] = settings.front_rate * result.rate
            optimizer.step()
        self._ready()

    def send(self, sent: Perturbed) -> Tensor:
        """Activations (N, C', H', W') of perturbed samples, with the trained statistics; on the CPU."""
        inputs = self.sees(sent)
        with torch.inference_mode():
            return torch.cat(
                [self.front(part.to(self.device)).cpu() for part in torch.split(inputs, _PART)]
            ).contiguous()

    def probabilities(self, activations: Tensor, batch: int = _PART) -> dict[str, Tensor]:
        """Stream -> probabilities (N, K), on the CPU."""
        parts: dict[str, list[Tensor]] = {}
        with torch.inference_mode():
            for part in torch.split(activations, batch):
                for name, logits in self.streams(part.to(self.device)).items():
                    parts.setdefault(name, []).append(torch.softmax(logits, dim=1).cpu())
        return {name: torch.cat(found) for name, found in parts.items()}

    def classify(self, x: Tensor) -> Tensor:
        """Logits (N, K) of clean samples by stream ``attacked``: of an undefended network, the network itself.

        Samples and logits are on the network's device.
        """
        grid = front_input(x, torch.zeros_like(x) if self.defended else None, _DOWNSAMPLE)
        logits: Tensor = self.streams.attacked(self.front(grid))  # type: ignore[operator]
        return logits

    def state(self) -> dict[str, Tensor]:
        """Everything that was trained."""
        tensors = {f"front.{name}": value for name, value in self.front.state_dict().items()}
        tensors |= {f"streams.{name}": value for name, value in self.streams.state_dict().items()}
        return {name: value.cpu() for name, value in tensors.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> SplitNetwork:
        """Take over what `state` gave; ready to be used, not trained on."""
        for part, module in (("front.", self.front), ("streams.", self.streams)):
            own = {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)}
            module.load_state_dict(own)
        self._ready()
        return self

    def _ready(self) -> None:
        for module in (self.front, self.streams):
            module.to(self.device, memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


class Saliency:
    """A guide's map of samples, from which every attack with it follows.

    Args:
        guide: a classifier in evaluation mode, (N, C, H, W) to logits (N, K).
        samples: to be perturbed; their labels are not used, the map is of the class that the guide predicts.
        device: where the guide is.
    """

    def __init__(self, guide: Callable[[Tensor], Tensor], samples: Labelled, device: str = "cpu") -> None:
        self._x = samples.x
        unknown = torch.tensor(-1, device=device)
        found = [
            saliency_map(guide, part.to(device), unknown.expand(len(part))) for part in torch.split(samples.x, _PART)
        ]
        self._logits = torch.cat([part for part, _ in found]).detach().cpu()
        self._map = torch.cat([part for _, part in found]).detach().cpu()

    @property
    def classes(self) -> Tensor:
        """What the guide predicts, int64 (N,)."""
        return self._logits.argmax(dim=1)

    def attack(self, attack: Attack) -> Perturbed:
        """The samples, perturbed: as `server_sdk.reference.perturbation.perturb` does."""
        scaled = normalise(self._map, attack.normalisation, attack.epsilon)
        return Perturbed((self._x + scaled).clamp(0.0, 1.0), scaled, self._logits)
