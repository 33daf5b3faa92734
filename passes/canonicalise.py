"""One way to write each thing, so that later passes need to know only one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes.base import Context, Outcome, Pass, call, calls, is_call, same_size, shape_of
from passes.nodes import CASTS, COPIES, VIEWS, constant_of, is_division, is_random, is_tensor, same_shape
from passes.products import part_of, product_of, sources_of_dims

aten = torch.ops.aten


@dataclass(frozen=True)
class Canonicalise(Pass):
    """clone(x), x.to(same dtype), x.view(same shape), expand(same shape), x + 0, dropout(eval)  →  x
    _unsafe_view, view of a permuted tensor                                                     →  reshape
    x.type_as(y)                                                                                →  x.to(dtype of y)
    x[0] along a dim of size one                                                                →  x.squeeze(dim)
    mm(x, Wᵀ), matmul(x, Wᵀ), addmm(bias, x, Wᵀ)                                                →  linear(x, W[, bias])
    baddbmm(nothing, x, y, alpha)                                                               →  bmm(x, y) · alpha
    cat([empty, x]), copy(x, y), slice(cat) at its seams                                        →  the part
    x + a product that sums over no index                                                       →  x
    two equal nodes                                                                             →  one
    """

    prepares: ClassVar[bool] = True

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        graph, outcome = graph_module.graph, Outcome()
        for node in list(graph.nodes):
            if is_call(node, *CHECKS):
                graph.erase_node(node)
                continue
            source = same_value(node) or the_part(node)
            if source is not None:
                node.replace_all_uses_with(source)
                outcome.matches.append(f"{node.name} is {source.name}")
        for node in calls(graph, aten._unsafe_view, aten.view):
            node.target = aten.reshape.default
        for node in calls(graph, aten.type_as):
            if node.meta["val"].device == node.args[0].meta["val"].device:
                with graph.inserting_before(node):
                    new = call(graph, aten._to_copy.default, node.args[0], dtype=node.meta["val"].dtype, like=node)
                node.replace_all_uses_with(new)
        for node in calls(graph, aten.select):
            if same_size(shape_of(node.args[0])[node.args[1]], 1):
                node.target, node.args = aten.squeeze.dim, node.args[:2]
        for node in calls(graph, aten.baddbmm):
            if adds_nothing(node):
                with graph.inserting_before(node):
                    new = call(graph, aten.bmm.default, *node.args[1:3], like=node)
                    if (alpha := node.kwargs.get("alpha", 1)) != 1:
                        new = call(graph, aten.mul.Tensor, new, alpha, like=node)
                node.replace_all_uses_with(new)
                outcome.matches.append(f"{node.name} adds nothing")
        for node in calls(graph, aten.mm, aten.matmul, aten.addmm):
            if as_linear(graph, node):
                outcome.matches.append(f"{node.name} is linear")
        graph.eliminate_dead_code()
        outcome.matches.extend(f"{copy} repeats {first}" for copy, first in merge_equal_nodes(graph))
        return outcome


def read_by_layout(node: fx.Node) -> bool:
    """Does somebody read the tensor, or a view of it, in a way that not every layout allows?"""
    return any(
        is_call(user, aten.view_as_complex, aten.view.dtype) or (is_call(user, *VIEWS) and read_by_layout(user))
        for user in node.users
    )


CHECKS = (aten._assert_tensor_metadata, aten._assert_async, aten.sym_constrain_range_for_size)


def same_value(node: fx.Node) -> fx.Node | None:
    """The input that this node only repeats, if any."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source, value = node.args[0], node.meta["val"]
    if not isinstance(value, torch.Tensor) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    if is_call(node, *COPIES):
        return None if read_by_layout(node) else source
    if is_call(node, *CASTS, aten.type_as):
        same = value.dtype == source.meta["val"].dtype and value.device == source.meta["val"].device
        return source if same else None
    if is_call(node, *VIEWS):
        return source if same_shape(node, source) else None
    if is_call(node, aten.add, aten.sub) and node.args[1] == 0 and not isinstance(node.args[1], fx.Node):
        return source if value.dtype == source.meta["val"].dtype else None
    scales = is_call(node, aten.mul) or is_division(node)
    if scales and node.args[1] == 1 and not isinstance(node.args[1], fx.Node):
        return source if value.dtype == source.meta["val"].dtype else None
    if is_call(node, aten.dropout) and (node.args[1] == 0 or not node.args[2]):
        return source
    return None


