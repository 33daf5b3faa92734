"""Settings of the whole suite, and `golden`: printed text compared with a file that is read in review."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

GOLDEN = Path(__file__).parent / "golden"

# The same examples in every run; no deadline, because the first example pays for tracing or compiling.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="rewrite tests/golden with the text of this run")


LONGEST = (
    "test_examples", "test_export", "test_export_mlir", "test_oracle", "test_backend", "test_driver", "test_cli",
    "test_emit", "test_forms", "test_mutations", "test_native",
)  # fmt: skip
"""Modules that take half a minute or more: begun first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.golden)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(text, name)` asserts that text equals tests/golden/<name>; --accept writes the file instead."""

    def compare(text: str, name: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--accept"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"tests/golden/{name} is missing: write it with `make golden` and read it"
        assert text == path.read_text(encoding="utf-8"), f"tests/golden/{name} differs: `make golden` accepts it"

    return compare
