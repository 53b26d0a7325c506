"""How much a device's activations can tell about a sample at most, in bits."""

from __future__ import annotations

import math

from edge_sdk.bundle import Manifest

__all__ = ["bits_per_sample"]

_MOST_RATIO = 1e100  # beyond it a square overflows, and nothing worth the name is bounded
_RANGE_BITS = 64  # of low and high, which a message with a range of its own carries for all of its samples


def bits_per_sample(manifest: Manifest) -> float | None:
    """An upper bound on the information about one sample in the activations that one send of it carries.

    Bounded activations behind Gaussian noise are a channel of n real inputs of power at most bound^2, whose capacity is
    n/2 x log2(1 + bound^2 / noise^2) bits (Cover and Thomas, Elements of Information Theory, 2nd ed., theorem 9.1.1).
    Packing comes after the noise, so it can only take away (data processing inequality), and n values of b bits never
    say more than n x b bits; where each message has a range of its own, its two ends are 64 bits more. The bound holds
    for whoever knows everything but the sample and the noise. It says nothing of the labels, which training sends too.

    Sends add up where the noise is another or the front is; the same sample under the same front has the same noise and
    gives the same bytes, which tell nothing new.

    Returns:
        Bits, or None where nothing bounds them: floats without noise, without a bound, or with Laplace noise.
    """
    values = math.prod(manifest.cut_shape)
    bounds = []
    ratio = manifest.bound / manifest.noise if manifest.noise > 0 else 0.0
    if 0 < ratio < _MOST_RATIO and manifest.noise_kind == "gaussian":
        bounds.append(values / 2 * math.log1p(ratio**2) / math.log(2))
    if manifest.bits:
        bounds.append(float(values * manifest.bits) + (_RANGE_BITS if manifest.span is None else 0))
    return min(bounds, default=None)
