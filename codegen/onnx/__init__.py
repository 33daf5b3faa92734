"""Blocks as ONNX graphs: a builder, one translation per operator, weights in a file of their own."""

from codegen.onnx import aten, vocabulary
from codegen.onnx.builder import Builder, ExportError, Scope, Value
from codegen.onnx.external import WeightFile
from codegen.onnx.translate import layout_of, translate

__all__ = [
    "Builder",
    "ExportError",
    "Scope",
    "Value",
    "WeightFile",
    "aten",
    "layout_of",
    "translate",
    "vocabulary",
]
