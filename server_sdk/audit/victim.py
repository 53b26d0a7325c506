"""What is attacked: the device's own graphs with the defence on, as whoever reads the wire meets them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from edge_sdk.batch import as_batch
from edge_sdk.bundle import Bundle
from edge_sdk.codec import compress, expand
from edge_sdk.front import Forward, Front, FrontState
from edge_sdk.noise import KEY_BYTES
from server_sdk.errors import ModelError

__all__ = ["Victim"]

Array = npt.NDArray[np.float32]


class Victim:
    """A device that can be asked at will; the foe knows bundle and front, and so can ask a device of its own.

    Args:
        bundle: of the device.
        front: its tensors, trained or as shipped.
        codec: of the activations on the wire, ``float32`` or ``float16``, unless the bundle packs them into few bits.
        key: of its noise, 32 bytes: the foe does not have the victim's.

    Raises:
        BundleError: this onnxruntime cannot run the bundle.
        ModelError: a front that is not the bundle's.
    """

    def __init__(
        self, bundle: Bundle, front: FrontState, *, codec: str = "float16", key: bytes = bytes(KEY_BYTES)
    ) -> None:
        shapes = {name: tensor.shape for name, tensor in front.tensors.items()}
        if shapes != {name: tensor.shape for name, tensor in bundle.initial.items()}:
            raise ModelError("the front is not of this bundle: audit a front with the bundle that it was trained from")
        self._bundle = bundle
        self._front = Front(bundle, noise_key=key)
        self._state = front
        self._codec = codec

    @property
    def bundle(self) -> Bundle:
        """The device's bundle."""
        return self._bundle

    def send(
        self,
        x: npt.NDArray[np.generic],
        *,
        epsilon: float | None = None,
        noise: float | None = None,
        sends: int = 1,
    ) -> Array:
        """The activations that the server decodes when the device asks for decisions on these samples.

        Args:
            x: (N, *input_shape), as ``as_batch`` takes it, N at least 1.
            epsilon: in place of the bundle's budget; 0 leaves the perturbation out.
            noise: in place of the bundle's; 0 leaves it out, and nothing else: what is packed stays packed.
            sends: each sample is sent so often, under as many versions of a front whose weights stay; the mean is
                returned. A frozen front has one version, under which all sends of a sample are the same: there it is
                supposed that the sample came again a little changed each time, as the beats of a heart do.

        Where the bundle packs without a ``span``, the range is that of ``max_batch`` samples, sent together.

        Returns:
            float32 (N, *cut_shape).

        Raises:
            BatchError: samples that the bundle does not take.
        """
        total = self._once(x, epsilon, noise, 0)
        for later in range(1, sends):
            total = total + self._once(x, epsilon, noise, later)
        return total / np.float32(sends)

    def activations(self, x: npt.NDArray[np.generic]) -> Array:
        """What the front computes, before noise and wire; the perturbation is on.

        Args:
            x: as in ``send``.

        Returns:
            float32 (N, *cut_shape).

        Raises:
            BatchError: samples that the bundle does not take.
        """
        return np.concatenate([forward.activations for forward in self._forward(x, None, 0.0)])

    def alone(self, x: npt.NDArray[np.generic]) -> Array | None:
        """What the device's own guide says where there is no server.

        Args:
            x: as in ``send``.

        Returns:
            Logits, float32 (N, K), or None where the bundle has no guide.

        Raises:
            BatchError: samples that the bundle does not take.
        """
        if not self._bundle.manifest.decides_alone:
            return None
        said = [self._front.guide(forward) for forward in self._forward(x, None, None)]
        return np.concatenate([logits for logits in said if logits is not None])

    def perturb(self, x: npt.NDArray[np.generic]) -> tuple[Array, Array]:
        """What the device makes of its inputs before the front.

        Args:
            x: as in ``send``.

        Returns:
            The attacked inputs and the normalised maps, float32 (N, *input_shape); zeros where the profile has none.

        Raises:
            BatchError: samples that the bundle does not take.
        """
        done = [(each.perturbed, each.map) for each in self._forward(x, None, 0.0)]
        moved = [np.zeros_like(perturbed) if made is None else made for perturbed, made in done]
        return np.concatenate([perturbed for perturbed, _ in done]), np.concatenate(moved)

    def _once(self, x: npt.NDArray[np.generic], epsilon: float | None, noise: float | None, later: int) -> Array:
        parts = []
        packing = self._bundle.manifest.packing
        for forward in self._forward(x, epsilon, noise, later):
            if packing is not None:
                parts.append(packing.apply(forward.activations))
                continue
            sent, scale = compress(forward.activations, self._codec)
            parts.append(expand("activations", sent, scale))
        return np.concatenate(parts)

    def _forward(
        self, x: npt.NDArray[np.generic], epsilon: float | None, noise: float | None, later: int = 0
    ) -> Iterator[Forward]:
        manifest = self._bundle.manifest
        version = self._state.version + later
        state = FrontState(version, self._state.tensors)
        for start in range(0, len(x), manifest.max_batch):
            batch = as_batch(
                x[start : start + manifest.max_batch],
                manifest.input_shape,
                max_batch=manifest.max_batch,
                input_range=manifest.input_range,
            )
            yield self._front.forward(state, batch, None, training=False, epsilon=epsilon, noise=noise)
