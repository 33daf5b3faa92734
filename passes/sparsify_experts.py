"""From the sum over all experts to grouped products over the chosen ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from passes.base import Context, Outcome, Pass, calls, is_call, shape_of, sweep
from passes.dense_sum import DenseSum
from passes.layouts import EXPERT, FEATURE, TOKEN_AXES, has_labels
from passes.nodes import CASTS, dtype_of, is_division, steps_between, substitute
from passes.products import BROADCAST, product_of, sources_of_dims
from passes.rewrite import Refused, matched

aten = torch.ops.aten


@dataclass(frozen=True)
class SparsifyExperts(Pass):
    """g[n,e] = scatter(0, indices, weights)          order, offsets = sort_pairs(indices)
       h[n,e] = act(x[n] · W1[e])                →    h[m] = act(grouped_linear(x[order // K], W1, offsets))
       y[n]   = Σ_e g[n,e] · h[n,e] · W2[e]           y = combine_pairs(grouped_linear(h, W2, offsets), order, weights)

    Exact when the sum is linear in g, the indices of a token differ, and nothing before the sum looks at two experts
    at once. Activations, biases per expert, layouts and the order of the products are free.
    """  # fmt: skip

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        outcome, graph = Outcome(), graph_module.graph
        for gate in calls(graph, aten.scatter, aten.scatter_add):
            for total, path in list(sums_over_experts(gate)):
                try:
                    with graph.inserting_before(total):
                        new = DenseSum(graph, gate, total, path).sum()
                except Refused as refused:
                    outcome.refuse(refused.node, refused.reason, steps_between(gate, refused.node))
                else:
                    outcome.matches.append(matched(total, new))
                    substitute(graph, total, new)
        sweep(graph_module)
        return outcome


def sums_over_experts(gate: fx.Node) -> Iterator[tuple[fx.Node, dict[fx.Node, str]]]:
    """Sums over the scattered axis of products with the gate, each with the labels of the nodes on the way to it.

    Labels, one per dim: `E` the scattered axis, a letter for every other axis of the gate, `.` any other.
    """
    rank = len(shape_of(gate))
    if not has_labels(rank):
        return
    axis = gate.args[1] % rank
    reached = {gate: TOKEN_AXES[:axis] + EXPERT + TOKEN_AXES[axis : rank - 1]}
    for node in gate.graph.nodes:
        if node is gate or not any(source in reached for source in node.all_input_nodes):
            continue
        labels = _labels_after(node, reached)
        if labels is None:
            continue
        if EXPERT in labels:
            reached[node] = labels
        elif _has_features(node, labels):
            yield node, {node: labels} | {n: reached[n] for n in _ancestors(node, reached)}


def _labels_after(node: fx.Node, reached: dict[fx.Node, str]) -> str | None:
    """Labels of a node that is linear in the gate; None for any other."""
    product = product_of(node)
    if product is not None:
        pairs = {
            (c, label)
            for operand, letters in product.operands
            for c, label in zip(letters, reached.get(operand, ""), strict=False)
            if label != FEATURE
        }
        named = dict(pairs)
        if not len(pairs) == len(named) == len(set(named.values())):
            return None  # two gates that are not aligned
        return "".join(named.get(c, FEATURE) for c in product.out)
    if node.op != "call_function" or node.args[0] not in reached:
        return None
    before = reached[node.args[0]]
    sources = sources_of_dims(node)
    if sources is not None:
        after = "".join(FEATURE if s is None else before[s] for s in sources)
        return after if EXPERT in after else None
    cast = is_call(node, *CASTS) and dtype_of(node).is_floating_point
    if not (cast or is_call(node, aten.mul, aten.neg) or is_division(node)):
        return None  # which may have several results
    alone = len(shape_of(node)) == len(before) and not any(n in reached for n in node.all_input_nodes[1:])
    return before if alone else None


def _has_features(total: fx.Node, labels: str) -> bool:
    """Is more than the gate itself summed?"""
    product = product_of(total)
    assert product is not None
    return any(label == FEATURE and c != BROADCAST for c, label in zip(product.out, labels, strict=True))


def _ancestors(node: fx.Node, among: dict[fx.Node, str]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = [node]
    while queue:
        sources = [n for n in queue.pop().all_input_nodes if n in among and n not in found]
        found.update(sources)
        queue.extend(sources)
    return found
