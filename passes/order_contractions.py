"""Absorption, expansion and folding: one choice, of the order in which a chain of products is multiplied out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import fx

from passes.base import Context, Outcome, Pass, Role, calls, is_call, placeholders
from passes.contraction import CONTRACTIONS, Axis, NotLinear, Operand, Product, Term, Value, Writer, lift
from passes.cost import concrete_sizes, node_costs

aten = torch.ops.aten
FORMS = ("expanded", "absorbed", "folded")
Subset = frozenset[int]
Tree = Any  # an index, a cut (Operand), or a pair of trees

NONLINEAR_PAIRS = (aten.relu, aten.gelu, aten.silu, aten.tanh, aten.sigmoid, aten.rms_norm, aten.layer_norm)


@dataclass(frozen=True)
class OrderContractions(Pass):
    """scores = qN · (latent · UK)ᵀ        scores = (qN · UK) · latentᵀ      "absorbed"
       out    = (P · (latent · UV)) · WO →  out    = ((P · latent) · UV) · WO

    Every chain of products between two activations is multiplied out in the order that is cheapest for the phase:
    *expanded* (weights meet the cached operand), *absorbed* (weights meet the query or the result) or *folded*
    (weights meet each other, ahead of time). `prefill` and `decode` force a form: one for all chains of a block, or
    one per chain in graph order, joined by "+". Folding is considered only while the weights the phase reads grow by
    at most `storage_growth` of their size.
    """

    prefill: str = "auto"
    decode: str = "auto"
    storage_growth: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prefill", "decode"):
            for form in getattr(self, name).split("+"):
                if form not in ("auto", *FORMS):
                    raise ValueError(
                        f"order-contractions.{name}: {form!r} is none of auto, {', '.join(FORMS)}"
                    )

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        graph, outcome = graph_module.graph, Outcome()
        chains = find_chains(graph)
        plan = Plan(graph, chains, context)
        wanted = self._forms(context.phase, sum(c.has_form for c in chains))
        chosen = plan.choose(wanted, self.storage_growth)
        report_near_misses(graph, chains, outcome)
        for chain, order in zip(chains, chosen, strict=True):
            if order.kept:
                if chain.has_form:
                    outcome.refuse(chain.root, plan.why_kept(chain, order))
                continue
            write(graph, chain, order)
            outcome.matches.append(f"{chain.root.name}: {order.form}, {chain.describe(order)}")
        self_forms = [o.form for c, o in zip(chains, chosen, strict=True) if c.has_form]
        outcome.decision = {context.phase: "+".join(self_forms) or "auto"}
        return outcome

    def _forms(self, phase: str, count: int) -> list[str]:
        forms = getattr(self, phase).split("+")
        if len(forms) == 1:
            return forms * count
        if len(forms) != count:
            raise ValueError(
                f"order-contractions.{phase} names {len(forms)} forms; this block has {count} chains"
            )
        return forms


# ---- chains -----------------------------------------------------------------------------------------------------


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
    def kept_axes(self) -> frozenset[Axis]:
        return frozenset(axis for group in self.value.dims for axis in group)

    def axes_of(self, term: Term, subset: Subset) -> tuple[Axis, ...]:
        """Axes that the product of a subset must keep: those of the result and of the other operands."""
        inside = dict.fromkeys(axis for i in sorted(subset) for axis in term.operands[i].axes)
        outside = {a for i, o in enumerate(term.operands) if i not in subset for a in o.axes}
        kept = [a for a in inside if a in outside or a in self.kept_axes]
        return tuple(
            sorted(kept, key=lambda a: self.layout.index(a) if a in self.layout else len(self.layout))
        )

    def form_of(self, term: Term, tree: Tree) -> str:
        cached, form = self.cached(term), "absorbed"
        for subset in subsets(tree):
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


def subsets(tree: Tree) -> Iterator[Subset]:
    """The operand sets of all products in a tree that are not the whole tree's."""
    if isinstance(tree, tuple):
        for side in tree:
            if not isinstance(side, int):
                yield leaves(side)
            yield from subsets(side)


def leaves(tree: Tree) -> Subset:
    if isinstance(tree, int):
        return frozenset((tree,))
    if isinstance(tree, Cut):
        return tree.covered
    return leaves(tree[0]) | leaves(tree[1])


def find_chains(graph: fx.Graph) -> list[Chain]:
    """All maximal products of three or more operands, in graph order."""
    weights = weight_only(graph)
    context_axes_of = {}
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
        chain = Chain(root, value, weights, frozenset(summed_by_softmax(root, value)))
        context_axes_of[root] = chain.context_axes
        chains.append(chain)
    return chains[::-1]


def weight_only(graph: fx.Graph) -> frozenset[fx.Node]:
    """Nodes computed from weights alone."""
    found = set(placeholders(graph, Role.WEIGHT))
    for node in graph.nodes:
        if (
            node.op == "call_function"
            and node.all_input_nodes
            and all(n in found for n in node.all_input_nodes)
        ):
            found.add(node)
    return frozenset(found)


