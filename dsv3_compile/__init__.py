"""dsv3-compile: a compiler for models built from Multi-head Latent Attention and DeepSeekMoE.

    artifact = dsv3_compile.compile("path/to/checkpoint", target="cpu", output="artifact/")
    model = dsv3_compile.load("artifact/")
    report = dsv3_compile.inspect("artifact/")

    torch.compile(any_model, backend="dsv3")
    module = dsv3_compile.compile(any_module, example_inputs)

Importing the package is cheap; torch is loaded by the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3_compile.backend import last_report, reports
    from dsv3_compile.entry import compile
    from dsv3_compile.export import export_onnx
    from dsv3_compile.export_mlir import export_mlir
    from dsv3_compile.inspection import inspect
    from dsv3_compile.runtime import load

_HOMES = {
    "compile": ("dsv3_compile.entry", "compile"),
    "load": ("dsv3_compile.runtime", "load"),
    "last_report": ("dsv3_compile.backend", "last_report"),
    "reports": ("dsv3_compile.backend", "reports"),
    "inspect": ("dsv3_compile.inspection", "inspect"),
    "export_mlir": ("dsv3_compile.export_mlir", "export_mlir"),
    "export_onnx": ("dsv3_compile.export", "export_onnx"),
}

__all__ = ["compile", "export_mlir", "export_onnx", "inspect", "last_report", "load", "reports"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
