"""How many bits one sample can tell, whatever its reader computes: a bound that follows from the noise at the cut.

Activations that are bounded and carry independent Gaussian noise are a Gaussian channel: n values of at most ``bound``
with noise of standard deviation sigma hold at most n/2 * log2(1 + bound^2 / sigma^2) bits. Source: Cover and Thomas,
"Elements of Information Theory", 2nd edition 2006, chapter 9 (the power constraint follows from the bound). Bits of
repeated sends under other noise add up.
"""

from __future__ import annotations

import math

from edge_sdk.bundle import Manifest

__all__ = ["bits_per_sample"]


def bits_per_sample(manifest: Manifest) -> float | None:
    """Most bits about a sample that its activations tell when they are sent once.

    Returns:
        The bound, or None where there is none: activations without bound, or without noise.
    """
    bound, packed = getattr(manifest, "bound", 0.0), getattr(manifest, "bits", None)
    if not bound > 0 or not manifest.noise > 0:
        return None
    values = math.prod(manifest.cut_shape)
    capacity = values / 2 * math.log2(1 + (bound / manifest.noise) ** 2)
    return min(capacity, float(values * packed)) if packed else capacity
