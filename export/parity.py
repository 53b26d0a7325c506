"""Do the exported graphs compute what torch computes? Checked on every export, before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor, nn

from export.errors import ExportError
from export.graphs import GraphSet, Optimizer
from server_sdk.reference.perturbation import Perturbation, front_input, perturb

__all__ = ["TOLERANCE", "check_parity"]

TOLERANCE = 2e-3
_BATCH = 5
_ROUNDINGS = 10.0
_MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}  # as torch.optim.Adam calls them
_EVERYWHERE = np.array(True)


def check_parity(
    graphs: GraphSet,
    front: nn.Module,
    guide: nn.Module | None,
    input_shape: Sequence[int],
    perturbation: Perturbation | None,
    downsample: int,
    optimizer: Optimizer,
    noise: bool = False,
    vectors: Mapping[str, npt.NDArray[Any]] | None = None,
) -> float:
    """Run every graph beside plain torch (autograd and torch.optim) on one random batch, or on what a bundle records.

    Of a frozen front that is the inference alone, and a guide that only decides.

    Args:
        vectors: what is given to the graphs in place of a random batch, by the input's name.

    Returns:
        The largest difference, relative to the largest element of the output that it belongs to.

    Raises:
        ExportError: a graph is off by more than ``TOLERANCE``.
    """
    generator = torch.Generator().manual_seed(1)
    fixed = {} if vectors is None else {name: torch.from_numpy(array.copy()) for name, array in vectors.items()}
    x = fixed.get("x", torch.rand(_BATCH, *input_shape, generator=generator))
    label = torch.full((len(x),), -1)
    given: dict[str, npt.NDArray[Any]] = {
        **graphs.tensors,
        **{name: value.numpy() for name, value in fixed.items()},
        "x": x.numpy(),
        "label": label.numpy(),
    }
    seen, shown = x, None
    expected: dict[str, Tensor] = {}
    if perturbation is not None and guide is not None:
        given["epsilon"] = np.array(perturbation.epsilon, np.float32)
        result = perturb(guide, x, label, normalisation=perturbation.normalisation, epsilon=perturbation.epsilon)
        seen, scaled = result.perturbed.detach(), result.map.detach()
        shown = scaled if perturbation.map_channel else None
        expected = {"perturbed": seen, "map": scaled, "guide": result.guide.detach()}
    with torch.no_grad():
        added = torch.zeros_like(copy.deepcopy(front).eval()(front_input(seen, shown, downsample)))
    if noise:
        added = fixed.get("noise", torch.randn(added.shape, generator=generator))
        given["noise"] = added.numpy()

    def forward(name: str, graph: bytes, *, training: bool) -> tuple[dict[str, npt.NDArray[Any]], float]:
        outputs = _run(graph, given)
        twin = copy.deepcopy(front).train(training)
        with torch.no_grad():
            activations = twin(front_input(seen, shown, downsample)) + added
        return outputs, _compare(name, outputs, {**expected, "activations": activations})

    _, worst = forward("infer", graphs.infer, training=False)
    if graphs.guide is not None and guide is not None:
        with torch.no_grad():
            worst = max(worst, _compare("guide", _run(graphs.guide, given), {"guide": guide(x)}))
    if graphs.step is None:
        return worst
    trained, error = forward("train", graphs.step.train, training=True)
    worst = max(worst, error)
    gradient = fixed.get("gradient", torch.randn(trained["activations"].shape, generator=generator))
    rate = float(fixed.get("rate", optimizer.learning_rate))
    given |= {"gradient": gradient.numpy(), "rate": np.array(rate, np.float32), **trained}
    sees = front_input(seen, shown, downsample)
    moments = {name: torch.from_numpy(given[f"s.{name}"].copy()) for name in _MOMENTS if f"s.{name}" in given}
    after, steady = _step(front, sees, gradient, optimizer, rate, moments)
    exact, _ = _step(copy.deepcopy(front).double(), sees.double(), gradient.double(), optimizer, rate, moments)
    rounding = {
        output: float(
            ((value.double() - exact[output]).abs() * torch.from_numpy(steady.get(output, _EVERYWHERE))).max()
        )
        for output, value in after.items()
    }
    prepared = _run(graphs.step.prepare, given)
    outputs = trained | prepared | _run(graphs.step.backward, {**given, **prepared})
    return max(worst, _compare("backward", _apart(outputs, front), after, steady, rounding))


def _apart(outputs: Mapping[str, npt.NDArray[Any]], front: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """With Adam's moments of each parameter by itself: in a row, small gradients would count for nothing."""
    parameters = dict(front.named_parameters())
    ends = np.cumsum([value.numel() for value in parameters.values()])[:-1]
    rows = {moment: outputs[f"next.s.{moment}"] for moment in _MOMENTS if f"next.s.{moment}" in outputs}
    return dict(outputs) | {
        f"next.s.{moment} of {name}": part.reshape(tuple(value.shape))
        for moment, row in rows.items()
        for (name, value), part in zip(parameters.items(), np.split(row, ends), strict=True)
    }


