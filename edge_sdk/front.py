"""The front layers on the device: perturb and forward, backward and optimizer step, as stock onnxruntime sessions.

A front is a function of its state: nothing here keeps parameters (but a view of those of the last call), so that a step
can be committed or forgotten as a whole by whoever keeps the state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edge_sdk.bundle import Bundle
from edge_sdk.errors import BatchError, BundleError, ConfigError
from edge_sdk.noise import KEY_BYTES, draw_noise
from edge_sdk.sessions import open_session

__all__ = ["Forward", "Front", "FrontState"]

_FROZEN = (
    "the bundle's front is frozen, so it cannot be trained: hand samples over with store(), or export a bundle of "
    "another profile"
)
_INNER = ("f.", "r.")  # what the parts of a step hand on to each other: never looked at, so never copied
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FrontState:
    """Everything that training changes on the device.

    Attributes:
        version: number of optimizer steps taken.
        tensors: ``p.*`` parameters, ``b.*`` BatchNorm statistics, ``s.*`` optimizer state, all float32.
    """

    version: int
    tensors: Mapping[str, npt.NDArray[Any]] = field(repr=False)


@dataclass(frozen=True)
class Forward:
    """What the front made of one batch.

    Attributes:
        activations: (N, *cut_shape), what crosses the wire.
        perturbed: (N, *input_shape), the attacked input (the input itself where the profile has no perturbation).
        map: (N, *input_shape), the normalised perturbation, or None.
        guide: (N, K) logits of the guide that steered the perturbation, or None.
        kept: of a training pass, what ``prepare`` and ``backward`` go on with (arrays and onnxruntime's own values).
    """

    activations: Array = field(repr=False)
    perturbed: Array = field(repr=False)
    map: Array | None = field(repr=False)
    guide: Array | None = field(repr=False)
    kept: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def unperturbed(self) -> int:
        """Number of samples whose map is zero everywhere, so that they passed as they are."""
        if self.map is None:
            return len(self.activations)
        return int((~self.map.reshape(len(self.map), -1).any(axis=1)).sum())


class Front:
    """The graphs of a bundle, ready to run; of a bundle with a frozen front only its inference.

    Args:
        bundle: a checked bundle.
        threads: threads of onnxruntime in one graph.
        noise_key: 32 secret bytes (``State.noise_key``), from which a bundle with noise draws it.

    Raises:
        BundleError: this onnxruntime cannot run a graph of the bundle, or one is not as the manifest says.
        ConfigError: a bundle with noise and no key.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 1, noise_key: bytes | None = None) -> None:
        self._bundle = bundle
        if bundle.manifest.noise and noise_key is None:
            raise ConfigError("the bundle adds noise to its activations: give a noise_key, kept secret on the device")
        self._noise_key = noise_key
        self._seen: tuple[Mapping[str, npt.NDArray[Any]], Mapping[str, Any]] | None = None
        stated = bundle.manifest.interfaces
        self._sessions = {
            name: open_session(name, graph, stated.get(name), threads=threads) for name, graph in bundle.graphs.items()
        }
        self._inputs = {name: [i.name for i in s.get_inputs()] for name, s in self._sessions.items()}
        self._outputs = {name: [o.name for o in s.get_outputs()] for name, s in self._sessions.items()}
        missing = {
            name
            for names in self._inputs.values()
            for name in names
            if name[:2] in ("p.", "b.", "s.") and name not in bundle.initial
        }
        if missing:
            raise BundleError(
                f"the bundle's graphs want {sorted(missing)[0]!r}, which it does not hold: export it again"
            )

    def initial_state(self) -> FrontState:
        """The state that the bundle ships."""
        return FrontState(0, dict(self._bundle.initial))

    def forward(
        self,
        state: FrontState,
        x: Array,
        labels: npt.NDArray[np.int64] | None,
        *,
        training: bool,
        epsilon: float | None = None,
        noise: float | None = None,
    ) -> Forward:
        """Perturb a batch, run the front layers and add the noise.

        Args:
            state: parameters and statistics to use.
            x: float32 (N, *input_shape) in [0, 1], as ``as_batch`` gives it.
            labels: int64 (N,), or None: the guide's own decision takes their place.
            training: BatchNorm uses the batch's statistics (True) or the running ones (False).
            epsilon: L-infinity budget in place of the bundle's; 0 switches the perturbation off.
            noise: standard deviation in place of the bundle's; 0 switches the noise off.

        Raises:
            BatchError: onnxruntime refused the batch.
            ConfigError: training with a frozen front.
        """
        if training and self._bundle.manifest.frozen:
            raise ConfigError(_FROZEN)
        strength = self._bundle.manifest.epsilon if epsilon is None else epsilon
        given: dict[str, npt.NDArray[Any]] = {
            "x": x,
            "label": np.full(len(x), -1, np.int64) if labels is None else labels,
            "epsilon": np.array(strength, np.float32),
        }
        if self._bundle.manifest.noise:
            sigma = self._bundle.manifest.noise if noise is None else noise
            given["noise"] = self._noise(state, x, sigma, training=training, epsilon=strength)
        out = self._run("train" if training else "infer", {**self._values(state), **given})
        kept = {"x": x, **out} if training else {}
        return Forward(out["activations"], out.get("perturbed", x), out.get("map"), out.get("guide"), kept)

    def guide(self, forward: Forward) -> Array | None:
        """What the device itself says of a batch: logits (N, K) of the bundle's guide, or None where it has none.

        Args:
            forward: what ``forward`` made of the batch.

        Raises:
            BatchError: onnxruntime refused the batch.
        """
        if forward.guide is not None or "guide" not in self._sessions:
            return forward.guide
        return self._run("guide", {"x": forward.perturbed})["guide"]

    def prepare(self, state: FrontState, forward: Forward) -> Forward:
        """Run the part of the backward pass that needs no gradient, while the gradient is still on its way.

        Args:
            state: the state that the forward pass used.
            forward: of a training pass.

        Returns:
            The same with more to go on with.

        Raises:
            BatchError: onnxruntime refused the arrays.
            ConfigError: the bundle's front is frozen.
        """
        return replace(forward, kept={**forward.kept, **self._run("prepare", {**self._values(state), **forward.kept})})

    def backward(self, state: FrontState, prepared: Forward, gradient: Array, *, rate: float) -> FrontState:
        """Run the rest of the backward pass and one optimizer step.

        Args:
            state: the state that the forward pass used.
            prepared: that forward pass, prepared.
            gradient: (N, *cut_shape), the loss's gradient with respect to the activations.
            rate: learning rate of this step.

        Returns:
            The next state; the given one is not changed.

        Raises:
            BatchError: onnxruntime refused the arrays, or the step would leave a parameter that is not finite.
            ConfigError: the bundle's front is frozen.
        """
        given: dict[str, npt.NDArray[Any]] = {"gradient": gradient, "rate": np.array(rate, np.float32)}
        out = {**prepared.kept, **self._run("backward", {**self._values(state), **prepared.kept, **given})}
        tensors = {name: out.get(f"next.{name}", value) for name, value in state.tensors.items()}
        if not np.isfinite(np.concatenate([value.reshape(-1) for value in tensors.values()])).all():
            raise BatchError("the step would make the front's parameters infinite: lower the learning rate")
        return FrontState(state.version + 1, tensors)

    def _noise(self, state: FrontState, x: Array, sigma: float, *, training: bool, epsilon: float) -> Array:
        shape = self._bundle.manifest.cut_shape
        if not sigma or self._noise_key is None:
            return np.zeros((len(x), *shape), np.float32)
        context = hashlib.blake2b(
            f"{self._bundle.id} {state.version} {training} {epsilon!r}".encode(), digest_size=KEY_BYTES
        )
        for name, tensor in sorted(state.tensors.items()):
            context.update(name.encode() + tensor.tobytes())
        if training:
            context.update(x.tobytes())  # BatchNorm lets a sample's activations depend on its batch
        drawn: Array = np.float32(sigma) * draw_noise(
            self._noise_key, context.digest(), x, shape, self._bundle.manifest.noise_kind
        )
        return drawn

    def _values(self, state: FrontState) -> Mapping[str, Any]:
        """The state's tensors as onnxruntime sees them, not copied; made once as long as the state stays the same."""
        if self._seen is None or self._seen[0] is not state.tensors:
            self._seen = (state.tensors, {name: _as_value(tensor) for name, tensor in state.tensors.items()})
        return self._seen[1]

    def _run(self, name: str, arrays: Mapping[str, Any]) -> dict[str, Array]:
        if name not in self._sessions and self._bundle.manifest.frozen:
            raise ConfigError(_FROZEN)
        try:
            feed = {key: _as_value(arrays[key]) for key in self._inputs[name]}
            values = self._sessions[name].run_with_ort_values(None, feed)
        except KeyError as exc:
            raise BundleError(
                f"the bundle's {name!r} graph wants an input {exc}, which this SDK does not know: upgrade psgl"
            ) from exc
        except Exception as exc:  # onnxruntime raises types of its own native module
            reason = str(exc).strip().splitlines()[0][:160]
            raise BatchError(f"the {name!r} graph refused its input ({reason})") from exc
        return {
            key: value if key[:2] in _INNER else value.numpy()
            for key, value in zip(self._outputs[name], values, strict=True)
        }


def _as_value(array: Any) -> Any:
    return array if isinstance(array, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(np.asarray(array))
