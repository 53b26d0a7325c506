"""``psgl-export build``: samples of a data file become a bundle."""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.console import add_debug, require
from edge_sdk.dataset import Dataset, load_dataset
from edge_sdk.errors import ConfigError
from edge_sdk.signing import SigningKey
from export.model_arguments import add_model, model_options, shape_and_classes

if TYPE_CHECKING:
    from export.build import Built
    from export.harden import Recipe
    from export.prepare import Prepared
    from server_sdk.progress import StageDisplay

__all__ = ["EXAMPLES", "add_build", "build"]

_MOST_NOISE = 1e3
_GUIDE_SHARE = 0.3
_PROFILES = (
    *("hardened", "vanilla", "paper"),
    *("gaussian", "laplace", "nopeek", "adversarial", "lowrank", "quantised"),
)
_RECIPE = ("steps", "strength", "shift", "teacher")
EXAMPLES = """\
  psgl-export build --data open.npz -o net.psgl                       (hardened; some minutes on two cores)
  psgl-export build --data open.npz --steps 500 -o quick.psgl
  psgl-export build --data ecg.npz --signal --input-range -400 400 -o ecg.psgl       (int16 in a sensor's units)
  psgl-export build --data guide.npz --profile paper -o net.psgl
  psgl-export build --data open.npz -o net.psgl --sign-key key.pem
  psgl-export build my_module:MyNet --cut layer2 --data train.npz --profile paper -o net.psgl     (a model of yours)
  psgl-export build my_module:MyNet --argument width=16 --weights net.safetensors --cut features.2 \\
      --input 1x28x28 --classes 10 --profile vanilla -o net.psgl
"""


def add_build(commands: Any) -> None:
    """Add the subcommand to ``psgl-export``."""
    parser = commands.add_parser(
        "build",
        help="make a bundle for the samples of a data file",
        description="Make a bundle of the profile's network, or of any feed-forward torch model, cut behind one of\n"
        "its layers. Train what the profile needs on the training samples of a data file, export the network for\n"
        "their shape, and check the graphs. Profile hardened (the default) trains the front here, so\n"
        "that it sends little beyond the class, and freezes it; what that costs and shows is measured\n"
        "on the file's test samples and printed before the bundle is written. Profile paper fits its\n"
        "guide, which must never see what it perturbs. Use samples that no device holds.",
        epilog="examples:\n" + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument(
        "--data",
        type=Path,
        help=".npz with x_train, y_train, x_test, y_test (may be left out where a profile neither trains nor perturbs)",
    )
    parser.add_argument(
        "--profile",
        choices=_PROFILES,
        default="hardened",
        help="hardened, vanilla (no defence), paper (PSGL as published), or a baseline (default %(default)s)",
    )
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help="bundle to write; the back's weights go beside it"
    )
    parser.add_argument(
        "--sign-key", type=Path, metavar="FILE", help="sign the bundle with this private key (psgl-export keygen)"
    )
    parser.add_argument(
        "--perturb",
        choices=("none", "sign", "max"),
        help="reversed JSMA on the device, with this normalisation (default: the profile's; a front that is trained "
        f"here leaves {_GUIDE_SHARE:.0%}% of the samples to the guide then)",
    )
    parser.add_argument("--epsilon", type=float, help="budget of the perturbation in [0, 1] (default: the profile's)")
    parser.add_argument(
        "--streams",
        nargs="+",
        choices=("attacked", "recovered", "fused"),
        help="what the server trains (default: the profile's; a cut that gives vectors has attacked alone)",
    )
    parser.add_argument(
        "--weight-bits",
        type=int,
        choices=(8, 32),
        default=32,
        help="of a weight in the bundle of a front that is trained here; 8 make it about a quarter as large (default "
        "%(default)s)",
    )
    parser.add_argument(
        "--offline-guide",
        action=argparse.BooleanOptionalAction,
        help="add a small classifier that decides on the device where the server cannot be asked (default: with a "
        "front that is trained here; where the profile perturbs, its guide decides anyway)",
    )
    parser.add_argument("--noise", type=float, help="standard deviation on the activations (default: the profile's)")
    parser.add_argument("--seed", type=int, default=0, help="of training and initial weights (default %(default)s)")
    parser.add_argument("--signal", action="store_true", help="the samples are signals (N, T) or (N, C, T), not images")
    parser.add_argument(
        "--input-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="for samples in a sensor's own units (signed integers): the values that become 0 and 1 "
        "(default: the file's input_range, else the 0.1 and 99.9 percentiles of its training samples)",
    )
    group = parser.add_argument_group("a front that is trained here (default: what suits the samples)")
    group.add_argument("--steps", type=int, help="of the optimizer, 128 samples each")
    group.add_argument("--strength", type=float, help="of the defence beside the cross-entropy")
    group.add_argument("--shift", type=int, help="augmentation: move samples by up to so many cells")
    group.add_argument("--flip", action="store_true", help="augmentation: mirror images left to right")
    group.add_argument("--teacher", type=float, metavar="SHARE", help="of the targets that cross-fitted teachers say")
    group.add_argument("--threads", type=int, help="of torch (default: every core)")
    group.add_argument("--compute", choices=("cpu", "cuda"), default="cpu", help="(default %(default)s)")
    group.add_argument("--no-comparison", action="store_true", help="train no undefended network to compare with")
    add_debug(parser)


