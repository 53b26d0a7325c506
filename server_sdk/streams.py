"""The server's networks: one back network for each view of the activations (attacked, recovered, fused)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from server_sdk.errors import ModelError, ServerError
from server_sdk.recovery import Method, recover

__all__ = ["STREAMS", "FusedStream", "FusionConvolution", "Streams", "seeded"]

STREAMS = ("attacked", "recovered", "fused")
"""Every stream there is, in the order in which they are listed everywhere."""

_COUNTER = "num_batches_tracked"


class FusionConvolution(nn.Module):
    """Convolution-sum fusion of attacked and recovered activations: ``ReLU(BN(conv3([A; R]))) + A``.

    Args:
        channels: C, of A and of R each.
        spatial_dims: 1 (signals) or 2 (images).
    """

    def __init__(self, channels: int, spatial_dims: Literal[1, 2] = 2) -> None:
        super().__init__()
        convolution = nn.Conv1d if spatial_dims == 1 else nn.Conv2d
        normalisation = nn.BatchNorm1d if spatial_dims == 1 else nn.BatchNorm2d
        self.conv = convolution(2 * channels, channels, 3, padding=1, bias=False)
        self.bn = normalisation(channels)

    def forward(self, activations: Tensor, recovered: Tensor) -> Tensor:
        """(N, C, \\*S) twice -> (N, C, \\*S)."""
        both = torch.cat((activations, recovered), dim=1)
        return torch.relu(self.bn(self.conv(both))) + activations


class FusedStream(nn.Module):
    """A back network behind a `FusionConvolution`."""

    def __init__(self, back: nn.Module, channels: int, spatial_dims: Literal[1, 2]) -> None:
        super().__init__()
        self.fusion = FusionConvolution(channels, spatial_dims)
        self.back = back

    def forward(self, activations: Tensor, recovered: Tensor) -> Tensor:
        """(N, C, \\*S) twice -> logits (N, K)."""
        logits: Tensor = self.back(self.fusion(activations, recovered))
        return logits


class Streams(nn.Module):
    """The streams of one model.

    Stream ``attacked`` is a back network fed with the activations A as they came, ``recovered`` one fed with
    what `recover` makes of them, ``fused`` one behind a `FusionConvolution` of both. No weight is shared.
    Each stream is initialised from (seed, its name), so its initial weights do not depend on which others are
    there, and the global random generator is left as it was. Names in the state: ``attacked.<name>``,
    ``recovered.<name>``, ``fused.fusion.conv.weight``, ``fused.fusion.bn.<name>``, ``fused.back.<name>``.

    In-place layers of a back are made out-of-place: an in-place first layer would change what the others see.

    Args:
        back_factory: makes one back network, (N, C, \\*S) -> logits (N, K), with new weights at each call,
            drawn from torch's generator: one that seeds itself gives all streams the same initial weights.
        channels: C at the cut.
        spatial_dims: 1 (signals), 2 (images) or 0 (a vector, for the stream ``attacked`` alone: a vector has one
            singular value, and recovery would only scale it).
        names: which streams, a subset of `STREAMS`; the order given does not matter.
        threshold: of `recover`, in [0, 1].
        seed: at least 0.
        recovery_method: of `recover`.
        recovered_view: what the streams take as recovered: the ``residual`` R = A - M or the ``trace`` M.
        recovered_over: the matrix that is decomposed: each ``sample`` by itself, (C, prod(S)), or the whole ``batch``,
            (N * C, prod(S)), for comparison: then a sample's result depends on its batch-mates.

    Raises:
        ServerError: an unknown stream or option.
        ModelError: a factory whose networks share weights, or a vector with another stream than ``attacked``.
    """

    def __init__(
        self,
        back_factory: Callable[[], nn.Module],
        channels: int,
        spatial_dims: Literal[0, 1, 2],
        names: Sequence[str] = STREAMS,
        threshold: float = 0.1,
        seed: int = 0,
        *,
        recovery_method: Method = "gram",
        recovered_view: Literal["residual", "trace"] = "residual",
        recovered_over: Literal["sample", "batch"] = "sample",
    ) -> None:
        super().__init__()
        for name in names:
            if name not in STREAMS:
                raise ServerError(f"there is no stream '{name}': use some of {', '.join(STREAMS)}")
        if not names:
            raise ServerError(f"no stream is named: use some of {', '.join(STREAMS)}")
        if channels < 1 or spatial_dims not in (0, 1, 2) or seed < 0:
            raise ServerError(
                f"channels is {channels}, spatial_dims {spatial_dims}, seed {seed}: "
                "give at least 1 channel, 0 to 2 dimensions and a seed of at least 0"
            )
        if spatial_dims == 0 and set(names) != {"attacked"}:
            raise ModelError(
                f"activations that are vectors have no recovery, which {', '.join(names)} would need: "
                "use the stream attacked alone, or a cut with spatial axes"
            )
        if recovered_view not in ("residual", "trace"):
            raise ServerError(f"recovered_view is '{recovered_view}': use 'residual' or 'trace'")
        if recovered_over not in ("sample", "batch"):
            raise ServerError(f"recovered_over is '{recovered_over}': use 'sample' or 'batch'")
        self.names = tuple(name for name in STREAMS if name in names)
        self.channels = channels
        self.spatial_dims = spatial_dims
        self.threshold = threshold
        self.seed = seed
        self.recovery_method: Method = recovery_method
        self.recovered_view = recovered_view
        self.recovered_over = recovered_over
        for name in self.names:
            with seeded(seed, STREAMS.index(name)):
                back = back_factory()
                for layer in back.modules():
                    if hasattr(layer, "inplace"):
                        setattr(layer, "inplace", False)  # noqa: B010
                stream = FusedStream(back, channels, spatial_dims) if name == "fused" and spatial_dims else back
            self.add_module(name, stream)
        parameters = list(self.parameters(recurse=True))
        if len(parameters) != sum(len(list(stream.parameters())) for stream in self.children()):
            raise ModelError("the back networks share weights: let back_factory make a new one at each call")

    def forward(self, activations: Tensor, *, through: Collection[str] | None = None) -> dict[str, Tensor]:
        """Logits of every stream.

        Args:
            activations: A, (N, C, \\*S) float32 or float64, finite.
            through: the streams whose gradient reaches A; the others see A (and R) detached. None: all.

        Returns:
            stream -> logits (N, K), in the order of `names`.

        Raises:
            ServerError: activations that `recover` refuses.
        """
        views: dict[str, tuple[Tensor, ...]] = {"attacked": (activations,)}
        if self.names != ("attacked",):
            together = self.recovered_over == "batch" and len(activations) > 0
            matrices = activations.flatten(0, 1).unsqueeze(0) if together else activations
            split = recover(matrices, threshold=self.threshold, method=self.recovery_method)
            recovered = split.recovered if self.recovered_view == "residual" else split.trace
            recovered = recovered.reshape(activations.shape)
            views |= {"recovered": (recovered,), "fused": (activations, recovered)}
        logits: dict[str, Tensor] = {}
        for name in self.names:
            inputs = views[name]
            if through is not None and name not in through:
                inputs = tuple(view.detach() for view in inputs)
            logits[name] = getattr(self, name)(*inputs)
        return logits

    def load_back(self, state: Mapping[str, Tensor]) -> None:
        """Copy initial back weights into the FIRST stream (``attacked`` where there is one).

        The other streams keep their own initialisation, so that the streams differ from the first step on.

        Args:
            state: the back network's state, all of it (``conv3.weight``, ...).

        Raises:
            ModelError: names or shapes that are not this back network's.
        """
        first = getattr(self, self.names[0])
        back = first.back if isinstance(first, FusedStream) else first
        known = {name: tuple(value.shape) for name, value in back.state_dict().items()}
        known = {name: shape for name, shape in known.items() if name in state or not name.endswith(_COUNTER)}
        given = {name: tuple(value.shape) for name, value in state.items()}
        if given != known:
            wrong = ", ".join(sorted({name for name, _ in given.items() ^ known.items()})[:5])
            raise ModelError(f"not the weights of this back network ({wrong}): use those beside the bundle")
        back.load_state_dict(state, strict=False)


@contextmanager
def seeded(*entropy: int, device: torch.device | None = None) -> Iterator[None]:
    """Draw from a generator seeded with ``entropy`` (integers of at least 0); all is restored afterwards.

    Args:
        entropy: what the seed is derived from.
        device: a CUDA device whose generator is seeded as well.
    """
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for each in devices:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield
