"""The router's product in the launch of the norm before it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from codegen.ops.registry import compute_dtype
from passes.base import call, is_call, told
from passes.launches import FuseLaunches, regroup_like, regrouped_from
from passes.nodes import bring_before, dtype_of, erase_dead, uncast, users, weights_only, why_no_product
from passes.stream_products import streamed

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


@dataclass(frozen=True)
class FuseRouter(FuseLaunches):
    """n = rms_norm(x, w, ε)                        n, z = norm_router(x, w, ε, W)
       z = float(n) · float(W)ᵀ               →

       n, s = add_rms_norm(x, r, w, ε)              z = linear(n, W, exact)
       z = float(n) · float(W)ᵀ               →

    Where others read the norm as well: a norm that only products read is better folded into their weights, or left to
    a launch of its own.
    """  # fmt: skip

    op: ClassVar[str] = "norm_router"

    def when(self, node: fx.Node) -> str | None:
        if not is_call(node, aten.linear, dsv3.linear):
            return ""
        norm, views = regrouped_from(uncast(node.args[0]))
        summed = is_call(norm, operator.getitem) and norm.args[1] == 0 and is_call(norm.args[0], dsv3.add_rms_norm)
        if not is_call(norm, dsv3.rms_norm) and not (summed and is_call(node, aten.linear)):
            return ""
        if all(is_call(reader, aten.linear, dsv3.linear, dsv3.linear_pair) for reader in readers(norm, views)):
            return ""
        if dtype_of(node) != compute_dtype(norm.meta["val"]):
            return f"{node.name} is rounded to {dtype_of(node)}"
        if is_call(node, dsv3.linear) and any(one is not None for one in node.args[2:4]):
            return f"{node.name} is more than a product"
        if not summed and not weights_only(norm.args[1]):
            return f"{norm.args[1].name} is no weight"
        return why_no_product(node)

    def rewrite(self, graph: fx.Graph, node: fx.Node) -> str:
        norm, views = regrouped_from(uncast(node.args[0]))
        if not is_call(norm, dsv3.rms_norm):
            return told(node.name, streamed(graph, node))
        weight = uncast(node.args[1])
        bring_before(norm, weight)
        bring_before(norm, norm.args[1])
        with graph.inserting_before(norm):
            both = call(graph, dsv3.norm_router.default, *norm.args, weight, like=node)
            normed, logits = (call(graph, operator.getitem, both, i, like=node) for i in (0, 1))
        with graph.inserting_before(node):
            regrouped = regroup_like(graph, logits, views)
        norm.replace_all_uses_with(normed)
        node.replace_all_uses_with(regrouped)
        for dead in (node, norm):
            if not dead._erased:
                erase_dead(graph, dead)
        return told(node.name, both)


def readers(norm: fx.Node, views: list[fx.Node]) -> list[fx.Node]:
    """Who reads the norm, through these views and through casts that lose nothing."""
    found = [user for one in (norm, *views) for user in users(one) if user not in views]
    return [reader for one in found for reader in (users(one) if uncast(one) is not one else [one])]
