"""Cut a network in two: the layers up to the cut run on the device, the rest on the server."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from server_sdk.errors import ModelError

__all__ = ["split"]


def split(model: nn.Sequential, cut: str) -> tuple[nn.Sequential, nn.Sequential]:
    """Split behind the layer named ``cut``.

    Both halves hold the model's own layers under their own names, not copies.

    Args:
        model: named children in processing order.
        cut: name of the front's last layer, for instance ``relu2``.

    Returns:
        (front, back).

    Raises:
        ModelError: ``model`` is not sequential, has no such layer, or ``cut`` is its last one.
    """
    if not isinstance(model, nn.Sequential):
        raise ModelError(f"a {type(model).__name__} cannot be split: give a torch.nn.Sequential of named layers")
    layers = list(zip(model._modules, model, strict=True))  # named_children would skip a layer that is used twice
    names = [name for name, _ in layers]
    if cut not in names[:-1]:
        raise ModelError(f"no layer {cut!r} to cut behind: the layers are {', '.join(names[:-1])}")
    border = names.index(cut) + 1
    return nn.Sequential(OrderedDict(layers[:border])), nn.Sequential(OrderedDict(layers[border:]))
