"""The house: four packages, imported from this checkout, importing downward only."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "dsv3_compile": {"passes", "codegen", "model_def"},
    "passes": {"codegen"},
    "codegen": set(),
    "model_def": set(),
}


def imported_packages(source: str) -> Iterator[tuple[int, str]]:
    """Line and top-level name of every absolute import, those inside functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, (node.module or "").split(".")[0]


def upward_imports(package: str, source: str) -> list[tuple[int, str]]:
    forbidden = MAY_IMPORT.keys() - MAY_IMPORT[package] - {package} | {"tests", "examples", "benchmarks"}
    return [(line, name) for line, name in imported_packages(source) if name in forbidden]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_is_imported_from_this_checkout(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / package / "__init__.py"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_downward(package: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in sorted((ROOT / package).rglob("*.py"))
        if (found := upward_imports(package, path.read_text(encoding="utf-8")))
    }
    assert not wrong


def test_an_upward_import_inside_a_function_is_found() -> None:
    source = "def late():\n    from passes.base import Role\n    import torch\n    return Role\n"
    assert upward_imports("codegen", source) == [(2, "passes")]
    assert upward_imports("dsv3_compile", source) == []
