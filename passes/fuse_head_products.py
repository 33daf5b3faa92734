"""A product of its own per head as one op, without moving the heads in front."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from passes.base import Context, call, is_call, shape_of, told
from passes.launches import FuseLaunches, why_not_few
from passes.nodes import erase_dead, weights_only
from passes.products import product_of

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


@dataclass(frozen=True)
class HeadProduct:
    """out[.., h, o] = Σ_d x[.., h, d] · weight[h, o, d]; `order` of the weight's own axes gives h, o, d."""

    x: fx.Node
    weight: fx.Node
    order: list[int]


@dataclass(frozen=True)
class FuseHeadProducts(FuseLaunches):
    """einsum("bshc,hvc->bshv", x, W)    →    head_linear(x, W)

    For few rows, where reading the weights is all there is to do: a batched product of many rows is the library's.
    """

    op: ClassVar[str] = "head_linear"

    def when(self, node: fx.Node) -> str | None:
        if not is_call(node, aten.einsum) or not any(map(weights_only, node.args[1])):
            return ""
        product = head_product(node)
        return "its axes are not those of one product per head" if product is None else None

    def outside(self, node: fx.Node, context: Context) -> str | None:
        product = head_product(node)
        assert product is not None
        return why_not_few(node, shape_of(product.x)[:-2], context)

    def rewrite(self, graph: fx.Graph, node: fx.Node) -> str:
        product = head_product(node)
        assert product is not None
        with graph.inserting_before(node):
            weight = product.weight
            if product.order != [0, 1, 2]:
                weight = call(graph, aten.permute.default, weight, product.order, like=node)
            new = call(graph, dsv3.head_linear.default, product.x, weight, like=node)
        node.replace_all_uses_with(new)
        erase_dead(graph, node)
        return told(node.name, new)


def head_product(node: fx.Node) -> HeadProduct | None:
    """Read a product as one per head of an activation with a weight."""
    product = product_of(node)
    if product is None or len(product.operands) != 2:
        return None
    for (x, letters), (weight, own) in (product.operands, product.operands[::-1]):
        if len(own) != 3 or len(letters) < 3 or not weights_only(weight) or weights_only(x):
            continue
        head, depth = letters[-2], letters[-1]
        outputs = [c for c in own if c not in letters]
        if len(outputs) == 1 and {head, depth, *outputs} == set(own) and product.out == letters[:-1] + outputs[0]:
            return HeadProduct(x, weight, [own.index(c) for c in (head, outputs[0], depth)])
    return None
