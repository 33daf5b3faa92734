"""A residual sum inside the product that it is added to."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from passes.base import Context, call, is_call, shape_of, told
from passes.fuse_norm import is_residual_sum
from passes.launches import FuseLaunches, has_many_rows, only_reader, regroup, regrouped_from, why_not_few
from passes.nodes import dtype_of, erase_dead, same_shape, why_no_product

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


@dataclass(frozen=True)
class Sum:
    """residual + a product, seen through views that regroup its rows."""

    product: fx.Node
    views: list[fx.Node]
    residual: fx.Node


@dataclass(frozen=True)
class FuseResidual(FuseLaunches):
    """r + x · Wᵀ                          linear(x, W, residual=r)
       r + routed_swiglu(x, …)       →     routed_swiglu(x, …, residual=r)
       n, s = add_rms_norm(r, x · Wᵀ)      s = linear(x, W, residual=r);  n = rms_norm(s)

    Not where somebody else reads the product, nor of a product of many rows before a norm: the library's product copies
    a residual before it adds, and the norm reads it anyway. Where two products are added, the later one takes the sum.
    Unless `many`, nor of any product that is not known to have few rows: whoever compiles the rest fuses the sum with
    what reads it.
    """  # fmt: skip

    op: ClassVar[str] = "linear"
    many: bool = True

    def when(self, node: fx.Node) -> str | None:
        if not is_call(node, dsv3.add_rms_norm) and not is_residual_sum(node):
            return ""
        sums = sums_of(node)
        if not sums:
            return ""
        reasons = [why_not(one, node) for one in sums]
        return None if None in reasons else reasons[0]

    def outside(self, node: fx.Node, context: Context) -> str | None:
        product = first_that_fits(node).product
        if not is_call(product, aten.linear):
            return None
        if not self.many:
            return why_not_few(product, shape_of(product)[:-1], context)
        if not is_call(node, dsv3.add_rms_norm):
            return None
        if not has_many_rows(shape_of(product)[:-1], context):
            return None
        return f"{product.name} has many rows, and {node.name} reads the residual anyway"

    def rewrite(self, graph: fx.Graph, node: fx.Node) -> str:
        one = first_that_fits(node)
        with graph.inserting_before(node):
            residual = one.residual
            if len(shape_of(one.product)) != len(shape_of(residual)):
                residual = call(graph, aten.flatten.using_ints, residual, 0, -2, like=node)
            if is_call(one.product, dsv3.routed_swiglu):
                known = one.product.args
                total = call(graph, dsv3.routed_swiglu.default, *known[:5], residual, *known[6:], like=one.product)
            else:
                total = call(graph, dsv3.linear.default, *one.product.args[:2], None, residual, like=one.product)
            summed = regroup(graph, total, one.views)
            if is_call(node, dsv3.add_rms_norm):
                normed = call(graph, dsv3.rms_norm.default, summed, *node.args[2:], like=node)
        if is_call(node, dsv3.add_rms_norm):
            for half in list(node.users):
                half.replace_all_uses_with((normed, summed)[half.args[1]])
                erase_dead(graph, half)
        else:
            node.replace_all_uses_with(summed)
            erase_dead(graph, node)
        return told(node.name, total)


def sums_of(node: fx.Node) -> list[Sum]:
    """The sides of a residual sum that are products with weights, the later product first."""
    found = []
    for value, residual in (node.args[:2], node.args[1::-1]):
        product, views = regrouped_from(value)
        if is_call(product, dsv3.routed_swiglu, aten.linear):
            found.append(Sum(product, views, residual))
    return sorted(found, key=lambda one: one.product, reverse=True)


def first_that_fits(node: fx.Node) -> Sum:
    return next(one for one in sums_of(node) if why_not(one, node) is None)


def why_not(one: Sum, node: fx.Node) -> str | None:
    product = one.product
    if is_call(product, dsv3.routed_swiglu):
        if len(product.args) > 5 and product.args[5] is not None:
            return f"{product.name} has a residual already"
    else:
        reason = why_no_product(product)
        if reason is not None:
            return reason
    if dtype_of(product) != dtype_of(one.residual):
        return f"{product.name} and {one.residual.name} differ in dtype"
    if len(shape_of(product)) != 2 and not same_shape(product, one.residual):
        return f"rows of {product.name} and {one.residual.name} are grouped differently"
    if is_call(node, dsv3.add_rms_norm) and not all(user.target is operator.getitem for user in node.users):
        return f"the results of {node.name} are not read one by one"
    return only_reader(product, one.views, node)
