"""Absorption, expansion and folding: one choice, of the order in which a chain of products is multiplied out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from passes.base import Context, Outcome, Pass, is_call
from passes.chains import FORMS, Chain, Cut, Order, Tree, find_chains, leaves
from passes.contraction import Term
from passes.lifting import lift
from passes.nodes import dtype_of
from passes.plan import Plan
from passes.writing import Product, Writer

aten = torch.ops.aten
NONLINEAR = (aten.relu, aten.gelu, aten.silu, aten.tanh, aten.sigmoid, aten.rms_norm, aten.layer_norm)


@dataclass(frozen=True)
class OrderContractions(Pass):
    """scores = qN · (latent · UK)ᵀ         scores = (qN · UK) · latentᵀ      "absorbed"
       out    = (P · (latent · UV)) · WO →  out    = ((P · latent) · UV) · WO

    Every chain of products between two activations is multiplied out in the order that is cheapest for the phase:
    *expanded* (weights meet the cached operand), *absorbed* (weights meet the query or the result) or *folded*
    (weights meet each other, ahead of time). `prefill` and `decode` force a form: one for all chains of a block, or
    one per chain in graph order, joined by "+", in the blocks that have as many chains. Folding is considered only
    while the weights the phase reads grow by at most `storage_growth` of their size.
    """

    prefill: str = "auto"
    decode: str = "auto"
    storage_growth: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prefill", "decode"):
            for form in self.forms(name):
                if form not in ("auto", *FORMS):
                    raise ValueError(f"order-contractions.{name}: {form!r} is none of auto, {', '.join(FORMS)}")

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        graph, outcome = graph_module.graph, Outcome()
        chains = find_chains(graph)
        plan = Plan(graph, chains, context)
        wanted = self._forms_of(sum(c.has_form for c in chains), context.phase)
        chosen = plan.choose(wanted, self.storage_growth)
        report_near_misses(chains, outcome)
        asked = iter(wanted)
        for chain, order in zip(chains, chosen, strict=True):
            form = next(asked) if chain.has_form else "auto"
            if order.kept:
                if chain.has_form:
                    forced = f"stays {form}, as {self.name()}.{context.phase} asks"
                    reason = plan.why_kept(chain, order) if form == "auto" else forced
                    outcome.refuse(chain.root, reason, len(chain.value.through))
                continue
            write(graph, chain, order)
            outcome.matches.append(f"{chain.root.name}: {order.form}, {chain.describe(order)}")
        self_forms = [o.form for c, o in zip(chains, chosen, strict=True) if c.has_form]
        if context.phase in ("prefill", "decode"):
            outcome.decision = {context.phase: "+".join(self_forms) or "auto"}
        return outcome

    def forms(self, phase: str) -> list[str]:
        """What is asked for: one form for all chains, or one for each."""
        return getattr(self, phase, "auto").split("+")

    def _forms_of(self, count: int, phase: str) -> list[str]:
        forms = self.forms(phase)
        if len(forms) == 1:
            return forms * count
        return forms if len(forms) == count else ["auto"] * count


def write(graph: fx.Graph, chain: Chain, order: Order) -> None:
    """Replace the chain's root by its products in the chosen order."""
    with graph.inserting_before(chain.root):
        writer = Writer(graph, chain.root)
        parts = [
            _write_term(writer, chain, term, tree) for term, tree in zip(chain.value.terms, order.trees, strict=True)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = writer.add(total, part)
    chain.root.replace_all_uses_with(total)


def _write_term(writer: Writer, chain: Chain, term: Term, tree: Tree) -> fx.Node:
    """Casts are not among the operands: the last product is of the root's dtype, others of the wider of their two."""
    wanted = [axis for group in chain.value.dims for axis in group]

    def multiply(tree: Tree, top: bool) -> Product:
        if isinstance(tree, int):
            return writer.operand(term.operands[tree])
        if isinstance(tree, Cut):
            return writer.operand(tree.operand)
        keep = chain.axes_of(term, leaves(tree))
        if top:
            keep = tuple(sorted(keep, key=wanted.index))
        left, right = multiply(tree[0], False), multiply(tree[1], False)
        common = torch.promote_types(dtype_of(left.node), dtype_of(right.node))
        dtype = dtype_of(chain.root) if top else common
        return writer.product(writer.cast(left, dtype), writer.cast(right, dtype), keep)

    node = writer.arrange(multiply(tree, True), chain.value.dims)
    return node if term.scale == 1.0 else writer.scale(node, term.scale)


def report_near_misses(chains: list[Chain], outcome: Outcome) -> None:
    """Cached operands that are themselves products with a weight, made nonlinear on the way."""
    for chain in chains:
        for term in chain.value.terms:
            for barrier in (term.operands[i].node for i in sorted(chain.cached(term))):
                if is_call(barrier, *NONLINEAR) and any(n in chain.weights for n in factors(barrier.args[0])):
                    edge = f"{barrier.args[0].name} → {barrier.name}"
                    outcome.refuse(
                        chain.root, f"the edge {edge} is not linear, so the weight before it cannot be absorbed"
                    )


def factors(node: fx.Node) -> list[fx.Node]:
    return [operand.node for piece in lift(node).pieces for term in piece.terms for operand in term.operands]
