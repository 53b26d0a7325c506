"""What a reduced onnxruntime for firmware needs of a bundle: ``.ort`` files and the list of operators and types.

onnxruntime's own tools, level ``basic``, so that only operators of ``ai.onnx`` remain
(https://onnxruntime.ai/docs/build/custom.html, "--include_ops_by_config required_operators.config
--enable_reduced_operator_type_support --minimal_build").
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
from onnxruntime.tools.ort_format_model import create_config_from_models

from export.errors import ExportError

__all__ = ["CONFIG", "Firmware", "quiet", "write_firmware"]

CONFIG = "required_operators.config"

_OPERATOR = re.compile(r"[,;]([A-Za-z]\w*)")


@dataclass(frozen=True)
class Firmware:
    """What was written.

    Attributes:
        ort_bytes: size of each graph's ``.ort`` file.
        operators: that a reduced build must have, sorted.
        files: names of the files, sorted.
    """

    ort_bytes: dict[str, int]
    operators: tuple[str, ...]
    files: tuple[str, ...]


def write_firmware(graphs: Mapping[str, bytes], folder: Path) -> Firmware:
    """Convert graphs and write ``<graph>.ort`` and ``required_operators.config``.

    Args:
        graphs: ONNX bytes by name.
        folder: made where it does not exist.

    Raises:
        ExportError: onnxruntime cannot convert a graph, needs operators beyond ``ai.onnx``, or a file cannot be
            written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = [_convert(name, graph, folder / f"{name}.ort") for name, graph in sorted(graphs.items())]
        with quiet():
            create_config_from_models(made, folder / CONFIG, True)
        lines = [line for line in (folder / CONFIG).read_text().splitlines() if not line.startswith("#")]
        names = ", ".join(path.name for path in made)
        header = f"# {names}: --include_ops_by_config, --enable_reduced_operator_type_support"
        (folder / CONFIG).write_text("\n".join([header, *lines]) + "\n")
        sizes = {path.stem: path.stat().st_size for path in made}
    except OSError as exc:
        raise ExportError(f"{folder} cannot be written: {exc.strerror or exc}") from exc
    foreign = [line for line in lines if not line.startswith("ai.onnx;")]
    if foreign:
        raise ExportError(
            f"the converted graphs need operators beyond ai.onnx ({foreign[0][:100]}): update onnxruntime"
        )
    operators = {name for line in lines for name in _OPERATOR.findall(re.sub(r"\{.*?\}+", "", line))}
    files = [*(path.name for path in made), CONFIG]
    return Firmware(sizes, tuple(sorted(operators)), tuple(sorted(files)))


def _convert(name: str, graph: bytes, target: Path) -> Path:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.save_model_format", "ORT")
    try:
        ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # onnxruntime raises types of its own native module
        reason = " ".join(str(exc).split())[:160]
        raise ExportError(f"onnxruntime cannot convert graph {name!r} for firmware: {reason}") from exc
    return target


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what onnxruntime's tools say through Python's loggers from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
