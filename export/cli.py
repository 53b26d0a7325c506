"""psgl-export: make bundles from the command line."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_sdk.batch import load_dataset
from edge_sdk.console import add_debug, new_parser, require, run
from edge_sdk.errors import ConfigError

__all__ = ["main"]

_MOST_NOISE = 1e3
_EXAMPLES = """\
  psgl-export build --data guide.npz --profile paper -o net.psgl
  psgl-export build --data ecg.npz --signal --input-range -400 400 -o ecg.psgl       (int16 in a sensor's units)
  psgl-export build --data guide.npz --profile vanilla -o plain.psgl --seed 3
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``psgl-export``; returns the exit code."""
    parser = new_parser("psgl-export", "Make bundles of ONNX graphs that train on a device.", _EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    build = commands.add_parser(
        "build",
        help="export the reference network for the samples of a data file",
        description="Fit a guide on the training samples of a data file and export the reference network for "
        "their shape. Use samples that no device holds: a guide must never see what it perturbs.",
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("--data", type=Path, required=True, help=".npz with x_train, y_train, x_test, y_test")
    build.add_argument(
        "--profile",
        choices=("vanilla", "gaussian", "laplace", "quantised", "paper", "hardened"),
        default="paper",
        help="(default %(default)s)",
    )
    build.add_argument("-o", "--out", type=Path, required=True, help="bundle to write; the back's weights go beside it")
    build.add_argument("--epsilon", type=float, help="budget of the perturbation in [0, 1] (default: the profile's)")
    build.add_argument("--noise", type=float, help="standard deviation on the activations (default: the profile's)")
    build.add_argument("--seed", type=int, default=0, help="of guide and initial weights (default %(default)s)")
    build.add_argument("--signal", action="store_true", help="the samples are signals (N, T) or (N, C, T), not images")
    build.add_argument(
        "--input-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="for samples in a sensor's own units (signed integers): the values that become 0 and 1 "
        "(default: the file's input_range, else the 0.1 and 99.9 percentiles of its training samples)",
    )
    add_debug(build)
    arguments = parser.parse_args(argv)
    return run(lambda: _build(arguments), debug=getattr(arguments, "debug", False))


def _build(arguments: argparse.Namespace) -> int:
    require("export", "torch", "onnx", "onnxscript", "rich")
    if arguments.epsilon is not None and not 0 <= arguments.epsilon <= 1:
        raise ConfigError("--epsilon is 0 to 1, in units of the input's range")
    if arguments.noise is not None and not 0 <= arguments.noise <= _MOST_NOISE:
        raise ConfigError(f"--noise is 0 to {_MOST_NOISE:g}")
    if arguments.seed < 0:
        raise ConfigError("--seed must be at least 0")
    given = arguments.input_range
    if given is not None and not (all(map(math.isfinite, given)) and given[0] < given[1]):
        raise ConfigError("--input-range is two numbers, the lower one first")
    dataset = load_dataset(arguments.data, signal=arguments.signal or None)
    for note in dataset.notes:
        print(f"note: {note}", file=sys.stderr)
    # torch takes seconds to import: only once the options are known to be good.
    from rich.console import Console

    from export.build import BuildOptions, build_bundle, class_names, measured_range, prepare_guide

    input_range = dataset.input_range if given is None else (given[0], given[1])
    if input_range is None and (input_range := measured_range(dataset.train)):
        print(
            f"note: sensor values {input_range[0]:g} to {input_range[1]:g} become 0 to 1, the 0.1 and 99.9 percentiles "
            "of the training samples (--input-range sets others)",
            file=sys.stderr,
        )

    status = Console(stderr=True).status
    with status(f"fitting the guide on {len(dataset.train)} samples"):
        guide = prepare_guide(dataset.train, dataset.classes, seed=arguments.seed, input_range=input_range)
    with status("exporting and checking the graphs"):
        options = BuildOptions(
            arguments.profile,
            dataset.input_shape,
            class_names(dataset.classes),
            seed=arguments.seed,
            epsilon=arguments.epsilon,
            noise=arguments.noise,
            input_range=input_range,
        )
        built = build_bundle(arguments.out, options, guide)
    print(
        f"{built.bundle}  {built.bundle.stat().st_size / 1e3:.0f} KB, id {built.bundle_id}: for devices and server\n"
        f"{built.back}  initial weights of the back: for the server\n"
        f"graphs agree with torch to {built.worst_error:.1g} (relative)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
