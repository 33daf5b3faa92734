"""`dsv3_compile.compile`: a checkpoint into an artifact, or a module into a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

from torch import nn

from dsv3_compile import driver
from dsv3_compile.artifact import Artifact
from dsv3_compile.modules import CompiledModule, compile_module


@overload
def compile(model: str | Path, /, output: str | Path, **settings: Any) -> Artifact: ...
@overload
def compile(model: nn.Module, /, example_inputs: tuple[Any, ...], **settings: Any) -> CompiledModule: ...
def compile(model: Any, /, *arguments: Any, **settings: Any) -> Artifact | CompiledModule:
    """Compile a preset or a Hugging Face folder (`driver.compile`), or any nn.Module (`modules.compile_module`)."""
    if isinstance(model, nn.Module):
        return compile_module(model, *arguments, **settings)
    return driver.compile(model, *arguments, **settings)
