"""Products of few rows with weights, in the kernel that streams weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from passes.base import Context, call, is_call, shape_of, told
from passes.launches import FuseLaunches, why_not_few
from passes.nodes import bring_before, dtype_of, erase_dead, uncast, users, why_no_product

aten, dsv3 = torch.ops.aten, torch.ops.dsv3
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StreamProducts(FuseLaunches):
    """linear(x, W)                     →    dsv3.linear(x, W)
       linear(x, W), linear(x, V)       →    both halves of linear_pair(x, W, V)
       linear(float(x), float(W))       →    dsv3.linear(x, W, exact)

    For rows so few that reading the weight is all there is to do: the kernel begins to read it while the one before
    still runs. Products of many rows are the library's; of those that are to be exact, its matrix units take 16-bit
    factors as they are, where torch would widen them and multiply off these units.
    """  # fmt: skip

    op: ClassVar[str] = "linear"

    def when(self, node: fx.Node) -> str | None:
        if not is_call(node, aten.linear):
            return ""
        reason = why_no_product(node)
        if reason is not None:
            return reason
        dtypes = {dtype_of(factor) for factor in factors(node)}
        if len(dtypes) > 1 or not dtypes.issubset(SIXTEEN_BITS):
            return f"{node.name} is not one of 16-bit floats"
        return None

    def outside(self, node: fx.Node, context: Context) -> str | None:
        if dtype_of(node) == torch.float32:
            return None
        return why_not_few(node, shape_of(node)[:-1], context)

    def rewrite(self, graph: fx.Graph, node: fx.Node) -> str:
        sibling = next((user for user in users(node.args[0]) if self.joins(user, node)), None)
        products = [node] if sibling is None else sorted((node, sibling))
        new = streamed(graph, node) if sibling is None else streamed_together(graph, *products)
        return told(", ".join(one.name for one in products), new)

    def joins(self, other: fx.Node, node: fx.Node) -> bool:
        """Is this another product of the same rows, rounded like them?"""
        same = other is not node and is_call(other, aten.linear) and other.args[0] is node.args[0]
        return same and self.when(other) is None and all(dtype_of(one) in SIXTEEN_BITS for one in (other, node))


def streamed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A single product's replacement."""
    exact = (None, None, True) if dtype_of(node) == torch.float32 else ()
    with graph.inserting_before(node):
        new = call(graph, dsv3.linear.default, *factors(node), *exact, like=node)
    node.replace_all_uses_with(new)
    erase_dead(graph, node)
    return new


def streamed_together(graph: fx.Graph, first: fx.Node, second: fx.Node) -> fx.Node:
    """What two products of the same rows are halves of; `first` comes first in the graph."""
    bring_before(first, second.args[1])
    width = shape_of(first)[-1]
    with graph.inserting_before(first):
        both = call(graph, dsv3.linear_pair.default, *first.args[:2], second.args[1], like=first)
        axis, end = len(shape_of(both)) - 1, shape_of(both)[-1]
        for old, part in ((first, (0, width)), (second, (width, end))):
            old.replace_all_uses_with(call(graph, aten.slice.Tensor, both, axis, *part, like=old))
    erase_dead(graph, second)
    erase_dead(graph, first)
    return both


def factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Both factors of a product, of a float32 product behind the casts that widen them."""
    first, second = node.args[:2]
    return (uncast(first), uncast(second)) if dtype_of(node) == torch.float32 else (first, second)