def build(arguments: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    require("export", "torch", "onnx", "onnxscript", "rich", "torchmetrics")
    _check(arguments)
    sign_key = None if arguments.sign_key is None else SigningKey(arguments.sign_key)
    dataset = None
    if arguments.data is not None:
        dataset = load_dataset(arguments.data, signal=arguments.signal or None)
    for note in dataset.notes if dataset else ():
        print(f"note: {note}", file=sys.stderr)
    input_shape, classes = shape_and_classes(arguments, dataset)
    # torch takes seconds to import: only once the options are known to be good.
    import torch

    from export.build import build_bundle
    from export.options import class_names, perturbation_of, profile_of
    from export.own import initial_network
    from export.prepare import Prepared, prepare, recipe_of
    from export.trade_off import LEAST_HELD_OUT
    from server_sdk.audit.division import divide
    from server_sdk.progress import StageDisplay

    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    options = model_options(
        arguments,
        input_shape,
        class_names(classes),
        seed=arguments.seed,
        perturb=arguments.perturb,
        epsilon=arguments.epsilon,
        streams=None if arguments.streams is None else tuple(arguments.streams),
        noise=arguments.noise,
        weight_bits=arguments.weight_bits,
        input_range=_input_range(arguments, dataset),
    )
    given = {name: value for name in _RECIPE if (value := getattr(arguments, name)) is not None}
    frozen, perturbed = profile_of(arguments.profile).frozen, perturbation_of(options) is not None
    options = replace(options, offline_guide=not perturbed and _decides_offline(arguments, input_shape, frozen))
    if not frozen and (given or arguments.flip):
        option = next(iter([*given, "flip"]))
        raise ConfigError(f"--{option} is for a front that is trained here; devices train the one of this profile")
    if dataset is None and (frozen or perturbed or options.offline_guide):
        what = "trains its front" if frozen else "fits its guide"
        raise ConfigError(f"profile {arguments.profile} {what} on samples: give --data")
    if frozen and dataset is not None and len(dataset.test) < LEAST_HELD_OUT:
        raise ConfigError(
            f"{arguments.data} has {len(dataset.test)} test samples: what the front shows is measured on them, give at "
            f"least {LEAST_HELD_OUT}"
        )
    recipe = replace(recipe_of(options), flip=arguments.flip, compute=arguments.compute, **given)
    with StageDisplay() as display:
        if dataset is None:
            prepared = Prepared(options, None, initial_network(options))
        else:
            samples, guide_samples = dataset.train, None
            if frozen and perturbed:
                parts = divide(dataset, foe=_GUIDE_SHARE, seed=arguments.seed)
                samples, guide_samples = parts.train, parts.auxiliary
            prepared = prepare(samples, options, recipe, guide_samples=guide_samples, progress=display.step)
        if dataset is None or not frozen:
            display.stage("exporting and checking the graphs")
            built = build_bundle(
                arguments.out, prepared.options, prepared.guide, network=prepared.network, sign_key=sign_key
            )
        else:
            built = _hardened(arguments, dataset, prepared, recipe, display, sign_key)
    print(
        f"{built.bundle}  {built.bundle.stat().st_size / 1e3:.0f} KB, id {built.bundle_id}: for devices and server\n"
        f"{built.back}  {'trained' if frozen else 'initial'} weights of the back: for the server\n"
        f"graphs agree with torch to {built.worst_error:.1g} (relative)"
    )
    return 0


def _hardened(
    arguments: argparse.Namespace,
    dataset: Dataset,
    prepared: Prepared,
    recipe: Recipe,
    display: StageDisplay,
    sign_key: SigningKey | None,
) -> Built:
    """Write the bundle, once it is said what it costs and shows."""
    import tempfile

    from export.build import build_bundle
    from export.prepare import train_undefended
    from export.trade_off import weigh

    options, guide, network = prepared.options, prepared.guide, prepared.network
    allowed = options.allow_models
    plain = None if arguments.no_comparison else train_undefended(dataset.train, options, recipe, progress=display.step)
    display.stage("exporting, checking and attacking the graphs")
    with tempfile.TemporaryDirectory() as folder:
        trial = build_bundle(Path(folder) / "trial.psgl", options, guide, network=network)
        found = weigh(
            trial.bundle,
            dataset.test,
            undefended=plain,
            downsample=options.downsample,
            seed=arguments.seed,
            allow_models=allowed,
        )
    display.note(f"trade-off: {found}")
    return build_bundle(arguments.out, options, guide, network=network, sign_key=sign_key)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.epsilon is not None and not 0 <= arguments.epsilon <= 1:
        raise ConfigError("--epsilon is 0 to 1, in units of the input's range")
    if arguments.noise is not None and not 0 <= arguments.noise <= _MOST_NOISE:
        raise ConfigError(f"--noise is 0 to {_MOST_NOISE:g}")
    if arguments.seed < 0:
        raise ConfigError("--seed must be at least 0")
    for name in ("steps", "threads"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be at least 1")
    given = arguments.input_range
    if given is not None and not (all(map(math.isfinite, given)) and given[0] < given[1]):
        raise ConfigError("--input-range is two numbers, the lower one first")


def _decides_offline(arguments: argparse.Namespace, input_shape: tuple[int, ...], frozen: bool) -> bool:
    """Whether a guide is to decide where there is no server: as told, else with a front that is trained here."""
    from server_sdk.reference.guide import takes_grid

    if arguments.offline_guide is None:
        return frozen and (arguments.guide is not None or takes_grid(input_shape))
    return bool(arguments.offline_guide)


def _input_range(arguments: argparse.Namespace, dataset: Dataset | None) -> tuple[float, float] | None:
    from export.options import measured_range

    if arguments.input_range is not None:
        return arguments.input_range[0], arguments.input_range[1]
    if dataset is None:
        return None
    if dataset.input_range is not None:
        return dataset.input_range
    measured = measured_range(dataset.train)
    if measured:
        print(
            f"note: sensor values {measured[0]:g} to {measured[1]:g} become 0 to 1, the 0.1 and 99.9 percentiles of "
            "the training samples (--input-range sets others)",
            file=sys.stderr,
        )
    return measured
