"""Products that share their input become one product with the weights side by side."""

from __future__ import annotations

import operator
import string
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.base import Context, Outcome, Pass, call, is_call, shape_of, sweep, told
from passes.nodes import CASTS, RESHAPES, bring_before, dtype_of, erase_dead, from_weights, settled, users, weights_only
from passes.products import product_of

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


@dataclass(frozen=True)
class Projection:
    """A product of one input with a weight, and the axes along which it can grow."""

    node: fx.Node
    form: tuple[Any, ...]  # equal for products that may be merged
    weights: tuple[fx.Node, ...]  # the weight, and the bias if there is one
    axis: int  # of the weight: its own outputs
    out_axis: int  # of the product

    @property
    def width(self) -> int:
        return shape_of(self.weights[0])[self.axis]


@dataclass(frozen=True)
class MergeProjections(Pass):
    """a = x · Waᵀ                 a, b = split(x · [Wa; Wb]ᵀ)
       b = x · Wbᵀ           →

    The same for grouped products and einsums with one weight. Only weights are put side by side, so that it is done
    once, when they are bound. On a GPU a router's product stays apart, so that a shared expert, which reads the same
    tokens, can join the others.
    """  # fmt: skip

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        outcome, graph = Outcome(), graph_module.graph
        families: dict[Any, list[Projection]] = {}
        weights = from_weights(graph)
        for node in graph.nodes:
            projection = projection_of(node)
            if projection is not None and weights.issuperset(projection.weights):
                families.setdefault(projection.form, []).append(projection)
        for siblings in families.values():
            if len(siblings) > 1 and context.target.backend != "cpu":
                siblings = without_routers(siblings, outcome)
            if len(siblings) > 1:
                outcome.matches.append(merge(graph, siblings))
        sweep(graph_module)
        return outcome


def without_routers(siblings: list[Projection], outcome: Outcome) -> list[Projection]:
    """Those that not only a routing reads; the outcome says which were left."""
    others = []
    for sibling in siblings:
        if only_routes(sibling.node):
            outcome.refuse(sibling.node, "a router's product stays apart, so that shared experts can join the others")
        else:
            others.append(sibling)
    return others


def only_routes(node: fx.Node) -> bool:
    """Is a value read by routings alone, through casts and views?"""
    readers = users(node)
    passing = (*CASTS, *RESHAPES)
    return bool(readers) and all(is_call(r, dsv3.route) or (is_call(r, *passing) and only_routes(r)) for r in readers)


def projection_of(node: fx.Node) -> Projection | None:
    """Read a node as a product of an input with a weight (whether it is one, the caller checks)."""
    if is_call(node, aten.linear):
        return _linear(node)
    if is_call(node, dsv3.grouped_linear):
        return _grouped_linear(node)
    return _einsum(node) if is_call(node, aten.einsum) else None


def _linear(node: fx.Node) -> Projection | None:
    x, *weights = (argument for argument in node.args if argument is not None)
    if len(shape_of(weights[0])) != 2:
        return None
    form = (node.target, settled(x), *(dtype_of(w) for w in weights))
    return Projection(node, form, tuple(weights), 0, len(shape_of(node)) - 1)


def _grouped_linear(node: fx.Node) -> Projection:
    x, weight, offsets = node.args
    return Projection(node, (node.target, x, offsets, dtype_of(weight)), (weight,), 1, 1)


def _einsum(node: fx.Node) -> Projection | None:
    product = product_of(node)
    if product is None or len(product.operands) != 2:
        return None
    for (x, letters_x), (weight, letters_w) in (product.operands, product.operands[::-1]):
        own = [c for c in letters_w if c not in letters_x]
        if own and all(c in product.out for c in own) and weights_only(weight) and not weights_only(x):
            grown = own[-1]
            letters = string.ascii_lowercase
            names = dict(zip(dict.fromkeys(letters_x + letters_w + product.out), letters, strict=False))
            spelled = tuple("".join(names[c] for c in one) for one in (letters_x, letters_w, product.out))
            fixed = tuple(size for c, size in zip(letters_w, shape_of(weight), strict=True) if c != grown)
            form = (node.target, settled(x), spelled, fixed, dtype_of(weight))
            return Projection(node, form, (weight,), letters_w.index(grown), product.out.index(grown))
    return None


def merge(graph: fx.Graph, siblings: list[Projection]) -> str:
    """Put one product where the first of the siblings is; returns a line of prose."""
    first = siblings[0]
    for sibling in siblings[1:]:
        for weight in sibling.weights:
            bring_before(first.node, weight)
    with graph.inserting_before(first.node):
        columns = zip(*(sibling.weights for sibling in siblings), strict=True)
        merged = [
            call(graph, aten.cat.default, list(column), 0 if i else first.axis, like=first.node)
            for i, column in enumerate(columns)
        ]
        swapped = dict(zip(first.weights, merged, strict=True))
        args = fx.node.map_arg(first.node.args, lambda node: swapped.get(node, node))
        product = call(graph, first.node.target, *args, like=first.node)
        widths = [sibling.width for sibling in siblings]
        split = call(graph, aten.split_with_sizes.default, product, widths, first.out_axis, like=first.node)
        parts = [call(graph, operator.getitem, split, i, like=s.node) for i, s in enumerate(siblings)]
    names = ", ".join(sibling.node.name for sibling in siblings)
    for sibling, part in zip(siblings, parts, strict=True):
        sibling.node.replace_all_uses_with(part)
        erase_dead(graph, sibling.node)
    return told(names, product)
