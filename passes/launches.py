"""Passes that put several steps into one launch, where a target has a kernel for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from codegen.targets import Target
from codegen.tuning import own_form
from passes.base import Context, Outcome, Pass, call, is_call, same_size, shape_of, sweep
from passes.nodes import CASTS, RESHAPES, settled, users, vocabulary_op

aten = torch.ops.aten

# Of a product in a kernel that streams its weight. Kernels take more, and leave them to the library one by one, which
# a compiler that sees the product does for less, and fuses what follows.
FEW_ROWS = 16
SIZED = (aten.view, aten.reshape, aten._unsafe_view)  # which are told every size
REGROUPINGS = (*RESHAPES, aten.unsqueeze, aten.squeeze)


@dataclass(frozen=True)
class FuseLaunches(Pass):
    """Base: one node after the other is looked at, and becomes part of a call of `op`.

    Elsewhere than on a target with a kernel of its own for `op` the separate steps stay, since nothing is gained.
    """

    op: ClassVar[str]

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        outcome, graph = Outcome(), graph_module.graph
        missing = self.lacks(context.target)
        for node in list(graph.nodes):
            if node._erased or node.op != "call_function":
                continue
            reason = self.when(node)
            if reason is None:
                reason = missing
            if reason is None:
                reason = self.outside(node, context)
            if reason is None:
                outcome.matches.append(self.rewrite(graph, node))
            elif reason:
                outcome.refuse(node, reason)
        sweep(graph_module)
        return outcome

    def lacks(self, target: Target) -> str | None:
        """Why a target has no use for the fused op, or None."""
        return None if own_form(self.op, target) else f"{target.name} has no kernel of its own for {self.op}"

    def when(self, node: fx.Node) -> str | None:
        """The reason for leaving a node alone, '' if it is none worth telling, or None."""
        raise NotImplementedError

    def outside(self, node: fx.Node, context: Context) -> str | None:
        """Why a node is left alone in the work that the graph is for: as `when`."""
        return None

    def rewrite(self, graph: fx.Graph, node: fx.Node) -> str:
        """Put the fused call in the node's place; returns a line of prose."""
        raise NotImplementedError


def runs_kernel(node: Any, target: Target) -> bool:
    """Is the node a call for which the target has a kernel of its own?"""
    op = vocabulary_op(node)
    return op is not None and own_form(op, target) is not None


def why_not_few(product: fx.Node, sizes: Sequence[Any], context: Context) -> str | None:
    """The reason why a product of so many tokens, by axis, has not few rows; '' in prefill, where that goes without
    saying; or None."""
    if context.phase == "decode":
        return None
    rows = math.prod(sizes)
    if has_many_rows(sizes, context):
        return "" if context.phase == "prefill" else f"{product.name} has {rows} rows; up to {FEW_ROWS} are few"
    return None if isinstance(rows, int) else f"nothing says that {product.name} has few rows"


def has_many_rows(sizes: Sequence[Any], context: Context) -> bool:
    """Is a product of so many tokens, by axis, known to have more rows than are few?"""
    rows = math.prod(sizes)
    return context.phase == "prefill" or (isinstance(rows, int) and rows > FEW_ROWS)


def regrouped_from(value: Any) -> tuple[Any, list[fx.Node]]:
    """The node behind views that only regroup rows (the last axis stays), and those views from the inside out."""
    views: list[fx.Node] = []
    while is_call(value, *REGROUPINGS, *CASTS) and _keeps_rows(value):
        views.insert(0, value)
        value = value.args[0]
    return value, views


def _keeps_rows(view: fx.Node) -> bool:
    source = view.args[0]
    if is_call(view, *CASTS):
        return settled(view) is not view
    return min(len(shape_of(source)), len(shape_of(view))) > 0 and same_size(shape_of(source)[-1], shape_of(view)[-1])


def regroup(graph: fx.Graph, value: fx.Node, views: list[fx.Node]) -> fx.Node:
    """The same views of another value."""
    for view in views:
        value = call(graph, view.target, value, *view.args[1:], like=view, **view.kwargs)
    return value


def regroup_like(graph: fx.Graph, value: fx.Node, views: list[fx.Node]) -> fx.Node:
    """The same grouping of rows of another width and dtype."""
    for view in views:
        if is_call(view, *SIZED):
            value = call(graph, view.target, value, [*view.args[1][:-1], shape_of(value)[-1]], like=view)
        elif not is_call(view, *CASTS):
            value = call(graph, view.target, value, *view.args[1:], like=view, **view.kwargs)
    return value


def only_reader(node: fx.Node, views: list[fx.Node], reader: fx.Node) -> str | None:
    """None if nobody but `reader` sees the node, through these views or without; else who does."""
    for one in (node, *views):
        others = [user for user in users(one) if user is not reader and user not in views]
        if others:
            return f"{one.name} is used by {others[0].name} as well"
    return None
