"""Which model ``psgl-export build`` builds: the profile's, or one of your own by its name."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.dataset import Dataset
from edge_sdk.errors import ConfigError

if TYPE_CHECKING:
    from export.options import BuildOptions

__all__ = ["add_model", "model_options", "shape_and_classes"]

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_OF_A_MODEL = ("cut", "argument", "weights", "back", "code")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the positional MODEL and the options that go with it."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="module:name of a model of yours, a class or a function that is called without arguments but for "
        "--argument, found in this folder or installed; or a reference model of psgl-export models (default: the "
        "profile's network)",
    )
    group = parser.add_argument_group("a model of your own (its code is run here, and by psgl-server --allow-model)")
    group.add_argument("--cut", metavar="LAYER", help="the front's last layer or block: relu2, features.2, layer2")
    group.add_argument(
        "--argument", action="append", metavar="NAME=VALUE", help="of the model, a JSON value (may be repeated)"
    )
    group.add_argument("--weights", type=Path, metavar="FILE", help="safetensors file of its state, to begin with")
    group.add_argument("--input", metavar="CxHxW", help="shape of a sample, CxT for a signal (default: the data's)")
    group.add_argument("--classes", type=int, help="number of classes (default: the data's)")
    group.add_argument("--guide", metavar="MODULE:NAME", help="guide network of yours (default: the reference guide)")
    group.add_argument(
        "--code", type=int, metavar="VALUES", help="profile hardened: values of the code behind the front (default 32)"
    )
    group.add_argument(
        "--back",
        metavar="MODULE:NAME",
        help="profile hardened: back for the code, called with code= and classes= "
        "(default: the model's layers behind the cut, which a linear layer leads to)",
    )


def shape_and_classes(arguments: argparse.Namespace, dataset: Dataset | None) -> tuple[tuple[int, ...], int]:
    """Shape of a sample and number of classes, as options and data say.

    Raises:
        ConfigError: neither says, they contradict each other, or an option is none.
    """
    shape = None if arguments.input is None else _shape(arguments.input)
    if dataset is None:
        if shape is None or arguments.classes is None:
            raise ConfigError("without --data, give --input and --classes")
        if arguments.classes < 2:
            raise ConfigError("--classes must be at least 2")
        return shape, arguments.classes
    if shape is not None and shape != dataset.input_shape:
        says = "x".join(map(str, dataset.input_shape))
        raise ConfigError(f"--input says {arguments.input}, but the samples of {arguments.data} are {says}")
    if arguments.classes not in (None, dataset.classes):
        raise ConfigError(f"--classes says {arguments.classes}, but {arguments.data} has {dataset.classes}")
    return dataset.input_shape, dataset.classes


def model_options(
    arguments: argparse.Namespace, input_shape: tuple[int, ...], classes: tuple[str, ...], **further: Any
) -> BuildOptions:
    """The options of the bundle: of MODEL, or of the profile's network.

    From now on modules are found in the current folder too, as with ``python -m``.

    Args:
        further: fields of ``BuildOptions``.

    Raises:
        ConfigError: options that contradict each other.
    """
    from dataclasses import replace

    from export.options import BuildOptions
    from export.own import own_options
    from server_sdk.reference.specification import ModelSpec

    for option in ("guide", "back"):
        name = getattr(arguments, option)
        if name is not None and not _NAME.fullmatch(name):
            raise ConfigError(f"--{option} is {name!r}: give module:name, for instance my_module:MyGuide")
    if arguments.code is not None and arguments.code < 1:
        raise ConfigError("--code must be at least 1")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if arguments.model is None:
        for option in _OF_A_MODEL:
            if getattr(arguments, option) is not None:
                raise ConfigError(f"--{option} is for a model of your own: name it, for instance my_module:MyNet")
        options = BuildOptions(arguments.profile, input_shape, classes, **further)
        if arguments.guide is None:
            return options
        return replace(options, guide=ModelSpec(arguments.guide), allow_models=(arguments.guide,))
    return own_options(
        arguments.model,
        arguments.cut,
        input_shape,
        classes,
        profile=arguments.profile,
        arguments=_arguments(arguments.argument or []),
        weights=arguments.weights,
        guide=arguments.guide,
        code=32 if arguments.code is None else arguments.code,
        back=arguments.back,
        **further,
    )


def _shape(text: str) -> tuple[int, ...]:
    sizes = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?", text)
    shape = tuple(int(size) for size in sizes.groups() if size is not None) if sizes else ()
    if not shape or min(shape) < 1:
        raise ConfigError(f"--input is {text!r}: give CxHxW, for instance 1x28x28, or CxT for a signal")
    return shape


def _arguments(pairs: list[str]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        try:
            found[name] = json.loads(text)
        except ValueError:
            equals = ""
        if not equals or not name.isidentifier():
            raise ConfigError(
                f"--argument is {pair!r}: give name=value, a JSON value such as 16, true, [1, 2] or '\"a\"'"
            )
    return found
