"""From the graph of a block to ONNX nodes: one translation per operator, found by the operator itself.

Arithmetic on sizes leaves no nodes of its own, computations on constants alone are done here and now.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from operator import getitem
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx

import codegen.ops  # noqa: F401  registers the vocabulary
from codegen.onnx.builder import Builder, ExportError, Scope, Value, value_like

Translation = Callable[..., Any]
"""(builder, node, *arguments) → a value name, or a tuple of them. Tensors arrive as Value, sizes as they are."""

Function = TypeVar("Function", bound=Translation)
TRANSLATIONS: dict[Any, Translation] = {}  # operator → translation; an overload goes before its packet


def translation(*operators: Any) -> Callable[[Function], Function]:
    """Register a function as the translation of operators."""

    def register(function: Function) -> Function:
        for operator in operators:
            TRANSLATIONS[operator] = function
        return function

    return register


def translate(
    builder: Builder,
    module: fx.GraphModule,
    inputs: Mapping[str, Value],
    path: str,
    special: Mapping[Any, Translation] | None = None,
) -> tuple[Value, ...]:
    """Add a block to the graph and return its outputs.

    inputs: by placeholder name. path: of the block in the model, "model.layers.3". special: translations that go
    before the general ones. Raises ExportError naming the op, the node and the model line that has no ONNX form.
    """
    builder.enter(module.meta.get("dims", {}))
    table = {**TRANSLATIONS, **(special or {})}
    known: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            known[node] = inputs[node.name]
        elif node.op == "call_function":
            scope = Scope(module_path(path, node), node.name, model_line(node))
            with builder.within(scope):
                known[node] = _translated(builder, node, known, table, scope)
    (results,) = cast(tuple[tuple[fx.Node, ...]], module.graph.output_node().args)
    return tuple(_as_value(builder, known[node]) for node in results)


def _translated(
    builder: Builder, node: fx.Node, known: dict[fx.Node, Any], table: Mapping[Any, Translation], scope: Scope
) -> Any:
    fake = node.meta["val"]
    if isinstance(fake, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return fake
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    if node.target is getitem:
        return args[0][args[1]]
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    if not any(isinstance(leaf, (Value, torch.SymInt)) for leaf in leaves):
        return node.target(*args, **kwargs)
    found = table.get(node.target) or table.get(getattr(node.target, "overloadpacket", None))
    where = f"node {node.name} of {scope.module}" + (f" ({scope.source})" if scope.source else "")
    if found is None:
        raise ExportError(f"{node.target} has no ONNX form: {where}; `dsv3c passes` lists what would replace it")
    args, kwargs = torch.utils._pytree.tree_map(lambda leaf: _materialised(builder, leaf), (args, kwargs))
    try:
        result = found(builder, node, *args, **kwargs)
    except ExportError as error:
        raise ExportError(f"{node.target}: {error}: {where}") from error
    if isinstance(fake, Tensor):
        return value_like(result, fake)
    return tuple(value_like(name, part) for name, part in zip(result, fake, strict=True))


def _materialised(builder: Builder, leaf: Any) -> Any:
    return _as_value(builder, leaf) if isinstance(leaf, Tensor) else leaf


def _as_value(builder: Builder, value: Any) -> Value:
    if isinstance(value, Tensor):
        return value_like(builder.constant(value), value)
    return value


def module_path(path: str, node: fx.Node) -> str:
    """The module that a node of a block comes from, the block being at `path`."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    inner = stack[-1][0] if stack and not stack[-1][0].startswith("_empty") else ""
    return f"{path}.{inner}" if inner else path


def model_line(node: fx.Node) -> str:
    """ "attention.py:83": the line of the model that a node comes from, "" where it is not known."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""


def layout_of(uses: Sequence[tuple[fx.Node, int]], contrib: bool = False) -> str:
    """How a weight is stored, given all its (user, argument index): plain, transposed or interleaved.

    ONNX multiplies by [in, out] where torch keeps [out, in]. contrib: experts are computed by `MoE`.
    """
    aten, dsv3 = torch.ops.aten, torch.ops.dsv3
    experts = dsv3.routed_swiglu.default
    right: dict[Any, tuple[int, ...]] = {aten.linear.default: (1,), experts: () if contrib else (3, 4)}
    if contrib and uses and all((user.target, index) == (experts, 3) for user, index in uses):
        return "interleaved"
    swapped = uses and all(index in right.get(user.target, ()) for user, index in uses)
    return "transposed" if swapped else "plain"
