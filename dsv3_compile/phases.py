"""From a captured block to its phases: the decode graph is the prefill graph with one query position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from dsv3_compile.artifact import FILL
from dsv3_compile.program import BlockGraph
from passes.base import Role, expression_of, fake_mode_of, fake_result, module_of, sweep
from passes.verify import clone

QUERIES = "S"


def decode_of(graph: BlockGraph) -> BlockGraph:
    """The block at S = 1. Much cheaper than a second export, and node names stay comparable over phases."""
    return BlockGraph(graph.name, "decode", fix_sizes(graph.module, {QUERIES: 1}))


def fill_of(prefill: BlockGraph) -> BlockGraph:
    """What of a finished prefill graph writes the caches: they are its only outputs, its inputs what that takes.

    Taken from the finished graph, so that it reads the same bound weights.
    """
    filling = BlockGraph(prefill.name, FILL, clone(prefill.module))
    graph = filling.module.graph
    activations = len(filling.outputs()) - len(filling.inputs(Role.CACHE))
    graph.output_node().args = (filling.outputs()[activations:],)
    sweep(filling.module)
    for node in filling.inputs():
        if not node.users:
            graph.erase_node(node)
    filling.module.recompile()
    return filling


def fix_sizes(module: fx.GraphModule, sizes: Mapping[str, int]) -> fx.GraphModule:
    """A copy of a captured graph in which free sizes, named by letter, have become numbers."""
    dims = module.meta["dims"]
    values = {dims[letter]: size for letter, size in sizes.items() if letter in dims}
    graph = fx.Graph()
    # What a node of the old graph is in the new one: a node, or a number where a size became known.
    new: dict[fx.Node, Any] = {}
    # Without the Python dispatcher some fake kernels would take a symbolic size for its example value.
    with fake_mode_of(module.graph), enable_python_dispatcher():
        for node in module.graph.nodes:
            if node.op == "placeholder":
                copy = graph.create_node("placeholder", str(node.target), name=node.name)
                copy.meta = {**node.meta, "val": _resized(node.meta["val"], values)}
                if "upper" in copy.meta:
                    copy.meta["upper"] = _resize(copy.meta["upper"], values)
                new[node] = copy
            elif node.op == "call_function":
                new[node] = _recompute(graph, node, new)
            elif node.op == "output":
                graph.output(fx.node.map_arg(node.args[0], new.__getitem__))
            else:
                raise ValueError(f"{node.name}: {node.op} in a captured graph")
    fixed = module_of(torch.nn.Module(), graph)
    fixed.meta["dims"] = {letter: symbol for letter, symbol in dims.items() if letter not in sizes}
    sweep(fixed)
    return fixed


def _recompute(graph: fx.Graph, node: fx.Node, new: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), new.__getitem__)
    fakes = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    value = fake_result(node.target, *fakes)
    if isinstance(value, (int, torch.SymInt)):
        if isinstance(expression_of(value), int) or expression_of(value).is_Integer:
            return int(value)
        same = [a for a in args if isinstance(a, fx.Node) and _equal(a.meta["val"], value)]
        if same:  # B·S at S = 1
            return same[0]
    copy = graph.create_node("call_function", node.target, args, kwargs, name=node.name)
    copy.meta = {**node.meta, "val": value}
    return copy


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, torch.SymInt) and expression_of(one) == expression_of(other)


def _resized(fake: torch.Tensor, values: Mapping[Any, int]) -> torch.Tensor:
    shape = [_resize(size, values) for size in fake.shape]
    if shape == list(fake.shape):
        return fake
    return torch.empty(shape, dtype=fake.dtype, device=fake.device)


def _resize(size: Any, values: Mapping[Any, int]) -> Any:
    return values.get(expression_of(size), size)
