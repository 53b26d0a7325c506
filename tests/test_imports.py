"""The import chain edge_sdk <- server_sdk <- export: what each package may import, and what it really loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "edge_sdk": {
        "torch",
        "onnx",
        "onnxscript",
        "safetensors",
        "rich",
        "amqtt",
        "server_sdk",
        "export",
        "examples",
    },
    "server_sdk": {"export", "examples", "onnx", "onnxscript"},
    "export": {"examples"},
}
EDGE_MAY = {"numpy", "onnxruntime", "paho", "cbor2", "edge_sdk"}
OPTIONAL = {"cryptography"}
ONLY_IN = {"paho": {"paho_transport.py", "mqtt_link.py"}, "cryptography": {"sealing.py", "signing.py"}}


def imported(path: Path) -> Iterator[str]:
    """Top-level names of everything that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_only_what_stands_left_of_it(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not set(imported(path)) & FORBIDDEN[package], path


def test_the_edge_imports_nothing_beyond_its_dependencies() -> None:
    for path in (ROOT / "edge_sdk").rglob("*.py"):
        strangers = set(imported(path)) - EDGE_MAY - OPTIONAL - set(sys.stdlib_module_names)
        assert not strangers, f"{path} imports {strangers}"


@pytest.mark.parametrize("package", ONLY_IN)
def test_one_file_imports_each_package_that_may_change_or_be_absent(package: str) -> None:
    users = {path.name for path in (ROOT / "edge_sdk").rglob("*.py") if package in set(imported(path))}
    assert users <= ONLY_IN[package], users


def test_no_files_import_each_other() -> None:
    files = [path for package in FORBIDDEN for path in (ROOT / package).rglob("*.py")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    drawn = {name: set(own_modules(path, modules)) - {name} for name, path in modules.items()}
    assert sum(map(len, drawn.values())) > len(files), "hardly anything was drawn"
    TopologicalSorter(drawn).prepare()  # raises a CycleError that names the circle


def own_modules(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Those of this tree that a file imports, for its types alone or in a function too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules)
            yield from inner or {node.module} & set(modules)


def test_a_fresh_process_loads_neither_torch_nor_onnx_for_the_edge() -> None:
    modules = sorted(f"edge_sdk.{path.stem}" for path in (ROOT / "edge_sdk").glob("[!_]*.py"))
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += "bad = {'torch', 'onnx', 'cryptography', 'onnxscript', 'server_sdk', 'export'} & set(sys.modules)\n"
    code += "sys.exit(','.join(bad) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
