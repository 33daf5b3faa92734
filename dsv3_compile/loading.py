"""Running the Python files of an artifact.

Loading a file executes it, so an artifact contains code and must be trusted like any program. The caller has
checked the files against the manifest's hashes; nothing else in the folder is looked at, and nothing is written.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import codegen.ops  # noqa: F401  registers torch.ops.dsv3, which the files call
from dsv3_compile.artifact import DIGEST
from dsv3_compile.source import FUNCTION


class _SourceLoader(SourceFileLoader):
    """Neither reads nor writes byte code: an unlisted .pyc must not run, and the folder must stay as it is."""

    def path_stats(self, path: str) -> dict[str, float]:
        raise OSError


def load_graph(path: Path) -> Callable[..., tuple[Tensor, ...]]:
    """The function of graphs/<name>.py; the kernel files that it imports are loaded with it."""
    package = _package(path.parent.parent)
    stored = []
    for file in sorted((path.parent.parent / "kernels").glob("*.py")):
        name = f"{package}.kernels.{file.stem}"
        if name not in sys.modules:
            module, described = _load(name, file), file.with_suffix(".json")
            if described.is_file():
                stored.append((module, json.loads(described.read_text()), file.parent))
    if stored:
        from codegen.stored import make_launchers, use_stored  # needs triton, which an artifact for the CPU does not

        for kernels in stored:
            use_stored(*kernels)
        if torch.cuda.is_available():
            make_launchers(stored)
    return getattr(_load(f"{package}.graphs.{path.stem}", path), FUNCTION)


def _package(folder: Path) -> str:
    """A name for an artifact's files that no other artifact shares, and empty packages of that name.

    Its digest is part of it: another artifact may lie in this folder later on. While it is written it has none yet.
    """
    digest = folder / DIGEST
    identity = str(folder.resolve()).encode() + (digest.read_bytes() if digest.is_file() else b"")
    package = f"_artifact_{hashlib.sha256(identity).hexdigest()[:12]}"
    for name in (package, f"{package}.graphs", f"{package}.kernels"):
        if name not in sys.modules:
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = []
    return package


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_loader(name, _SourceLoader(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
