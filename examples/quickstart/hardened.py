"""How the demo trains the hardened front: the profile's own recipe, cut to what a demonstration may take."""

from __future__ import annotations

from dataclasses import replace

from export.harden import Recipe
from export.options import BuildOptions
from export.prepare import recipe_of

__all__ = ["recipe_within"]

_STEPS = 1600
_BATCHES = (16, 64)
_PIXELS = _STEPS * _BATCHES[1] * 28 * 28  # that all steps together see at most


def recipe_within(options: BuildOptions, steps: int | None) -> Recipe:
    """The recipe of these options within a minute or so on two cores, whatever the size of the images.

    Without the teachers of two classes, which take longer than the front itself.

    Args:
        options: of the hardened bundle.
        steps: of the optimizer; None: as many as the time allows, at most 1,600.
    """
    pixels = options.input_shape[1] * options.input_shape[2]
    batch = min(max(_PIXELS // (_STEPS * pixels), _BATCHES[0]), _BATCHES[1])
    within = max(min(_PIXELS // (batch * pixels), _STEPS), 1)
    return replace(recipe_of(options), teacher=0.0, batch=batch, steps=within if steps is None else steps)
