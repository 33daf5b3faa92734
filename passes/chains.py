"""Products of three or more operands, and the trees in which they can be multiplied out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from passes.base import calls, is_call
from passes.contraction import CONTRACTIONS, Axis, NotLinear, Operand, Term, Value
from passes.lifting import lift
from passes.nodes import SOFTMAX, from_weights, is_probability

aten = torch.ops.aten
FORMS = ("expanded", "absorbed", "folded")
Subset = frozenset[int]
Tree = Any  # an operand's index, a Cut, or a pair of trees


@dataclass(frozen=True)
class Order:
    """One way to multiply a chain out: a tree per term."""

    trees: tuple[Tree, ...]
    form: str
    kept: bool  # exactly what the graph does already


@dataclass(eq=False)
class Chain:
    """A product of three or more operands that ends in `root`."""

    root: fx.Node
    value: Value
    weights: frozenset[fx.Node]
    context_axes: frozenset[Axis] = field(default_factory=frozenset)

    @cached_property
    def has_form(self) -> bool:
        """Is there a weight between two activations, so that there is something to expand or absorb?"""
        return any(self._between(term) for term in self.value.terms)

    def _between(self, term: Term) -> bool:
        kinds = [o.node in self.weights for o in term.operands]
        return kinds.count(False) >= 2 and kinds.count(True) >= 1 and bool(self.cached(term))

    def cached(self, term: Term) -> Subset:
        """The activation operands on the cached side of a term."""
        return frozenset(i for i, o in enumerate(term.operands) if self._is_cached(o))

    def _is_cached(self, operand: Operand) -> bool:
        return (
            operand.node not in self.weights
            and not is_probability(operand.node)
            and any(axis in self.context_axes for axis in operand.axes)
        )

    @cached_property
    def layout(self) -> list[Axis]:
        """The order in which products should keep their axes: the query's for scores, else the result's."""
        first = self.value.terms[0].operands[0]
        result = [axis for group in self.value.dims for axis in group]
        scores = any(axis in result for axis in self.context_axes)
        return [*first.axes, *result] if scores else result

    @cached_property
    def scores_axes(self) -> tuple[Axis, ...]:
        """The axes of the scores, where the chain computes them, or of the shares, where it reads them."""
        result = tuple(axis for group in self.value.dims for axis in group)
        if any(axis in result for axis in self.context_axes):
            return result
        shares = [o.axes for t in self.value.terms for o in t.operands if is_probability(o.node)]
        return shares[0] if shares else ()

    @cached_property
    def kept_axes(self) -> frozenset[Axis]:
        return frozenset(axis for group in self.value.dims for axis in group)

    def axes_of(self, term: Term, subset: Subset) -> tuple[Axis, ...]:
        """Axes that the product of a subset must keep: those of the result and of the other operands."""
        inside = dict.fromkeys(axis for i in sorted(subset) for axis in term.operands[i].axes)
        outside = {a for i, o in enumerate(term.operands) if i not in subset for a in o.axes}
        kept = [a for a in inside if a in outside or a in self.kept_axes]
        return tuple(sorted(kept, key=lambda a: self.layout.index(a) if a in self.layout else len(self.layout)))

    def form_of(self, term: Term, tree: Tree) -> str:
        cached, form = self.cached(term), "absorbed"
        for subset in subsets(tree, term):
            nodes = [term.operands[i].node in self.weights for i in subset]
            if all(nodes):
                return "folded"
            if subset & cached and any(nodes) and not self._meets_other_side(term, subset, cached):
                form = "expanded"
        return form

    def _meets_other_side(self, term: Term, subset: Subset, cached: Subset) -> bool:
        return any(i not in cached and term.operands[i].node not in self.weights for i in subset)

    def describe(self, order: Order) -> str:
        def spell(term: Term, tree: Tree) -> str:
            if isinstance(tree, int):
                return term.operands[tree].node.name
            if isinstance(tree, Cut):
                return tree.operand.node.name
            return "(" + " · ".join(spell(term, t) for t in tree) + ")"

        return " + ".join(spell(t, tree) for t, tree in zip(self.value.terms, order.trees, strict=True))


@dataclass(frozen=True)
class Cut:
    """A subset of operands whose product the graph computes already."""

    covered: Subset
    operand: Operand


def subsets(tree: Tree, term: Term) -> Iterator[Subset]:
    """The operand sets of all products below the top of a tree, those inside of cuts included."""
    for side in tree if isinstance(tree, tuple) else ():
        if isinstance(side, Cut):
            yield from (covered for covered, _ in term.cuts if covered <= side.covered)
        elif isinstance(side, tuple):
            yield leaves(side)
            yield from subsets(side, term)


def leaves(tree: Tree) -> Subset:
    if isinstance(tree, int):
        return frozenset((tree,))
    if isinstance(tree, Cut):
        return tree.covered
    return leaves(tree[0]) | leaves(tree[1])


def find_chains(graph: fx.Graph) -> list[Chain]:
    """All maximal products of three or more operands, in graph order."""
    weights = from_weights(graph)
    chains: list[Chain] = []
    inside: set[fx.Node] = set()
    for root in reversed(list(calls(graph, *CONTRACTIONS))):
        if root in inside or root in weights:
            continue
        value = lift(root)
        try:
            terms = value.terms
        except NotLinear:
            continue
        if all(len(t.operands) < 3 for t in terms) or any(len(t.operands) > 5 for t in terms):
            continue
        inside |= value.through
        chains.append(Chain(root, value, weights, frozenset(summed_by_softmax(root, value))))
    return chains[::-1]


def summed_by_softmax(root: fx.Node, value: Value) -> list[Axis]:
    """The axes over cached positions: those a softmax of the scores sums over, or those summed against one."""
    probabilities = [o for t in value.terms for o in t.operands if is_probability(o.node)]
    if probabilities:
        kept = {axis for group in value.dims for axis in group}
        return [a for o in probabilities for a in o.axes if a not in kept]
    softmax = next((n for n in elementwise_users(root) if is_call(n, *SOFTMAX)), None)
    if softmax is None:
        return []
    return list(value.dims[softmax.args[1] % len(value.dims)])


def elementwise_users(node: fx.Node, depth: int = 12) -> Iterator[fx.Node]:
    """Nodes reached from here through elementwise ops that keep the shape."""
    for user in node.users:
        yield user
        if depth and is_call(user, *KEEPS_SHAPE):
            yield from elementwise_users(user, depth - 1)


KEEPS_SHAPE = (
    aten.mul, aten.div, aten.add, aten.sub, aten.masked_fill, aten.where, aten._to_copy, aten.to, aten.clone,
)  # fmt: skip
