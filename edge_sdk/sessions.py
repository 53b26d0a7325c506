"""The one place that makes onnxruntime's sessions, out of graphs that were looked through and are as stated."""

from __future__ import annotations

import contextlib
import functools
import re

import onnxruntime as ort

from edge_sdk.errors import BundleError
from edge_sdk.interface import Interface, check_file, check_session

__all__ = ["open_session"]

_NEWEST = re.compile(r"support for domain ai\.onnx is till opset (\d+)")
_UNKNOWN = re.compile(r"No Op registered for (\w+) with domain_version|Could not find an implementation for (\w+)\(")


def open_session(name: str, graph: bytes, interface: Interface | None, *, threads: int = 1) -> ort.InferenceSession:
    """Make a session on the CPU.

    Args:
        name: of the graph, for errors.
        graph: ONNX bytes.
        interface: what the manifest says of it; None leaves that unchecked, for graphs of one's own.
        threads: of one operator.

    Raises:
        BundleError: the graph is not as its manifest says, or this onnxruntime cannot run it.
    """
    if interface is not None:
        check_file(name, graph, interface)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # a block for each pass, planned ahead, leaves holes in an arena that is shared
    options.log_severity_level = 4
    _share_one_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # onnxruntime raises types of its own native module
        raise BundleError(_why(name, str(exc), interface)) from exc
    if interface is not None:
        check_session(name, session.get_inputs(), session.get_outputs(), interface)
    return session


@functools.cache
def _share_one_arena() -> None:
    """One arena for all sessions of this process: what one has freed serves the next without fresh pages.

    Arenas of their own would each keep its peak and grow by doubling; without any, each pass would pay for its pages.
    """
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    as_requested = ort.OrtArenaCfg(0, 1, -1, -1)
    with contextlib.suppress(Exception):  # the program that we are in has one registered already: it serves as well
        ort.create_and_register_allocator(info, as_requested)


def _why(name: str, reason: str, interface: Interface | None) -> str:
    here = f"onnxruntime {ort.__version__} cannot run the bundle's {name!r} graph"
    remedy = "upgrade onnxruntime on this machine, or export the bundle again"
    if newest := _NEWEST.search(reason):
        wanted = "a newer opset" if interface is None else f"opset {interface.opset}"
        return f"{here}: it is exported for {wanted}, this onnxruntime knows them up to {newest[1]}: {remedy}"
    if unknown := _UNKNOWN.search(reason):
        return f"{here}: this build has no operator {unknown[1] or unknown[2]}: {remedy}"
    return f"{here} ({' '.join(reason.split())[:160]}): {remedy}"
