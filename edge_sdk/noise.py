"""Noise for the activations of a batch, drawn from a key that never leaves the device.

A sample's noise depends on the key, the front's version and the sample alone: whoever makes a device send one sample
again and again sees one and the same activations, and cannot average the noise away. Nor does it depend on what else
is in the batch, so that a step which is computed again after a restart is the same step.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ConfigError

__all__ = ["KEY_BYTES", "draw_noise"]

KEY_BYTES = 32
"""Length of a key."""

_PURPOSE = b"psgl noise"  # keeps these digests apart from any other use of the key


def draw_noise(key: bytes, version: int, x: npt.NDArray[np.float32], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Standard normal noise for each sample of a batch.

    The seed of a sample is keyed BLAKE2b (RFC 7693) of the front's version and the sample's bytes; the numbers are
    those of numpy's Philox generator for it. Philox is no cipher: what is secret is the seed.

    Args:
        key: 32 bytes.
        version: of the front, 0 or more.
        x: float32 (N, *input_shape), as the front takes it.
        shape: of one sample's activations.

    Returns:
        float32 (N, *shape).

    Raises:
        ConfigError: a key of another length.
    """
    if len(key) != KEY_BYTES:
        raise ConfigError(f"a noise key has {KEY_BYTES} bytes, this one {len(key)}")
    drawn = np.empty((len(x), math.prod(shape)), np.float32)
    for row, sample in zip(drawn, x, strict=True):
        digest = hashlib.blake2b(key=key, digest_size=16, person=_PURPOSE)
        digest.update(version.to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(sample).tobytes())
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))
        generator.standard_normal(dtype=np.float32, out=row)
    return drawn.reshape(len(x), *shape)
