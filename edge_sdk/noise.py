"""Noise for the activations of a batch, drawn from a key that never leaves the device.

The same activations have the same noise: whoever makes a device send one sample again and again sees one and the same
numbers, and cannot average the noise away. Other activations have other noise, whatever it is that makes them differ
(the sample, a weight, the mode, the budget of the perturbation): two sends that shared their noise would show their
difference without any.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ConfigError

__all__ = ["KEY_BYTES", "NOISE_KINDS", "draw_noise"]

KEY_BYTES = 32
"""Length of a key, and of a context."""

NOISE_KINDS = ("gaussian", "laplace")
"""Distributions that there are."""

_PURPOSE = b"psgl noise"  # keeps these digests apart from any other use of the key


def draw_noise(
    key: bytes, context: bytes, x: npt.NDArray[np.float32], shape: tuple[int, ...], kind: str = "gaussian"
) -> npt.NDArray[np.float32]:
    """Noise of mean 0 and standard deviation 1 for each sample of a batch.

    The seed of a sample is keyed BLAKE2b (RFC 7693) of the context and the sample's bytes; the numbers are those of
    numpy's Philox generator for it. Philox is no cipher: what is secret is the seed.

    Args:
        key: 32 bytes.
        context: 32 bytes that stand for all that the activations depend on beside the sample.
        x: float32 (N, *input_shape), as the front takes it.
        shape: of one sample's activations.
        kind: ``gaussian``, or ``laplace`` (of scale 1/sqrt(2), which has this deviation).

    Returns:
        float32 (N, *shape).

    Raises:
        ConfigError: a key or a context of another length, or another kind.
    """
    if kind not in NOISE_KINDS:
        raise ConfigError(f"there is no noise {kind!r}: use {' or '.join(NOISE_KINDS)}")
    for name, value in (("key", key), ("context", context)):
        if len(value) != KEY_BYTES:
            raise ConfigError(f"a noise {name} has {KEY_BYTES} bytes, this one {len(value)}")
    drawn = np.empty((len(x), math.prod(shape)), np.float32)
    for row, sample in zip(drawn, x, strict=True):
        digest = hashlib.blake2b(key=key, digest_size=16, person=_PURPOSE)
        digest.update(context)
        digest.update(np.ascontiguousarray(sample).tobytes())
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))
        if kind == "gaussian":
            generator.standard_normal(dtype=np.float32, out=row)
        else:
            row[:] = generator.laplace(scale=math.sqrt(0.5), size=row.shape)
    return drawn.reshape(len(x), *shape)
