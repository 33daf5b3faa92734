"""From experts written for chosen pairs, in whatever order, to grouped products over pairs sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from passes.added_rows import added_rows
from passes.base import Context, Outcome, Pass, calls, is_call, same_size, shape_of, sweep
from passes.chosen_pairs import ChosenPairs
from passes.grouped_calls import grouped_call
from passes.layouts import FEATURE, TOKEN_AXES
from passes.nodes import constant_of, settled, substitute
from passes.pair_numbers import CHOICE, PAIR, RANK, TOKEN, PairNumbers, chosen_behind, chosen_experts
from passes.products import BROADCAST, product_of
from passes.rewrite import Refused, matched
from passes.unrolled_experts import unrolled_experts

aten = torch.ops.aten

INDEXING = {aten.index: 1, aten.index_select: 2, aten.embedding: 1, aten.gather: 2}  # where the indices are


@dataclass(frozen=True)
class GroupExperts(Pass):
    """h = act(W1[indices] · x)                              order, offsets = sort_pairs(indices)
       y = Σ_k weights · W2[indices] · h                →    h = act(grouped_linear(x[order // K], W1, offsets))
    or the same with the graph's own sort,                   y = combine_pairs(grouped_linear(h, W2, offsets), order,
    grouped products and sorting back                                          weights)

    The weights of a pair may be gathered or grouped, the pairs in the tokens' order or sorted by expert; scores may
    multiply before or after the last product. Indices must come from a top-k, so that they point at experts.
    """  # fmt: skip

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        outcome, graph = Outcome(), graph_module.graph
        for chosen, seeds in expert_products(graph).items():
            if not all(isinstance(size, int) for size in (shape_of(chosen)[-1], chosen_experts(chosen))):
                outcome.refuse(seeds[0], "the number of experts is not known")
                continue
            refusals = []
            for total, new in sums_over_chosen(graph, chosen, seeds):
                if isinstance(new, Refused):
                    refusals.append(new)
                    continue
                outcome.matches.append(matched(total, new))
                substitute(graph, total, new)
                break
            else:
                why = refusals[0] if refusals else Refused(seeds[0], f"nothing sums {seeds[0].name} over its experts")
                outcome.refuse(why.node, why.reason)
            graph.eliminate_dead_code()
        for offsets, node in grouped_by_others(graph).items():
            outcome.refuse(node, f"what {offsets.name} counts was not chosen by a top-k")
        for node, count in unrolled_experts(graph):
            outcome.refuse(node, f"{count} experts are computed one by one: multiply all at once, by one stack")
        for node in picked_results(graph):
            outcome.refuse(node, f"{node.name} picks from the results of all experts: pick weights, or sum with a gate")
        sweep(graph_module)
        return outcome


def picked_results(graph: fx.Graph) -> Iterator[fx.Node]:
    """Where the results of all experts, features and all, are gathered by those that a top-k chose."""
    for node in calls(graph, aten.gather):
        source, axis, index = node.args[:3]
        repeated = is_call(settled(index), aten.expand)
        chosen = chosen_behind(index) if repeated else None
        if chosen is not None and same_size(shape_of(source)[axis], chosen_experts(chosen)):
            yield node


def expert_products(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every top-k of experts, the calls that pick or group weights by its indices."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        grouped = grouped_call(node)
        indices = grouped.offsets if grouped is not None else _index_of_matrices(node)
        chosen = None if indices is None else chosen_behind(indices)
        if chosen is not None and (grouped is not None or shape_of(node.args[0])[0] == chosen_experts(chosen)):
            found.setdefault(chosen, []).append(node)
    return found


def grouped_by_others(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Offsets that come from no top-k, and the first grouped product with each."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        grouped = grouped_call(node)
        if grouped is not None and chosen_behind(grouped.offsets) is None:
            found.setdefault(grouped.offsets, node)
    return found


def _index_of_matrices(node: fx.Node) -> Any:
    """What picks along the first axis of a stack of matrices."""
    for target, at in INDEXING.items():
        if is_call(node, target) and len(shape_of(node.args[0])) > 2:
            return node.args[at] if at == 1 or node.args[1] == 0 else None
    return None


def sums_over_chosen(
    graph: fx.Graph, chosen: fx.Node, seeds: list[fx.Node]
) -> Iterator[tuple[fx.Node, fx.Node | Refused]]:
    """Sums over the chosen experts behind the seeds, each with what replaces it or the reason against it."""
    computed = set(seeds)
    for node in list(graph.nodes):
        if node._erased or not any(n in computed for n in node.all_input_nodes):
            continue
        computed.add(node)
        refused = None
        for path in [*ways_to_sum(node, PairNumbers(chosen), computed)]:
            try:
                with graph.inserting_before(node):
                    yield node, rewritten(ChosenPairs(graph, node, path, PairNumbers(chosen), computed))
                return
            except Refused as reason:
                refused = refused or reason
        if refused is not None:
            yield node, refused


def ways_to_sum(node: fx.Node, numbers: PairNumbers, computed: set[fx.Node]) -> Iterator[dict[fx.Node, str]]:
    """Labels under which the node would be a sum over each token's experts: of itself, and of what it sums."""
    values = added_rows(node)
    if values is not None and values[2] in computed:
        features = FEATURE * (len(shape_of(node)) - 1)
        own = features[: len(shape_of(values[1])) - 1]
        orders = [order for order in (PAIR, RANK) if PairNumbers(numbers.chosen).reads_token(values[1], order + own)]
        yield from ({node: TOKEN + features, values[2]: order} for order in orders or (PAIR,))
    product = product_of(node)
    if product is None:
        return
    for operand, letters in product.operands:
        for c in sorted(product.summed() & set(letters)):
            if operand not in computed or not same_size(shape_of(operand)[letters.index(c)], numbers.top_k):
                continue
            sizes = dict(zip(letters, shape_of(operand), strict=True))
            for tokens in dict.fromkeys((letters[: letters.index(c)].replace(BROADCAST, ""), *product.out)):
                count = prod(sizes.get(token, 0) for token in tokens)
                if tokens and set(tokens) <= set(product.out) and same_size(count, numbers.sizes[TOKEN]):
                    names = TOKEN if len(tokens) == 1 else TOKEN_AXES
                    named = dict(zip(tokens, names, strict=False)) | {c: CHOICE, BROADCAST: BROADCAST}
                    own, out = ("".join(named.get(x, FEATURE) for x in one) for one in (letters, product.out))
                    yield {node: out.replace(BROADCAST, FEATURE), operand: own}


def rewritten(pairs: ChosenPairs) -> fx.Node:
    """What replaces the sum. Raises Refused."""
    node = pairs.total
    labels = pairs.path[node]
    added = added_rows(node)
    if added is None:
        product = product_of(node)
        assert product is not None
        return pairs.shaped(pairs.sum(*pairs.product(node, labels, product), labels.count(FEATURE)), labels)
    base, rows, values = added
    order = pairs.path.pop(values)
    features = FEATURE * (len(labels) - 1)
    same = len(shape_of(rows)) in (1, len(labels)) and same_size(shape_of(node)[0], pairs.numbers.sizes[TOKEN])
    if not same or not pairs.numbers.reads_token(rows, order + features[: len(shape_of(rows)) - 1]):
        raise Refused(node, f"{rows.name} is not the token of every pair")
    total = pairs.shaped(pairs.sum(*pairs.linear(values, order + features), len(features)), labels)
    if constant_of(base) == 0:
        return total
    if base in pairs.computed:
        raise Refused(node, f"{base.name}, to which {node.name} adds, is computed by experts itself")
    return pairs.call(aten.add.Tensor, base, total)
