"""The device's front in torch, for attacks that need a gradient; checked against the device's own graphs."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edge_sdk.front import FrontState
from server_sdk.audit.victim import Victim
from server_sdk.errors import ModelError
from server_sdk.reference.perturbation import front_input
from server_sdk.reference.profiles import ServerPart
from server_sdk.reference.specification import build
from server_sdk.reference.split import split

__all__ = ["Twin"]

Array = npt.NDArray[np.float32]
_TOLERANCE = 1e-3
_PROBES = 4


class Twin:
    """What a victim sends, before noise and wire, differentiable in x.

    The perturbation is the victim's own, from its graph, and passes the gradient on as if it were not there: a ``sign``
    has none of its own. Source: Athalye, Carlini and Wagner, "Obfuscated Gradients Give a False Sense of Security",
    arXiv 1802.00420 (backward pass differentiable approximation).

    Args:
        victim: whose activations these are.
        front: the victim's tensors.
        allow_models: factories outside this SDK that may be imported, which runs their code.

    Raises:
        ModelError: the bundle's model cannot be built, or does not compute what the victim's graph computes.
    """

    def __init__(self, victim: Victim, front: FrontState, *, allow_models: Collection[str] = ()) -> None:
        manifest = victim.bundle.manifest
        part = ServerPart.from_manifest(manifest.server)
        self._victim = victim
        self._front = split(build(part.model, part.seed, allow_models=allow_models), part.model.cut)[0].eval()
        weights = {name[2:]: torch.tensor(value) for name, value in front.tensors.items() if name[:2] in ("p.", "b.")}
        counters = {name for name in self._front.state_dict() if name.endswith("num_batches_tracked")}
        try:
            missing = set(self._front.load_state_dict(weights, strict=False).missing_keys) - counters
        except RuntimeError as exc:
            raise ModelError(f"the front does not fit the bundle's model: {' '.join(str(exc).split())[:200]}") from exc
        if missing:
            raise ModelError(f"the front lacks {sorted(missing)[0]}: export the bundle again")
        self._front.requires_grad_(False)
        self._perturbs = manifest.normalisation is not None
        self._map_channel = self._perturbs and part.map_channel
        self._downsample = part.downsample or self._blocks(manifest.input_shape)
        probes = np.random.default_rng(0).random((_PROBES, *manifest.input_shape), dtype=np.float32)
        with torch.inference_mode():
            mine, theirs = self.send(torch.from_numpy(probes)).numpy(), victim.activations(probes)
        if np.abs(mine - theirs).max() > _TOLERANCE * max(float(np.abs(theirs).max()), 1.0):
            raise ModelError("the bundle's model does not compute what its graph computes: export it again")

    def send(self, x: Tensor) -> Tensor:
        """Float32 (N, *input_shape) in [0, 1] to activations (N, *cut_shape), without noise, codec and packing."""
        seen = front_input(x, None, self._downsample)
        if self._perturbs:
            perturbed, moved = self._victim.perturb(x.detach().numpy())
            shifted = x + (torch.from_numpy(perturbed) - x.detach())
            seen = front_input(shifted, torch.from_numpy(moved) if self._map_channel else None, self._downsample)
        activations: Tensor = self._front(seen)
        return activations

    def _blocks(self, shape: tuple[int, ...]) -> int:
        """The factor of the space-to-depth before the front: of the two there are, the one that its layer takes."""
        first = next((layer for layer in self._front.modules() if isinstance(layer, nn.Conv1d | nn.Conv2d)), None)
        channels = 0 if first is None else first.in_channels
        for factor in (1, 2):
            if channels == shape[0] * factor ** len(shape[1:]) + self._map_channel:
                return factor
        raise ModelError("the front does not begin with a convolution of the input's channels")
