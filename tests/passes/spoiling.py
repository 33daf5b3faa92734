"""Ways to make a rewrite wrong: small changes to the nodes that a pass wrote."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from passes.base import Role, is_call, same_size
from passes.nodes import constant_of
from passes.verify import clone

aten = torch.ops.aten
dsv3 = torch.ops.dsv3

Change = Callable[[fx.Graph, fx.Node], None]
"""Takes a graph and one of its nodes, and spoils it."""

# Swapping their operands changes nothing: add_rms_norm sums its first two as well.
COMMUTATIVE = (aten.add, aten.mul, aten.maximum, operator.add, operator.mul, dsv3.add_rms_norm)
SPELLINGS = {"sigmoid": "softmax", "softmax": "sigmoid", "top2": "max", "max": "top2"}
INDEXED = (aten.slice, aten.select, aten.split_with_sizes, operator.getitem)
LEFT_OUT = (aten.add, aten.mul, aten.sub, aten.div, aten.rms_norm, aten.silu, dsv3.rms_norm, dsv3.rotary)
TINY = 1e-12  # a float below this guards a division; half as much again of it is nothing


def changes(node: fx.Node) -> Iterator[tuple[str, Change]]:
    """Every change that makes sense for a node, with its name."""
    if node.op == "placeholder" and "bind" in node.meta:
        yield from _recipe(node)
    if node.op == "call_function" and isinstance(_value(node), torch.Tensor | tuple | list):
        yield from _constants(node)
        yield from _indices(node)
        yield from _operands(node)
        yield from _left_out(node)


def _constants(node: fx.Node) -> Iterator[tuple[str, Change]]:
    for index, value in enumerate(node.args):
        name = _argument_name(node, index)
        if name == "exact":
            continue  # it only rounds, which does not show in float64
        if isinstance(value, bool):
            yield f"{name} flipped", _with_argument(index, not value)
        elif isinstance(value, float):
            wrong = 0.0 if math.isinf(value) else 1e-3 if abs(value) < TINY else 1.5 * value
            yield f"{name} {value:g} made {wrong:g}", _with_argument(index, wrong)
        elif isinstance(value, str) and value in SPELLINGS:
            yield f"{name} {value} made {SPELLINGS[value]}", _with_argument(index, SPELLINGS[value])
        elif isinstance(value, int) and is_call(node, dsv3.route) and value > 1:
            yield f"{name} {value} made {value - 1}", _with_argument(index, value - 1)


def _indices(node: fx.Node) -> Iterator[tuple[str, Change]]:
    if is_call(node, aten.slice) and len(node.args) == 4 and all(isinstance(a, int) for a in node.args[2:]):
        start, end = node.args[2:]
        size = _value(node.args[0]).shape[node.args[1]]
        if isinstance(size, int) and end < size:
            yield "slice one too far", lambda graph, n: setattr(n, "args", (*n.args[:2], start + 1, end + 1))
        elif isinstance(size, int) and start > 0:
            stop = min(end, size) - 1
            yield "slice one too early", lambda graph, n: setattr(n, "args", (*n.args[:2], start - 1, stop))
    if node.target is operator.getitem and isinstance(_value(node.args[0]), tuple | list):
        parts = _value(node.args[0])
        for other, part in enumerate(parts):
            if other != node.args[1] and _alike(part, parts[node.args[1]]):
                yield f"part {other} in place of {node.args[1]}", _with_argument(1, other)


def _operands(node: fx.Node) -> Iterator[tuple[str, Change]]:
    tensors = [n for n in node.all_input_nodes if isinstance(_value(n), torch.Tensor)]
    for k, first in enumerate(tensors):
        for second in tensors[k + 1 :]:
            if _alike(_value(first), _value(second)) and not is_call(node, *COMMUTATIVE):
                yield f"{first.name} and {second.name} swapped", _swapped(first.name, second.name)
    if is_call(node, *INDEXED) or (len(tensors) < 2 and not is_call(node, dsv3.swiglu)):
        return
    for one in tensors:
        value = _value(one)
        if value.dtype == torch.int64:
            yield f"{one.name} one too small", _inserted(one.name, _one_less)
        if not value.is_floating_point() or not value.ndim or constant_of(one) is not None:
            continue  # one number everywhere is the same in any order
        last = value.ndim - 1
        width = value.shape[last]
        if not isinstance(width, int) or width > 1:
            yield f"{one.name} reversed along its last axis", _inserted(one.name, _reversed(last))
        if isinstance(width, int) and width % 2 == 0:
            yield f"halves of {one.name} swapped", _inserted(one.name, _rolled(width // 2, last))
        if value.ndim == 3 and one.meta.get("role") is Role.WEIGHT:
            yield f"{one.name} in another order of experts", _inserted(one.name, _reversed(0))


def _left_out(node: fx.Node) -> Iterator[tuple[str, Change]]:
    """A term, a factor, a rotation or a normalisation left out."""
    if is_call(node, *LEFT_OUT):
        first = node.args[0]
        if isinstance(first, fx.Node) and _alike(_value(first), _value(node)):
            yield f"left out but for {first.name}", lambda graph, n: n.replace_all_uses_with(n.args[0])
    if node.target is operator.getitem and is_call(node.args[0], dsv3.add_rms_norm):
        yield "residual or norm left out", lambda graph, n: n.replace_all_uses_with(n.args[0].args[0])


def _recipe(weight: fx.Node) -> Iterator[tuple[str, Change]]:
    """What is computed when weights are bound, rolled along each axis."""
    for axis, size in enumerate(_value(weight).shape):
        if size > 1:

            def roll(graph: fx.Graph, node: fx.Node, axis: int = axis) -> None:
                recipe = clone(node.meta["bind"])
                (result,) = recipe.graph.output_node().all_input_nodes
                with recipe.graph.inserting_after(result):
                    rolled = recipe.graph.call_function(aten.roll.default, (result, [1], [axis]))
                result.replace_all_uses_with(rolled, delete_user_cb=lambda user: user is not rolled)
                recipe.recompile()
                node.meta["bind"] = recipe

            yield f"bound tensor rolled along axis {axis}", roll


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def _alike(one: Any, other: Any) -> bool:
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return False
    same = one.dtype == other.dtype and one.ndim == other.ndim
    return same and all(same_size(a, b) for a, b in zip(one.shape, other.shape, strict=True))


def _argument_name(node: fx.Node, index: int) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.arguments[index].name if schema else str(index)


def _with_argument(index: int, value: Any) -> Change:
    def change(graph: fx.Graph, node: fx.Node) -> None:
        node.update_arg(index, value)

    return change


def _swapped(first: str, second: str) -> Change:
    def change(graph: fx.Graph, node: fx.Node) -> None:
        named = {n.name: n for n in node.all_input_nodes}
        other = {named[first]: named[second], named[second]: named[first]}
        node.args = fx.node.map_arg(node.args, lambda n: other.get(n, n))

    return change


def _inserted(operand: str, make: Callable[[fx.Graph, fx.Node], fx.Node]) -> Change:
    """The node reads something made of its operand."""

    def change(graph: fx.Graph, node: fx.Node) -> None:
        old = next(n for n in node.all_input_nodes if n.name == operand)
        with graph.inserting_before(node):
            new = make(graph, old)
        node.replace_input_with(old, new)

    return change


def _one_less(graph: fx.Graph, node: fx.Node) -> fx.Node:
    less = graph.call_function(aten.sub.Tensor, (node, 1))
    return graph.call_function(aten.clamp_min.default, (less, 0))


def _reversed(axis: int) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    return lambda graph, node: graph.call_function(aten.flip.default, (node, [axis]))


def _rolled(by: int, axis: int) -> Callable[[fx.Graph, fx.Node], fx.Node]:
    return lambda graph, node: graph.call_function(aten.roll.default, (node, [by], [axis]))