def the_part(node: fx.Node) -> fx.Node | None:
    """Of several inputs the one that this node repeats, if any."""
    if is_call(node, aten.cat):
        filled = [part for part in node.args[0] if shape_of(part) != (0,)]
        same = len(filled) == 1 and filled[0].meta["val"].dtype == node.meta["val"].dtype
        return filled[0] if same else None
    if is_call(node, aten.add) and len(node.all_input_nodes) == 2 and not node.kwargs:
        for kept, other in (node.args, node.args[::-1]):
            same = is_tensor(kept) and same_shape(kept, node) and kept.meta["val"].dtype == node.meta["val"].dtype
            if same and sums_nothing(other):
                return kept
        return None
    if is_call(node, aten.copy):
        target, source = (n.meta["val"] for n in node.args[:2])
        same = same_shape(*node.args[:2]) and (target.dtype, target.device) == (source.dtype, source.device)
        return node.args[1] if same else None
    part = part_of(node)
    if part is None or not is_call(part.source, aten.cat) or part.step != 1:
        return None
    parts, axis = part.source.args[0], part.source.args[1] if len(part.source.args) > 1 else 0
    start = 0
    for candidate in parts:
        if axis % len(shape_of(node)) != part.axis or len(shape_of(candidate)) != len(shape_of(node)):
            return None
        length = shape_of(candidate)[part.axis]
        if (start, length) == (part.start, part.length):
            return candidate if candidate.meta["val"].dtype == node.meta["val"].dtype else None
        start += length
        if not isinstance(start, int) or start > part.start:
            return None
    return None


def sums_nothing(node: fx.Node) -> bool:
    """Is it a product over an axis of size zero, and so zero itself?"""
    product = product_of(node)
    if product is None:
        return False
    sizes = {c: size for operand, own in product.operands for c, size in zip(own, shape_of(operand), strict=True)}
    return any(same_size(sizes[c], 0) for c in product.summed())


def adds_nothing(baddbmm: fx.Node) -> bool:
    """Is all that is added to the product zero, or multiplied by zero, which torch does not read then?"""
    return baddbmm.kwargs.get("beta", 1) == 0 or constant_of(baddbmm.args[0]) == 0


def as_linear(graph: fx.Graph, node: fx.Node) -> bool:
    """Write a product with a transposed matrix as linear; says whether it did."""
    bias, left, right = (None, *node.args[:2]) if not is_call(node, aten.addmm) else node.args[:3]
    if is_call(node, aten.addmm) and node.kwargs:
        return False
    transposed = is_call(right, aten.t, aten.transpose, aten.permute) and sources_of_dims(right) == (1, 0)
    if not transposed or (bias is not None and len(shape_of(bias)) != 1):
        return False
    with graph.inserting_before(node):
        arguments = (left, right.args[0]) if bias is None else (left, right.args[0], bias)
        node.replace_all_uses_with(call(graph, aten.linear.default, *arguments, like=node))
    return True


def merge_equal_nodes(graph: fx.Graph) -> list[tuple[str, str]]:
    """Let equal calls on equal arguments be one node; returns (repeated, kept) names."""
    first: dict[Any, fx.Node] = {}
    merged = []
    for node in list(graph.nodes):
        if node.op != "call_function" or node.is_impure() or is_random(node):
            continue
        key = (node.target, freeze(node.args), freeze(node.kwargs))
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
            merged.append((node.name, kept.name))
    return merged


def freeze(value: Any) -> Any:
    """A hashable form of node arguments; numbers keep their type, since 1 == True == 1.0."""
    if isinstance(value, (list, tuple)):
        return tuple(freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, freeze(v)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", freeze(value.start), freeze(value.stop), freeze(value.step))
    return value if isinstance(value, fx.Node) else (type(value), str(value))
