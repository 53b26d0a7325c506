"""``psgl-export report``: what a bundle asks of a device, as text, JSON and files for a firmware build."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.console import add_debug, add_public_key, public_key_of, require
from edge_sdk.dataset import load_dataset
from edge_sdk.errors import ConfigError

if TYPE_CHECKING:
    from export.report import Report

__all__ = ["EXAMPLES", "add_report", "report"]

EXAMPLES = """\
  psgl-export report net.psgl --out firmware                          (operators, memory, .ort files)
  psgl-export report net.psgl --data open.npz --int8 --out firmware   (and what fewer bits cost in accuracy)
"""


def add_report(commands: Any) -> None:
    """Add the subcommand to ``psgl-export``."""
    parser = commands.add_parser(
        "report",
        help="what a bundle asks of a device",
        description="Say what a bundle asks of a device: operators, multiplications, parameters, memory, bytes a\n"
        "sample on the wire and, with --data, what fewer of them cost in accuracy. Into the folder go\n"
        "report.txt, report.json, each graph as .ort, and required_operators.config for a reduced\n"
        "onnxruntime (build.sh --minimal_build --include_ops_by_config required_operators.config\n"
        "--enable_reduced_operator_type_support).",
        epilog="examples:\n" + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, help="bundle made by psgl-export build; its back's weights beside it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    parser.add_argument(
        "--data", type=Path, help=".npz whose test samples accuracy is measured on; the front must not have seen them"
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="measure what an int8 front (QDQ, calibrated on the training samples of --data) would cost; bundles stay "
        "float32",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_public_key(parser)
    add_debug(parser)


def report(arguments: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    require("export", "torch", "onnx", "onnxscript", "torchmetrics")
    key = public_key_of(arguments)
    if arguments.int8 and arguments.data is None:
        raise ConfigError("--int8 is measured on samples: add --data")
    # torch takes seconds to import: only once the options are known to be good.
    from edge_sdk.bundle import load_bundle
    from export.report import report_on

    manifest = load_bundle(arguments.bundle, public_key=key).manifest
    data = None
    if arguments.data is not None:
        signal = True if len(manifest.input_shape) == 2 else None
        data = load_dataset(arguments.data, classes=len(manifest.classes), signal=signal)
    found = report_on(arguments.bundle, arguments.out, data=data, int8=arguments.int8, public_key=key)
    text, document = _text(found), json.dumps(asdict(found), indent=1)
    for name, content in (("report.txt", text), ("report.json", document)):
        try:
            (arguments.out / name).write_text(content + "\n")
        except OSError as exc:
            raise ConfigError(f"{arguments.out / name} cannot be written: {exc.strerror or exc}") from exc
    print(document if arguments.json else text)
    return 0


def _text(found: Report) -> str:
    lines = [
        f"bundle {found.bundle}, profile {found.profile}, {found.bundle_bytes / 1e3:.1f} KB",
        "",
        f"{'graph':<9} {'MACs':>12} {'parameters':>11} {'peak, bytes':>12} {'.onnx':>8} {'.ort':>8}   (of one sample)",
    ]
    for name, graph in found.graphs.items():
        cost = graph.cost
        lines.append(
            f"{name:<9} {cost.macs:>12,} {cost.parameters:>11,} {cost.peak_activation_bytes:>12,} "
            f"{graph.onnx_bytes:>8,} {graph.ort_bytes:>8,}"
        )
    operators = found.firmware.operators
    lines += ["", f"{len(operators)} operators of ai.onnx in a reduced build: {', '.join(operators)}", ""]
    lines.append(f"{'on the wire':<12} {'bytes a sample':>14}" + ("" if found.note else f" {'accuracy':>9}"))
    for wire in found.wire:
        accuracy = "" if wire.accuracy is None else f" {wire.accuracy:>9.1%}"
        lines.append(f"{wire.name:<12} {wire.bytes_per_sample:>14,}{accuracy}{'   as shipped' if wire.shipped else ''}")
    lines.append(found.note or f"accuracy of {found.held_out} held-out samples, by the back beside the bundle")
    bound = found.bits_per_sample
    lines += ["", "no bound on what one send tells" if bound is None else f"one send tells at most {bound:.1f} bits"]
    if found.int8 is not None and found.int8_accuracy is not None:
        cost8 = found.int8
        lines.append(
            f"an int8 front: {cost8.float_bytes:,} to {cost8.int8_bytes:,} bytes, {cost8.float_ms:.3f} to "
            f"{cost8.int8_ms:.3f} ms a sample on this machine, cosine {cost8.cosine:.5f}, accuracy "
            f"{found.int8_accuracy:.1%} as shipped"
        )
    return "\n".join(lines)
