"""A norm's weight inside the weights of the products that read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from passes.base import call, is_call, source_line
from passes.launches import FuseLaunches
from passes.nodes import dtype_of, erase_dead, settled, users, weights_only, why_no_product

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


@dataclass(frozen=True)
class FoldNormWeights(FuseLaunches):
    """rms_norm(x, w, ε) · Wᵀ    →    linear(x, W · diag(w), ε)

    Exact in real arithmetic; the new weight is computed once, when weights are bound, and rounded to the dtype of the
    old. Only where products with weights are all that reads the norm: otherwise it is computed anyway.
    """

    op: ClassVar[str] = "linear"

    def when(self, node: fx.Node) -> str | None:
        if not is_call(node, dsv3.rms_norm):
            return ""
        products = users(node)
        if not any(is_call(product, aten.linear) for product in products):
            return ""
        if not weights_only(node.args[1]):
            return f"{node.args[1].name} is no weight"
        for product in products:
            if not is_call(product, aten.linear) or settled(product.args[0]) is not node:
                return f"{node.name} is read by {product.name}, which is no product with a weight"
            reason = why_no_product(product)
            if reason is not None:
                return reason
            if dtype_of(product.args[1]) != dtype_of(node.args[1]):
                return f"{node.args[1].name} and {product.args[1].name} differ in dtype"
        return None

    def rewrite(self, graph: fx.Graph, node: fx.Node) -> str:
        x, norm_weight, eps = node.args
        names = []
        for product in users(node):
            with graph.inserting_before(product):
                folded = call(graph, aten.mul.Tensor, product.args[1], norm_weight, like=node)
                new = call(graph, dsv3.linear.default, x, folded, eps, like=product)
            product.replace_all_uses_with(new)
            names.append(f"{node.name}, {product.name} → {new.name}")
            erase_dead(graph, product)
        where = source_line(new)
        return "; ".join(names) + (f" ({where})" if where else "")
