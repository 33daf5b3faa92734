"""Weights summed over one-hot choices → the scatter that they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from passes.base import Context, Outcome, Pass, call, is_call, shape_of
from passes.counts import one_hot_indices, uncast_integers
from passes.distinct import distinct
from passes.nodes import dtype_of, is_tensor, uncast
from passes.pair_numbers import chosen_experts
from passes.products import BROADCAST, Product, product_of
from passes.rewrite import matched

aten = torch.ops.aten


@dataclass(frozen=True)
class ScatterOneHots(Pass):
    """Σ_k one_hot(indices)[n, k, e] · weights[n, k]  →  scatter_add(0, −1, indices, weights)[n, e]
       Σ_k one_hot(indices)[n, k, e]                  →  scatter(0, −1, indices, 1)[n, e], of different indices

    A one-hot is the op, or the comparison of every index with 0, 1, …; the sum is an einsum, or one over a product. So
    gates of experts and masks of groups are written often, and other passes read scatters.
    """  # fmt: skip

    prepares: ClassVar[bool] = True

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        graph, outcome = graph_module.graph, Outcome()
        for node in filter(is_tensor, list(graph.nodes)):
            choice = read_choice(node)
            if choice is not None:
                with graph.inserting_before(node):
                    new = choice.scattered(graph, node)
                node.replace_all_uses_with(new)
                outcome.matches.append(matched(node, new))
        graph.eliminate_dead_code()
        return outcome


@dataclass(frozen=True)
class Choice:
    """out = Σ over `chosen` of one_hot(indices)[letters] · weights[own]; without weights they are ones."""

    indices: fx.Node
    letters: str  # of the one-hot: those of the indices, and the expert
    weights: fx.Node | None
    own: str
    chosen: str
    out: str

    def scattered(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        places, expert = self.letters[:-1], self.letters[-1]
        tokens, experts = places.replace(self.chosen, ""), shape_of(node)[self.out.index(expert)]
        indices = _arranged(graph, self.indices, places, tokens + self.chosen)
        if dtype_of(indices) != torch.int64:
            indices = call(graph, aten._to_copy.default, indices, dtype=torch.int64, like=node)
        sizes = [
            size if isinstance(size, int) else call(graph, aten.sym_size.int, indices, dim)
            for dim, size in enumerate(shape_of(indices)[:-1])
        ]
        like = {"dtype": dtype_of(node), "device": node.meta["val"].device}
        zeros = call(graph, aten.zeros.default, [*sizes, experts], **like)
        if self.weights is None:
            found = call(graph, aten.scatter.value, zeros, len(tokens), indices, 1, like=node)
        else:
            weights = _arranged(graph, self.weights, self.own, tokens + self.chosen)
            if dtype_of(weights) != dtype_of(node):
                weights = call(graph, aten._to_copy.default, weights, dtype=dtype_of(node), like=node)
            found = call(graph, aten.scatter_add.default, zeros, len(tokens), indices, weights, like=node)
        return _arranged(graph, found, tokens + expert, self.out)


def read_choice(node: fx.Node) -> Choice | None:
    product = summed_product(node)
    if product is None or len(product.operands) > 2 or len(product.summed()) != 1 or BROADCAST in product.out:
        return None
    (chosen,) = product.summed()
    if len(product.operands) == 1:
        ((hot, letters),) = product.operands
        indices = scattered_indices(hot)
        if indices is None or chosen == letters[-1] or not distinct(indices, letters.index(chosen)):
            return None
        return Choice(indices, letters, None, "", chosen, product.out)
    for (hot, letters), (weights, own) in (product.operands, product.operands[::-1]):
        indices = scattered_indices(hot)
        spelled = own.replace(BROADCAST, "")
        fits = (
            indices is not None
            and BROADCAST not in letters
            and sorted(spelled) == sorted(letters[:-1])
            and chosen in spelled
            and sorted(product.out) == sorted(letters.replace(chosen, ""))
        )
        if fits and dtype_of(weights).is_floating_point and dtype_of(node).is_floating_point:
            return Choice(indices, letters, weights, own, chosen, product.out)
    return None


def summed_product(node: fx.Node) -> Product | None:
    """A product, or a sum over one, as one product; or a sum."""
    product = product_of(node)
    if product is None or len(product.operands) != 1:
        return product
    ((source, letters),) = product.operands
    inner = product_of(uncast(source))
    if inner is None or inner.summed() or len(inner.operands) < 2:
        return product
    names = dict(zip(inner.out, letters, strict=True)) | {BROADCAST: BROADCAST}
    return Product(tuple((x, "".join(names[c] for c in own)) for x, own in inner.operands), product.out)


def scattered_indices(hot: fx.Node) -> fx.Node | None:
    """What a one-hot over its last axis is of.

    A comparison is one of a top-k's choices only: another index may be none of the numbers, which no scatter takes.
    """
    indices = one_hot_indices(hot)
    if indices is None or is_call(uncast_integers(hot), aten.one_hot):
        return indices
    return indices if chosen_experts(indices) == shape_of(hot)[-1] else None


def _arranged(graph: fx.Graph, node: fx.Node, letters: str, wanted: str) -> fx.Node:
    """The node without dims of size one, its others in the wanted order."""
    for dim in reversed([d for d, letter in enumerate(letters) if letter == BROADCAST]):
        node = call(graph, aten.squeeze.dim, node, dim, like=node)
    letters = letters.replace(BROADCAST, "")
    order = [letters.index(letter) for letter in wanted]
    return node if order == sorted(order) else call(graph, aten.permute.default, node, order, like=node)
