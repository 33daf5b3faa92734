"""Where one form of attention overtakes another: expanded, absorbed and folded, priced over queries and context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
from torch import fx

from codegen.targets import Target
from passes.base import Context, Workload
from passes.chains import FORMS, find_chains
from passes.cost import B, NodeCost, S, T, cost, node_costs, symbolic_sizes
from passes.fuse_attention import FuseAttention
from passes.hoist_weights import HoistWeights
from passes.order_contractions import OrderContractions
from passes.pipeline import apply
from passes.plan import NoSuchForm
from passes.verify import clone


@dataclass(frozen=True)
class FormCost:
    """A block with its chains in one form; `nodes` are those that the other forms do not share."""

    form: str
    flops: sympy.Expr  # of `nodes`, in B, S and T
    bytes: sympy.Expr
    weight_bytes: int  # of the whole block
    nodes: tuple[NodeCost, ...]

    @cached_property
    def _numbers(self) -> Callable[[int, int, int], list[tuple[float, float]]]:
        return sympy.lambdify((B, S, T), [(node.flops, node.bytes) for node in self.nodes], modules="math")

    def seconds(self, target: Target, workload: Workload) -> float:
        """Roofline time of the nodes that are not shared."""
        numbers = self._numbers(workload.batch, workload.queries, workload.context)
        return sum(max(flops / target.flops, moved / target.bandwidth) for flops, moved in numbers)

    def flops_at(self, workload: Workload) -> int:
        numbers = self._numbers(workload.batch, workload.queries, workload.context)
        return int(sum(flops for flops, _ in numbers))


def price_forms(module: fx.GraphModule, context: Context) -> list[FormCost]:
    """Every form of a canonical prefill graph, as the fused kernels it becomes; empty when it has no choice."""
    if not any(chain.has_form for chain in find_chains(module.graph)):
        return []
    totals, nodes = {}, {}
    for form in FORMS:
        graph_module = clone(module)
        try:
            for one in (OrderContractions(prefill=form, decode=form), FuseAttention(), HoistWeights()):
                apply(one, graph_module, context)
        except NoSuchForm:
            continue
        totals[form] = cost(graph_module.graph)
        found = node_costs(graph_module.graph, symbolic_sizes(graph_module.graph))
        nodes[form] = {node.name: priced for node, priced in found.items()}
    shared = {
        name
        for name, priced in next(iter(nodes.values())).items()
        if all(name in others and others[name] == priced for others in nodes.values())
    }
    prices = []
    for form in nodes:
        own = tuple(priced for name, priced in nodes[form].items() if name not in shared and _costs(priced))
        flops, moved = (sympy.expand(sum((sympy.sympify(e) for e in each), sympy.Integer(0))) for each in _columns(own))
        prices.append(FormCost(form, flops, moved, totals[form].weight_bytes, own))
    return prices


def _costs(priced: NodeCost) -> bool:
    return priced.flops != 0 or priced.bytes != 0


def _columns(nodes: Sequence[NodeCost]) -> tuple[list[Any], list[Any]]:
    return [n.flops for n in nodes], [n.bytes for n in nodes]


def even_queries(left: FormCost, right: FormCost) -> sympy.Expr | None:
    """Query positions S at which two forms need the same FLOPs, as an expression in T; None when they never do."""
    found = [s for s in sympy.solve(sympy.Eq(left.flops, right.flops), S) if s.subs(B, 1) != 0]
    return sympy.simplify(found[0]) if found else None


def even_queries_far(left: FormCost, right: FormCost) -> float | None:
    """The same for a context without end."""
    even = even_queries(left, right)
    return None if even is None else float(sympy.limit(even, T, sympy.oo))


def overtakes(
    low: FormCost, high: FormCost, target: Target, batch: int, context: int, largest: int = 1 << 16
) -> int | None:
    """Fewest query positions at which `high` takes no longer than `low`; None when that is above `largest`.

    `low` must be the faster one for few queries; its lead may change sign once.
    """

    def at(queries: int) -> Workload:
        return Workload(batch, queries, context)

    return 1 if fastest([low, high], target, at(1)) is not low else changes(low, high, target, at, largest)


def fastest(forms: Sequence[FormCost], target: Target, at: Workload) -> FormCost:
    """The form that takes the least time; of equal ones the last."""
    return min(reversed(forms), key=lambda form: form.seconds(target, at))


def changes(one: FormCost, other: FormCost, target: Target, at: Callable[[int], Workload], largest: int) -> int | None:
    """The smallest size from 2 to `largest` at which not the same of two forms is the faster as at size 1.

    `at` makes sizes of the number, which may be that of queries, rows or positions. None when nothing changes; the
    lead may change sign once.
    """

    def leader(size: int) -> FormCost:
        return fastest([one, other], target, at(size))

    first = leader(1)
    if leader(largest) is first:
        return None
    below, above = 1, largest
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if leader(middle) is first else (below, middle)
    return above
