"""Grouped products that are left in a library's own form, in ours: a graph needs nobody else's ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from passes.base import Context, Outcome, Pass, call, same_size, shape_of, sweep
from passes.grouped_calls import GroupedCall, grouped_call
from passes.layouts import Layouts
from passes.nodes import cast, substitute
from passes.pair_numbers import PAIR, PairNumbers, chosen_behind
from passes.rewrite import matched

dsv3 = torch.ops.dsv3


@dataclass(frozen=True)
class AdoptGroupedProducts(Pass):
    """their_grouped_product(rows, W, offsets)   →   grouped_linear(rows, Wᵀ, offsets)

    For experts in which `group-experts` found no whole. The offsets must count every row: libraries differ in what
    they leave in the others.
    """

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        outcome, graph = Outcome(), graph_module.graph
        for node in list(graph.nodes):
            found = grouped_call(node)
            if found is None:
                continue
            if not counts_rows(found):
                outcome.refuse(node, f"the offsets {found.offsets.name} are not known to count all rows")
                continue
            with graph.inserting_before(node):
                new = adopted(graph, node, found)
            outcome.matches.append(matched(node, new))
            substitute(graph, node, new)
        sweep(graph_module)
        return outcome


def counts_rows(found: GroupedCall) -> bool:
    """Do the offsets count the pairs of tokens and chosen experts, and are those the rows?"""
    chosen = chosen_behind(found.offsets)
    if chosen is None:
        return False
    numbers = PairNumbers(chosen)
    sizes = shape_of(found.rows)[0], shape_of(found.stack)[0]
    return all(map(same_size, sizes, (numbers.sizes[PAIR], numbers.experts))) and numbers.counted_by(found.offsets)


def adopted(graph: fx.Graph, node: fx.Node, found: GroupedCall) -> fx.Node:
    stack = Layouts(graph, node).permuted(found.stack, [0, 2, 1])
    offsets = cast(graph, found.offsets, torch.int32)
    return call(graph, dsv3.grouped_linear.default, found.rows, stack, offsets, like=node)
