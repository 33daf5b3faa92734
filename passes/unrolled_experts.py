"""Experts that a loop over all of them left behind: products apart from each other, each with a weight of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from passes.base import is_call
from passes.nodes import from_weights, uncast
from passes.pair_numbers import chosen_experts

aten = torch.ops.aten

PRODUCTS = (aten.linear, aten.mm, aten.addmm, aten.matmul, aten.einsum)


def unrolled_experts(graph: fx.Graph) -> Iterator[tuple[fx.Node, int]]:
    """For every top-k of experts whose scores multiply several products: the first of these, and how many there are."""
    behind: dict[fx.Node, fx.Node] = {}  # the last top-k that a value depends on
    weighted: dict[fx.Node, list[fx.Node]] = {}
    weights = from_weights(graph)
    number = {node: position for position, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if chosen_experts(node) is not None:
            behind[node] = node
            continue
        above = {one: behind[one] for one in node.all_input_nodes if one in behind}
        if above:
            behind[node] = max(above.values(), key=number.__getitem__)
        if is_call(node, aten.mul.Tensor) and len(node.all_input_nodes) == 2:
            for gate, value in (node.args, node.args[::-1]):
                product, chosen = uncast(value), above.get(gate)
                own = is_call(product, *PRODUCTS) and not weights.isdisjoint(product.all_input_nodes)
                if chosen is not None and above.get(value) is not chosen and own:
                    weighted.setdefault(chosen, []).append(node)
    yield from ((nodes[0], len(nodes)) for nodes in weighted.values() if len(nodes) > 1)
