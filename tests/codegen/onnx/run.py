"""One small graph as an ONNX model, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper
from torch import Tensor, fx, nn

from codegen.onnx import Builder, Value, translate
from codegen.onnx.builder import ONNX_TYPES
from dsv3_compile.tracing import Input, capture_module
from passes.base import Role


def session(model: onnx.ModelProto | str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model if isinstance(model, str) else model.SerializeToString(), options)


class Calls(nn.Module):
    """A function as a module; export wants its arguments spelled out."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def call(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        result = self.function(*inputs)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def graph_of(function: Callable[..., Any], *inputs: Input) -> fx.GraphModule:
    names = ", ".join(one.name for one in inputs)
    forward = eval(f"lambda self, {names}: self.call({names})")
    return capture_module(type("Calls", (Calls,), {"forward": forward})(function), inputs)


def activation(name: str, *shape: int | str, dtype: torch.dtype = torch.float32) -> Input:
    return Input(name, Role.ACTIVATION, shape, dtype)


def model_of(module: fx.GraphModule, **options: Any) -> onnx.ModelProto:
    """A checked model; free sizes are read from the first input that has them."""
    b = Builder()
    given, infos = {}, []
    for node in module.graph.find_nodes(op="placeholder"):
        fake = node.meta["val"]
        given[node.name] = Value(node.name, tuple(fake.shape), fake.dtype)
        infos.append(_info(node.name, given[node.name]))
        for axis, size in enumerate(fake.shape):
            for letter, symbol in module.meta["dims"].items():
                if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                    b.let(letter, b.op("Shape", node.name, start=axis, end=axis + 1))
    results = translate(b, module, given, "model", **options)
    outputs = [_info(b.name_of(result), result) for result in results]
    graph = helper.make_graph(b.nodes, "test", infos, outputs, [*b.initializers.values()])
    opsets = [helper.make_opsetid(domain, 1 if domain else 23) for domain in b.domains]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return model


def _info(name: str, value: Value) -> onnx.ValueInfoProto:
    sizes = [None if isinstance(size, torch.SymInt) else size for size in value.shape]
    return helper.make_tensor_value_info(name, ONNX_TYPES[value.dtype], sizes)


def check(
    function: Callable[..., Any], inputs: list[Input], *values: Tensor, error: float = 1e-5, **options: Any
) -> None:
    """ONNX Runtime computes what torch computes, to `error` of the largest number."""
    running = session(model_of(graph_of(function, *inputs), **options))
    feeds = {one.name: value.numpy() for one, value in zip(running.get_inputs(), values, strict=True)}
    found = running.run(None, feeds)
    expected = Calls(function).call(*values)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        theirs = theirs.numpy()
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if theirs.dtype.kind == "f":
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=error * max(1.0, np.abs(theirs).max()))
        else:
            np.testing.assert_array_equal(ours, theirs)
