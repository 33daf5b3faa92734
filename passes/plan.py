"""Pricing the orders of a block's chains, and choosing the cheapest."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import fx

from passes.base import Context, Role, ancestors, placeholders
from passes.chains import Chain, Cut, Order, Subset, Tree, leaves, subsets
from passes.contraction import Axis, Term
from passes.cost import concrete_sizes, node_costs
from passes.nodes import is_probability
from passes.regions import Region, groups_of

MOST_COMBINATIONS = 4096  # of the orders of one group that are all tried


class NoSuchForm(ValueError):
    """A chain that cannot be multiplied in the form asked for: with a single head there is nothing to fold."""


@dataclass(frozen=True)
class Price:
    """What one order of one chain costs; equal keys are the same thing, paid once by all chains."""

    seconds: dict[Any, float] = field(default_factory=dict)  # by product
    folded: dict[Any, int] = field(default_factory=dict)  # bytes, by product of weights, stored besides the weights
    feeds: list[fx.Node] = field(default_factory=list)  # what the products read


def together(parts: Iterable[dict[Any, Any]]) -> dict[Any, Any]:
    return {key: value for part in parts for key, value in part.items()}


class Plan:
    """Prices combinations of orders at one workload: new products plus whatever the graph still has to compute."""

    def __init__(self, graph: fx.Graph, chains: list[Chain], context: Context) -> None:
        self.graph, self.chains, self.context = graph, chains, context
        self.size = concrete_sizes(graph, context.workload)
        self.node_seconds = {n: float(c.seconds(context.target)) for n, c in node_costs(graph, self.size).items()}
        self.groups = groups_of(chains)
        self.regions = [Region.of(group) for group in self.groups]
        self.inside = frozenset().union(*(region.nodes for region in self.regions))
        rest = sum(seconds for node, seconds in self.node_seconds.items() if node not in self.inside)
        self.rest_seconds = rest / max(len(self.groups), 1)  # of the graph around a group
        self.form_seconds: dict[Chain, dict[str, float]] = {}  # of the block, with a chain's whole group in one form

    def choose(self, wanted: list[str], storage_growth: float) -> list[Order]:
        """The cheapest combination; `wanted` restricts the chains that have a form.

        Chains that share neither a computed value nor a softmax are decided apart from each other.
        """
        forms = iter(wanted)
        options = {chain: self._options(chain, next(forms) if chain.has_form else "auto") for chain in self.chains}
        budget = storage_growth * sum(self._bytes(n) for n in placeholders(self.graph, Role.WEIGHT))
        chosen: dict[Chain, Order] = {}
        for group, region in zip(self.groups, self.regions, strict=True):
            limit = None if "folded" in wanted else budget
            orders = self._cheapest(group, region, [options[chain] for chain in group], limit)
            folded = together(self._priced(*pair).folded for pair in zip(group, orders, strict=True))
            budget -= sum(folded.values())
            chosen.update(zip(group, orders, strict=True))
        return [chosen[chain] for chain in self.chains]

    def _cheapest(
        self, group: list[Chain], region: Region, options: list[list[Order]], budget: float | None
    ) -> list[Order]:
        """The cheapest combination of one group whose folded weights need at most `budget` bytes."""
        tagged = [[(o, self._priced(chain, o)) for o in some] for chain, some in zip(group, options, strict=True)]
        first = [option[0] for option in tagged]
        if prod(len(o) for o in options) <= MOST_COMBINATIONS:
            combos: Iterator[tuple[tuple[Order, Price], ...]] = itertools.product(*tagged)
        else:  # too many to try them all: at most one chain leaves its first order
            combos = (tuple(first[:i] + [o] + first[i + 1 :]) for i, option in enumerate(tagged) for o in option)
        priced: list[tuple[float, int, int, tuple[Order, ...]]] = []
        form_seconds: dict[str, float] = {}
        for candidate in combos:
            combo, parts = zip(*candidate, strict=True)
            if budget is not None and sum(together(part.folded for part in parts).values()) > budget:
                continue
            changes = sum(not o.kept for o in combo)
            spared = {chain.root: part.feeds for chain, part in zip(group, parts, strict=True)}
            seconds = self.rest_seconds + sum(self.node_seconds.get(n, 0.0) for n in region.computed(spared))
            seconds += sum(together(part.seconds for part in parts).values())
            priced.append((float(f"{seconds:.4g}"), changes, len(priced), combo))
            forms_taken = {o.form for chain, o in zip(group, combo, strict=True) if chain.has_form}
            if len(forms_taken) == 1:
                (form,) = forms_taken
                form_seconds[form] = min(seconds, form_seconds.get(form, seconds))
        self.form_seconds.update(dict.fromkeys(group, form_seconds))
        return list(min(priced)[-1]) if priced else [order for order, _ in first]

    def why_kept(self, chain: Chain, order: Order) -> str:
        """Why the order of the graph was left as it is, naming the edge that decided it."""
        cached = {term.operands[i].node for term in chain.value.terms for i in chain.cached(term)}
        for node in sorted(chain.value.through - {chain.root}) if order.form == "expanded" else ():
            user = next((u for u in node.users if u not in self.inside), None)
            if user is not None and cached & ancestors(node):
                return f"stays expanded: {node.name} is used by {user.name} as well and must be computed anyway"
        size, form_seconds = self.context.workload, self.form_seconds[chain]
        own = form_seconds.get(order.form)
        others = [(form, seconds / own) for form, seconds in form_seconds.items() if own and form != order.form]
        dearer = "".join(f"; {form}, the block would take {times:.2f} times as long" for form, times in sorted(others))
        if self.context.phase == "any":
            return f"stays {order.form}, the cheapest order at the traced sizes{dearer}"
        at = f"B={size.batch} S={size.queries} T={size.context}"
        return f"stays {order.form}, the cheapest order in {self.context.phase} at {at}{dearer}"

    def _options(self, chain: Chain, form: str) -> list[Order]:
        orders = self._orders(chain)
        if form != "auto":
            fitting = [o for o in orders if o.form == form]
            if not fitting:
                raise NoSuchForm(f"order-contractions: {chain.root.name} has no {form} form")
            orders = fitting
        return sorted(orders, key=lambda o: not o.kept)

    def _orders(self, chain: Chain) -> list[Order]:
        per_term = [list(self._trees(chain, t, frozenset(range(len(t.operands))))) for t in chain.value.terms]
        orders = []
        for trees in itertools.product(*per_term):
            forms = [
                chain.form_of(t, tree) for t, tree in zip(chain.value.terms, trees, strict=True) if chain._between(t)
            ]
            form = next((f for f in ("folded", "expanded") if f in forms), "absorbed") if forms else "auto"
            if len(set(forms)) > 1 and "folded" not in forms:
                continue
            kept = all(is_original(t, tree) for t, tree in zip(chain.value.terms, trees, strict=True))
            orders.append(Order(trees, form, kept))
        return orders

    def _trees(self, chain: Chain, term: Term, subset: Subset) -> Iterator[Tree]:
        """All binary trees over a subset; a product that the graph computes may stand for itself."""
        cut = next((Cut(covered, o) for covered, o in term.cuts if covered == subset), None)
        if len(subset) == 1:
            yield next(iter(subset))
            return
        if cut is not None and not any(is_probability(term.operands[i].node) for i in subset):
            yield cut
            if len(subset) == 2:  # computing the same product once more cannot be better
                return
        first, *rest = sorted(subset)
        for k in range(len(rest) + 1):
            for others in itertools.combinations(rest, k):
                left = frozenset((first, *others))
                right = subset - left
                if right and set(chain.axes_of(term, left)) & set(chain.axes_of(term, right)):
                    for a in self._trees(chain, term, left):
                        for b in self._trees(chain, term, right):
                            yield (a, b)

    def _priced(self, chain: Chain, order: Order) -> Price:
        price, target = Price(), self.context.target
        products: dict[Any, tuple[float, float]] = {}  # FLOPs and bytes
        item = chain.root.meta["val"].element_size()
        for term, tree in zip(chain.value.terms, order.trees, strict=True):
            self._price(chain, term, tree, products, price.feeds)
            for subset in subsets(tree, term):
                if len(subset) > 1 and all(term.operands[i].node in chain.weights for i in subset):
                    key = frozenset((term.operands[i].node, term.operands[i].steps) for i in subset)
                    price.folded[key] = self._volume(chain.axes_of(term, subset)) * item
        for key, (flops, moved) in products.items():
            price.seconds[key] = max(flops / target.flops, moved / target.bandwidth)
        return price

    def _price(
        self, chain: Chain, term: Term, tree: Tree, products: dict[Any, tuple[float, float]], feeds: list[fx.Node]
    ) -> tuple[tuple[Axis, ...], bool]:
        """Add up the products of a tree; returns the axes of its result and whether it is made of weights alone."""
        if isinstance(tree, (int, Cut)):
            operand = term.operands[tree] if isinstance(tree, int) else tree.operand
            feeds.append(operand.node)
            return operand.axes, operand.node in chain.weights
        sides = [self._price(chain, term, side, products, feeds) for side in tree]
        out = chain.axes_of(term, leaves(tree))
        if all(weights for _, weights in sides):
            return out, True
        item = chain.root.meta["val"].element_size()
        flops = 2 * self._volume(dict.fromkeys(axis for axes, _ in sides for axis in axes))
        moved = 0 if self._is_scores(chain, out) else self._volume(out) * item
        for side, (axes, _) in zip(tree, sides, strict=True):
            if self._is_scores(chain, axes):
                continue
            if self._is_scores(chain, out) or any(self._is_scores(chain, other) for other, _ in sides):
                # the attention kernel loads what scores and values share once
                products["read", self._identity(term, side)] = (0, self._volume(axes) * item)
            else:
                moved += self._volume(axes) * item
        products["product", frozenset(self._identity(term, i) for i in leaves(tree))] = (flops, moved)
        return out, False

    def _is_scores(self, chain: Chain, axes: tuple[Axis, ...]) -> bool:
        """Scores and shares have heads or queries besides cached positions; an attention kernel never stores them."""
        scores = chain.scores_axes
        return bool(scores) and set(scores) == set(axes)

    def _identity(self, term: Term, tree: Tree) -> Any:
        if isinstance(tree, int):
            return (term.operands[tree].node, term.operands[tree].steps)
        if isinstance(tree, Cut):
            return (tree.operand.node, tree.operand.steps)
        return frozenset(self._identity(term, i) for i in leaves(tree))

    def _volume(self, axes: Any) -> int:
        return prod((a.size if isinstance(a.size, int) else self.size(a.size) for a in axes), start=1)

    def _bytes(self, node: fx.Node) -> int:
        value = node.meta["val"]
        return prod(self.size(d) for d in value.shape) * value.element_size()


def is_original(term: Term, tree: Tree) -> bool:
    """Is every product of the tree one that the graph computes already?"""
    computed = {covered for covered, _ in term.cuts}
    return all(subset in computed for subset in subsets(tree, term))