def _step(
    front: nn.Module,
    sees: Tensor,
    gradient: Tensor,
    optimizer: Optimizer,
    rate: float,
    moments: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, npt.NDArray[np.bool_]]]:
    """Weights, statistics and state after one step of torch, and where they do not hang on a rounding error.

    Args:
        moments: Adam's ``m`` and ``v`` before the step, of all parameters in a row.
    """
    twin = copy.deepcopy(front).train()
    stepper: torch.optim.Optimizer = (
        torch.optim.Adam(twin.parameters(), rate, optimizer.betas, optimizer.epsilon)
        if optimizer.kind == "adam"
        else torch.optim.SGD(twin.parameters(), rate, optimizer.momentum)
    )
    if optimizer.kind == "adam":
        sizes = [value.numel() for value in twin.parameters()]
        rows = (torch.split(moments[name].to(gradient.dtype), sizes) for name in _MOMENTS)
        for value, mean, square in zip(twin.parameters(), *rows, strict=True):
            kept = {"exp_avg": mean.reshape(value.shape).clone(), "exp_avg_sq": square.reshape(value.shape).clone()}
            stepper.state[value] = {"step": torch.tensor(0.0), **kept}
    twin(sees).backward(gradient)
    stepper.step()
    after: dict[str, Tensor] = {}
    steady: dict[str, npt.NDArray[np.bool_]] = {}
    for name, value in twin.named_parameters():
        after[f"next.p.{name}"] = value.detach()
        slope = (value.grad if value.grad is not None else torch.zeros_like(value)).abs()
        if optimizer.kind == "adam":
            # From zeros, Adam's first step is the gradient's sign: where that is mere rounding, any sign is right.
            if not moments["v"].any():
                steady[f"next.p.{name}"] = (slope > 1e-3 * slope.max()).numpy()
            for moment, kept_as in _MOMENTS.items():
                after[f"next.s.{moment} of {name}"] = stepper.state[value][kept_as]
        elif optimizer.momentum:
            after[f"next.s.{name}.momentum"] = stepper.state[value]["momentum_buffer"]
    after |= {
        f"next.b.{name}": value for name, value in twin.named_buffers() if not name.endswith("num_batches_tracked")
    }
    return after, steady


def _run(graph: bytes, given: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feed = {one.name: given[one.name] for one in session.get_inputs()}
    return dict(zip([one.name for one in session.get_outputs()], session.run(None, feed), strict=True))


def _compare(
    name: str,
    outputs: Mapping[str, npt.NDArray[Any]],
    expected: Mapping[str, Tensor],
    steady: Mapping[str, npt.NDArray[np.bool_]] | None = None,
    rounding: Mapping[str, float] | None = None,
) -> float:
    worst = 0.0
    for output, value in expected.items():
        reference = value.numpy().astype(np.float64)
        size = max(float(np.abs(reference).max()), 1e-6)
        difference = np.abs(outputs[output] - reference)
        if steady is not None and output in steady:
            difference = difference * steady[output]
        error = float(difference.max()) / size
        if error > TOLERANCE and difference.max() <= _ROUNDINGS * (rounding or {}).get(output, 0.0):
            # Torch's own float32 is as far from float64: of a scale between two norms all the gradient is rounding.
            continue
        if not error <= TOLERANCE:
            raise ExportError(
                f"graph {name!r} differs from torch by {error:.2g} (relative) in {output!r}: "
                "this onnx, onnxscript or torch exports a layer wrongly; use the versions of constraints.txt, or place "
                "what is peculiar in the front behind the cut"
            )
        worst = max(worst, error)
    return worst