def summed_by_softmax(root: fx.Node, value: Value) -> list[Axis]:
    """The axes over cached positions: those a softmax of the scores sums over, or those summed against one."""
    probabilities = [o for t in value.terms for o in t.operands if is_probability(o.node)]
    if probabilities:
        kept = {axis for group in value.dims for axis in group}
        return [a for o in probabilities for a in o.axes if a not in kept]
    softmax = next((n for n in elementwise_users(root) if is_call(n, aten.softmax, aten._softmax)), None)
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


def is_probability(node: fx.Node) -> bool:
    """Is the node a softmax, possibly cast afterwards?"""
    while is_call(node, aten._to_copy, aten.to, aten.clone):
        node = node.args[0]
    return is_call(node, aten.softmax, aten._softmax)


# ---- choosing ---------------------------------------------------------------------------------------------------


class Plan:
    """Prices combinations of orders at one workload: new products plus whatever the graph still has to compute."""

    def __init__(self, graph: fx.Graph, chains: list[Chain], context: Context) -> None:
        self.graph, self.chains, self.context = graph, chains, context
        self.size = concrete_sizes(graph, context.workload)
        self.node_seconds = {
            n: float(c.seconds(context.target)) for n, c in node_costs(graph, self.size).items()
        }

    def choose(self, wanted: list[str], storage_growth: float) -> list[Order]:
        """The cheapest combination; `wanted` restricts the chains that have a form."""
        forms = iter(wanted)
        options = [self._options(chain, next(forms) if chain.has_form else "auto") for chain in self.chains]
        best = [option[0] for option in options]
        if prod(len(o) for o in options) <= 4096:
            combos: Iterator[tuple[Order, ...]] = itertools.product(*options)
        else:  # too many to try them all: improve one chain at a time
            combos = (
                tuple(best[:i] + [o] + best[i + 1 :]) for i, option in enumerate(options) for o in option
            )
        budget = storage_growth * sum(self._bytes(n) for n in placeholders(self.graph, Role.WEIGHT))
        priced = []
        for combo in combos:
            if "folded" not in wanted and self.folded_bytes(combo) > budget:
                continue
            changes = sum(not o.kept for o in combo)
            priced.append((float(f"{self.seconds(combo):.4g}"), changes, len(priced), combo))
        return list(min(priced)[-1]) if priced else best

    def why_kept(self, chain: Chain, order: Order) -> str:
        """Why the order of the graph was left as it is, naming the edge that decided it."""
        for node in chain.value.through - {chain.root}:
            outside = [
                u for u in node.users if u not in chain.value.through and not self._in_other_chain(u, chain)
            ]
            if is_call(node, *CONTRACTIONS) and outside and order.form == "expanded":
                return f"stays expanded: {node.name} is used by {outside[0].name} as well and must be computed anyway"
        return f"stays {order.form}: the cheapest order in {self.context.phase} at {self.context.workload}"

    def _in_other_chain(self, user: fx.Node, chain: Chain) -> bool:
        return any(user in c.value.through for c in self.chains if c is not chain)

    def _options(self, chain: Chain, form: str) -> list[Order]:
        orders = self._orders(chain)
        if form != "auto":
            fitting = [o for o in orders if o.form == form]
            if not fitting:
                raise ValueError(f"order-contractions: {chain.root.name} has no {form} form")
            orders = fitting
        return sorted(orders, key=lambda o: not o.kept)

    def _orders(self, chain: Chain) -> list[Order]:
        per_term = [list(self._trees(chain, t, frozenset(range(len(t.operands))))) for t in chain.value.terms]
        orders = []
        for trees in itertools.product(*per_term):
            forms = [
                chain.form_of(t, tree)
                for t, tree in zip(chain.value.terms, trees, strict=True)
                if chain._between(t)
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
        if cut is not None:
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

    def seconds(self, combo: tuple[Order, ...] | list[Order]) -> float:
        products: dict[Any, float] = {}
        feeds: dict[fx.Node, list[fx.Node]] = {}
        for chain, order in zip(self.chains, combo, strict=True):
            if order.kept:
                continue
            feeds[chain.root] = []
            for term, tree in zip(chain.value.terms, order.trees, strict=True):
                self._price(chain, term, tree, products, feeds[chain.root])
        alive = reachable(self.graph, feeds)
        return sum(self.node_seconds.get(n, 0.0) for n in alive if n not in feeds) + sum(products.values())

    def _price(
        self, chain: Chain, term: Term, tree: Tree, products: dict[Any, float], feeds: list[fx.Node]
    ) -> tuple[tuple[Axis, ...], bool]:
        """Add up the products of a tree; returns the axes of its result and whether it is made of weights alone."""
        if isinstance(tree, (int, Cut)):
            operand = term.operands[tree] if isinstance(tree, int) else tree.operand
            feeds.append(operand.node)
            return operand.axes, operand.node in chain.weights
        (left, weight_l), (right, weight_r) = (self._price(chain, term, t, products, feeds) for t in tree)
        out = chain.axes_of(term, leaves(tree))
        if weight_l and weight_r:
            return out, True
        everything = dict.fromkeys((*left, *right))
        flops = 2 * self._volume(everything)
        moved = (self._volume(left) + self._volume(right) + self._volume(out)) * chain.root.meta[
            "val"
        ].element_size()
        target = self.context.target
        key = frozenset((term.operands[i].node, term.operands[i].steps) for i in leaves(tree))
        products[key] = max(flops / target.flops, moved / target.bandwidth) + target.launch_seconds
        return out, False

    def _volume(self, axes: Any) -> int:
        return prod((a.size if isinstance(a.size, int) else self.size(a.size) for a in axes), start=1)

    def folded_bytes(self, combo: tuple[Order, ...] | list[Order]) -> int:
        """Bytes of weight products that must be stored besides the weights themselves (the other phase needs those)."""
        found: dict[Any, int] = {}
        for chain, order in zip(self.chains, combo, strict=True):
            item = chain.root.meta["val"].element_size()
            for term, tree in zip(chain.value.terms, order.trees, strict=True):
                for subset in subsets(tree):
                    if len(subset) > 1 and all(term.operands[i].node in chain.weights for i in subset):
                        key = frozenset((term.operands[i].node, term.operands[i].steps) for i in subset)
                        found[key] = self._volume(chain.axes_of(term, subset)) * item
        return sum(found.values())

    def _bytes(self, node: fx.Node) -> int:
        value = node.meta["val"]
        return prod(self.size(d) for d in value.shape) * value.element_size()


def is_original(term: Term, tree: Tree) -> bool:
    """Does the tree only multiply what the graph itself multiplies at its root?"""
    if isinstance(tree, Cut):
        return False  # only below the root's own product
    if isinstance(tree, int):
        return True
    largest = maximal_cuts(term)
    return all(
        (side if isinstance(side, int) else side.covered if isinstance(side, Cut) else None) in largest
        for side in tree
    )


def maximal_cuts(term: Term) -> set[Any]:
    """The factors of the root's own product: the largest proper cuts, and operands under none of them."""
    cuts = [covered for covered, _ in term.cuts]
    largest = {c for c in cuts if not any(c < other for other in cuts)}
    single = {i for i in range(len(term.operands)) if not any(i in c for c in largest)}
    return largest | single


def reachable(graph: fx.Graph, feeds: dict[fx.Node, list[fx.Node]]) -> set[fx.Node]:
    """Nodes the outputs need, when each root in `feeds` reads the given nodes instead of its own inputs."""
    seen: set[fx.Node] = set()
    stack = [graph.output_node()]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(feeds[node] if node in feeds else node.all_input_nodes)
    return seen


# ---- writing ----------------------------------------------------------------------------------------------------


def write(graph: fx.Graph, chain: Chain, order: Order) -> None:
    """Replace the chain's root by its products in the chosen order."""
    with graph.inserting_before(chain.root):
        writer = Writer(graph, chain.root)
        parts = [
            _write_term(writer, chain, term, tree)
            for term, tree in zip(chain.value.terms, order.trees, strict=True)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = writer.add(total, part)
    chain.root.replace_all_uses_with(total)


def _write_term(writer: Writer, chain: Chain, term: Term, tree: Tree) -> fx.Node:
    wanted = [axis for group in chain.value.dims for axis in group]

    def multiply(tree: Tree, top: bool) -> Product:
        if isinstance(tree, int):
            return writer.operand(term.operands[tree])
        if isinstance(tree, Cut):
            return writer.operand(tree.operand)
        keep = chain.axes_of(term, leaves(tree))
        if top:
            keep = tuple(sorted(keep, key=wanted.index))
        return writer.product(multiply(tree[0], False), multiply(tree[1], False), keep)

    node = writer.arrange(multiply(tree, True), chain.value.dims)
    return node if term.scale == 1.0 else writer.scale(node, term.scale)


def report_near_misses(graph: fx.Graph, chains: list[Chain], outcome: Outcome) -> None:
    """Products of two activations, one of which is a weight product made nonlinear on the way."""
    inside = {n for c in chains for n in c.value.through}
    weights = weight_only(graph)
    for root in calls(graph, *CONTRACTIONS):
        if root in inside or root in weights:
            continue
        for operand in (o for p in lift(root).pieces for t in p.terms for o in t.operands):
            barrier = operand.node
            if is_call(barrier, *NONLINEAR_PAIRS):
                before = lift(barrier.args[0])
                factors = [o.node for p in before.pieces for t in p.terms for o in t.operands]
                if any(n in weights for n in factors) and any(n not in weights for n in factors):
                    if not any(
                        o.node in weights for p in lift(root).pieces for t in p.terms for o in t.operands
                    ):
                        edge = f"{barrier.args[0].name} → {barrier.name}"
                        outcome.refuse(
                            root,
                            f"the edge {edge} is not linear, so {root.name} cannot absorb the weight before it",
                        )
