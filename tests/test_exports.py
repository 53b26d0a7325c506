"""Every public module says what it exports: complete, importable, documented (ruff keeps the order)."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    path
    for package in ("edge_sdk", "server_sdk", "export")
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__main__.py"
)


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_all_is_complete_and_importable(path: Path) -> None:
    module = importlib.import_module(dotted(path))
    listed = module.__all__
    assert len(set(listed)) == len(listed)
    for name in listed:
        assert hasattr(module, name), f"{name} does not exist"
    if path.name == "__init__.py":
        return
    defined = {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and not node.name.startswith("_")
    }
    assert defined <= set(listed), f"{sorted(defined - set(listed))} are public by name but not in __all__"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_every_public_thing_has_a_docstring(path: Path) -> None:
    module = importlib.import_module(dotted(path))
    assert module.__doc__, "a module says what station it is"
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value) and getattr(value, "__module__", "").split(".")[0] in (
            "edge_sdk",
            "server_sdk",
            "export",
        ):
            assert value.__doc__, f"{name} has no docstring"
