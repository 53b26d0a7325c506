"""One update of the back networks: activations in, the gradient at the cut out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from server_sdk.errors import ModelError, ServerError, TrainingError
from server_sdk.fusion import BASE_WEIGHTS, fuse
from server_sdk.streams import STREAMS, Streams, seeded

__all__ = ["Decisions", "StepResult", "Trainer"]

_SLOTS = {"adam": ("step", "exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


@dataclass(frozen=True)
class StepResult:
    """What one update gives back.

    Attributes:
        losses: stream -> mean cross-entropy of the batch, in nats, before the update.
        gradient: float32 (N, \\*cut), the gradient of the mean loss over all N samples with respect to the
            activations; of which loss, says the trainer's ``gradient_from``.
        rate: factor in (0, 1] by which devices scale their own base learning rate in this step.
    """

    losses: Mapping[str, float]
    gradient: NDArray[np.float32]
    rate: float


@dataclass(frozen=True)
class Decisions:
    """What the streams decide.

    Attributes:
        probabilities: float32 (N, K), the fused decision.
        streams: stream -> its own class of every sample, int64 (N,).
    """

    probabilities: NDArray[np.float32]
    streams: Mapping[str, NDArray[np.int64]]


class Trainer:
    """Trains `Streams` on activations.

    The loss is the sum of the streams' mean cross-entropies over the batch. A step depends on the weights,
    the optimizer's state, the number of rounds done and the batch, on nothing else: random layers (dropout)
    draw from a generator seeded by (the streams' seed, the round). On a CPU with a fixed number of threads
    its bits repeat. Not for use from two threads at once.

    Args:
        streams: the networks; moved to ``device``.
        cut: (C, \\*S), the shape of one sample's activations. None: that of the first batch.
        learning_rate: base learning rate, above 0.
        optimizer: ``adam`` or ``sgd``.
        momentum: of ``sgd``, in [0, 1).
        gradient_from: whose loss the devices' gradient is taken of: ``fused`` (the paper) or ``all`` streams.
            With one stream both mean that stream.
        rounds: steps over which a cosine takes the learning rate towards 0; None keeps it constant. Steps
            beyond ``rounds`` use the last one's rate.
        base_weights: of the decision fusion, see `fuse`.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.

    Raises:
        ServerError: an option out of its range, or back networks that do not take activations of this cut.
    """

    def __init__(
        self,
        streams: Streams,
        *,
        cut: Sequence[int] | None = None,
        learning_rate: float = 1e-3,
        optimizer: Literal["adam", "sgd"] = "adam",
        momentum: float = 0.0,
        gradient_from: Literal["fused", "all"] = "fused",
        rounds: int | None = None,
        base_weights: Mapping[str, float] = BASE_WEIGHTS,
        device: str = "cpu",
    ) -> None:
        if not (math.isfinite(learning_rate) and learning_rate > 0) or not 0.0 <= momentum < 1.0:
            raise ServerError(
                f"learning_rate is {learning_rate}, momentum {momentum}: give a rate above 0 and a momentum in [0, 1)"
            )
        if rounds is not None and rounds < 1:
            raise ServerError(f"rounds is {rounds}: give at least 1, or None for a constant learning rate")
        self.streams = streams.to(_device(device))
        self.learning_rate = learning_rate
        self.rounds = rounds
        self.round = 0
        self.cut: tuple[int, ...] = ()
        self.classes = 0
        self._through = _through(streams, gradient_from)
        self._base_weights = dict(base_weights)
        self._device = _device(device)
        self._format = torch.contiguous_format
        if self._device.type == "cpu" and streams.spatial_dims == 2:
            self._format = torch.channels_last  # a third faster than the contiguous format
            self.streams.to(memory_format=self._format)  # type: ignore[call-overload]
        self._parameters = {name: each for name, each in streams.named_parameters() if each.requires_grad}
        self._optimizer_name = optimizer
        self._momentum = momentum
        self._optimizer = _optimizer(optimizer, list(self._parameters.values()), learning_rate, momentum)
        if cut is not None:
            self._probe(tuple(cut))

    @property
    def options(self) -> Mapping[str, float | str | None]:
        """What, beside the weights, decides what a step does: two trainers with the same options train alike."""
        return {
            "learning_rate": self.learning_rate,
            "optimizer": self._optimizer_name,
            "momentum": self._momentum,
            "rounds": self.rounds,
            "gradient_from": ", ".join(self._through),
        }

    @property
    def rate(self) -> float:
        """Factor in (0, 1] of the next step's learning rates."""
        if self.rounds is None:
            return 1.0
        done = min(self.round, self.rounds - 1) / self.rounds
        return 0.5 * (1.0 + math.cos(math.pi * done))

    def step(
        self,
        activations: NDArray[np.float32],
        labels: NDArray[np.int64],
        weights: NDArray[np.float32] | None = None,
    ) -> StepResult:
        """Make one update.

        Args:
            activations: float32 (N, \\*cut), finite, N at least 1: the devices' batches, concatenated.
            labels: integers (N,) in [0, K).
            weights: float32 (N,), how much each sample counts in the loss, mean 1; None: all the same.

        Raises:
            ServerError: activations or labels that do not fit; nothing has changed.
            TrainingError: a loss or a gradient that is not finite, or back networks that fail on the batch;
                weights, statistics, optimizer and round are as they were.
        """
        inputs = self._activations(activations)
        targets = self._labels(labels, len(activations))
        inputs.requires_grad_()
        rate = self.rate
        statistics = [buffer.clone() for buffer in self.streams.buffers()]
        try:
            with seeded(self.streams.seed, len(STREAMS), self.round, device=self._device):
                logits = self.streams.train()(inputs, through=self._through)
                losses = {name: _loss(each, targets, weights) for name, each in logits.items()}
                self._optimizer.zero_grad()
                torch.autograd.backward(torch.stack(list(losses.values())).sum())
            values = torch.stack([loss.detach() for loss in losses.values()]).tolist()
            gradient = self._gradient(inputs, values)
        except (RuntimeError, ValueError, ServerError) as exc:
            for buffer, before in zip(self.streams.buffers(), statistics, strict=True):
                buffer.copy_(before)
            self._optimizer.zero_grad()
            if isinstance(exc, ServerError):
                raise
            detail = " ".join(str(exc).split())
            raise TrainingError(f"the back networks failed on {len(activations)} samples: {detail}") from exc
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate * rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.round += 1
        return StepResult(dict(zip(losses, values, strict=True)), gradient, rate)

    def decide(self, activations: NDArray[np.float32]) -> Decisions:
        """Classify with the trained statistics (evaluation mode); changes nothing.

        Args:
            activations: float32 (N, \\*cut), finite, N at least 1.

        Raises:
            ServerError: activations that do not fit.
        """
        inputs = self._activations(activations)
        self.streams.eval()
        with torch.inference_mode():
            logits = self.streams(inputs)
            probabilities = {name: torch.softmax(each, dim=1) for name, each in logits.items()}
            fused = fuse(probabilities, self._base_weights)
            classes = {name: each.argmax(dim=1).cpu().numpy() for name, each in logits.items()}
        return Decisions(fused.cpu().numpy(), classes)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a later step depends on, copied to the CPU.

        Names: ``streams.<name>``, ``optimizer.<parameter>.<slot>`` and ``round`` (int64, shape ()).
        """
        state = {f"streams.{name}": value for name, value in self.streams.state_dict().items()}
        for name, parameter in self._parameters.items():
            for slot, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    state[f"optimizer.{name}.{slot}"] = value
        state["round"] = torch.tensor(self.round)
        return {
            name: torch.empty(value.shape, dtype=value.dtype).copy_(value.detach()) for name, value in state.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`, to the bit where options and machine are the same.

        Raises:
            ModelError: names, shapes or types that are not this trainer's; nothing has changed.
        """
        slots = _SLOTS[self._optimizer_name] if any(name.startswith("optimizer.") for name in state) else ()
        wanted = {f"streams.{name}": value for name, value in self.streams.state_dict().items()}
        for name, parameter in self._parameters.items():
            wanted |= {f"optimizer.{name}.{slot}": parameter for slot in slots}
            if "step" in slots:
                wanted[f"optimizer.{name}.step"] = torch.zeros(())
        wanted["round"] = torch.tensor(0)
        wrong = sorted(wanted.keys() ^ state.keys()) or [
            name
            for name, value in wanted.items()
            if state[name].shape != value.shape or state[name].dtype != value.dtype
        ]
        if wrong:
            raise ModelError(f"not a state of this trainer ({', '.join(wrong[:5])}): use the same model and optimizer")
        self.streams.load_state_dict({name: state[f"streams.{name}"] for name in self.streams.state_dict()})
        groups = self._optimizer.state_dict()["param_groups"]
        entries: dict[int, dict[str, Tensor]] = {}
        for index, (name, parameter) in enumerate(self._parameters.items() if slots else ()):
            entries[index] = {}
            for slot in slots:
                value = state[f"optimizer.{name}.{slot}"]
                # In the parameter's own memory format: the fused optimizers walk both in storage order.
                twin = torch.empty_like(parameter if value.shape == parameter.shape else value)
                entries[index][slot] = twin.copy_(value)
        self._optimizer.load_state_dict({"state": entries, "param_groups": groups})
        self.round = int(state["round"])

    def save(self, path: Path) -> None:
        """Write the state as one safetensors file, replacing ``path`` in one move.

        Raises:
            ServerError: the file cannot be written.
        """
        metadata = {"format": "psgl-trainer", "version": "1", "optimizer": self._optimizer_name}
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_bytes(safetensors.torch.save(self.state_dict(), metadata))
            partial.replace(path)
        except OSError as exc:
            raise ServerError(f"the trainer's state cannot be written to {path}: {exc.strerror}") from exc

    def load(self, path: Path) -> None:
        """Continue from a file that `save` wrote.

        Raises:
            ModelError: no such file, a damaged one, or the state of another model.
        """
        try:
            state = safetensors.torch.load(path.read_bytes())
        except OSError as exc:
            raise ModelError(f"the trainer's state cannot be read from {path}: {exc.strerror}") from exc
        except safetensors.SafetensorError as exc:
            raise ModelError(f"{path} is damaged or no safetensors file ({exc}): use another snapshot") from exc
        self.load_state_dict(state)

    def _probe(self, cut: tuple[int, ...]) -> None:
        """Learn the number of classes, and that the back networks take this cut."""
        channels, sizes = self.streams.channels, self.streams.spatial_dims
        if len(cut) != 1 + sizes or cut[0] != channels or min(cut) < 1:
            raise ServerError(f"the cut is {cut}: give {channels} channels and {sizes} spatial sizes")
        self.streams.eval()
        try:
            with torch.inference_mode():
                logits = self.streams(torch.zeros((1, *cut), device=self._device))
                _ = fuse(logits, self._base_weights)
        except RuntimeError as exc:
            detail = " ".join(str(exc).split())
            raise ServerError(f"the back network does not take activations of {cut}: {detail}") from exc
        self.cut = cut
        self.classes = int(next(iter(logits.values())).shape[-1])

    def _activations(self, activations: NDArray[np.float32]) -> Tensor:
        shape = activations.shape
        if not self.cut and activations.ndim > 1 and len(activations):
            self._probe(shape[1:])
        if activations.dtype != np.float32 or shape[1:] != self.cut or shape[:1] in ((), (0,)):
            cut = ", ".join(map(str, self.cut))
            raise ServerError(f"activations are {activations.dtype} {shape}: send float32 (N, {cut}), N at least 1")
        if not np.isfinite(activations).all():
            raise ServerError("activations hold NaN or infinity: refuse the batch, the front has diverged")
        owned = activations if activations.flags.writeable else activations.copy()
        return torch.from_numpy(owned).to(self._device, memory_format=self._format)

    def _labels(self, labels: NDArray[np.int64], samples: int) -> Tensor:
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (samples,):
            raise ServerError(f"labels are {labels.dtype} {labels.shape}: send int64 ({samples},)")
        if labels.min() < 0 or labels.max() >= self.classes:
            raise ServerError(
                f"labels are from {labels.min()} to {labels.max()}: send classes from 0 to {self.classes - 1}"
            )
        return torch.from_numpy(labels.astype(np.int64)).to(self._device)

    def _gradient(self, inputs: Tensor, losses: Sequence[float]) -> NDArray[np.float32]:
        if not all(math.isfinite(loss) for loss in losses):
            raise TrainingError(f"the losses are {losses}: lower the learning rate, or go back to a snapshot")
        if inputs.grad is None:
            raise TrainingError("the loss does not depend on the activations: check the back network")
        sums = [each.grad.sum() for each in self._parameters.values() if each.grad is not None]
        if not math.isfinite(float(torch.stack([*sums, inputs.grad.sum()]).sum())):
            raise TrainingError("a gradient is not finite: lower the learning rate, or go back to a snapshot")
        gradient: NDArray[np.float32] = inputs.grad.contiguous().cpu().numpy()
        return gradient


def _loss(logits: Tensor, targets: Tensor, weights: NDArray[np.float32] | None) -> Tensor:
    if weights is None:
        return nn.functional.cross_entropy(logits, targets)
    each = nn.functional.cross_entropy(logits, targets, reduction="none")
    return (each * torch.from_numpy(weights).to(each.device)).mean()


def _through(streams: Streams, gradient_from: str) -> tuple[str, ...]:
    if gradient_from not in ("fused", "all"):
        raise ServerError(f"gradient_from is '{gradient_from}': use 'fused' or 'all'")
    if gradient_from == "all" or len(streams.names) == 1:
        return streams.names
    if "fused" not in streams.names:
        raise ServerError(f"gradient_from is 'fused', the streams are {', '.join(streams.names)}: use 'all'")
    return ("fused",)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ServerError(f"there is no device '{name}': use cpu, cuda or cuda:<index>") from exc
    if device.type not in ("cpu", "cuda"):
        raise ServerError(f"device '{name}' is not supported: use cpu, cuda or cuda:<index>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ServerError(f"device '{name}' is not there, torch sees {torch.cuda.device_count()} GPUs: use cpu")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _optimizer(name: str, parameters: list[nn.Parameter], rate: float, momentum: float) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(parameters, lr=rate, fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=momentum, fused=True)
    raise ServerError(f"there is no optimizer '{name}': use 'adam' or 'sgd'")
