"""What is sliced off behind a chain of ops is sliced off before it."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from passes.base import END, Context, Outcome, Pass, call, expression_of, is_call, shape_of, told
from passes.cut_rules import PRODUCTS, Needs, needs
from passes.cuts import Cut, take
from passes.nodes import erase_dead, is_tensor, users, weights_only

aten = torch.ops.aten


@dataclass(frozen=True)
class SliceEarly(Pass):
    """ffn(norm(x + attention(q, k, v)))[:, -1:]  →  ffn(norm(x[:, -1:] + attention(q[:, -1:], k, v)))

    Of a prompt only the last position goes on to the head, so the last layer's experts, and all else that treats
    positions alike, need that one only. Followed upwards through every op of which nobody else reads the rest; not
    where no product gets smaller, nor for slices of more than half.
    """

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        outcome, graph = Outcome(), graph_module.graph
        seeds = {node: cut for node in graph.nodes if (cut := seed(node)) is not None}
        found = followed(graph, seeds)
        seeds = {node: cut for node, cut in seeds.items() if node not in found}
        for node in seeds:
            reason = why_not(node, seeds, found)
            if reason:
                outcome.refuse(node, reason)
        seeds = {node: cut for node, cut in seeds.items() if node.args[0] in found}
        kept = worthwhile(seeds, found)
        new: dict[fx.Node, fx.Node] = {}
        for node in list(graph.nodes):
            if node in kept:
                new[node] = _narrowed(graph, node, found[node], kept, new)
        for node in seeds:
            source = node.args[0]
            if source not in kept:
                continue
            taken = new[source]
            if is_call(node, aten.select):
                with graph.inserting_before(node):
                    taken = call(graph, aten.select.int, taken, seeds[node].dim, 0, like=node)
            node.replace_all_uses_with(taken)
            outcome.matches.append(told(node.name, taken))
            erase_dead(graph, node)
        return outcome


def seed(node: fx.Node) -> Cut | None:
    """The cut that a slice or a selection is, if it leaves half of a tensor at most."""
    if not is_call(node, aten.slice, aten.select) or not is_tensor(node.args[0]):
        return None
    shape = shape_of(node.args[0])
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(shape)
    size = expression_of(shape[dim])
    if is_call(node, aten.select):
        start, stop = node.args[2], node.args[2] + 1 if isinstance(node.args[2], int) else None
        stop = END if stop == 0 else stop
    else:
        given = list(node.args[2:])
        start, stop, step = (given + [None, None, 1][len(given) :])[:3]
        stop = END if stop is None else stop
        if step != 1:
            return None
    if not all(bound is None or isinstance(bound, int) for bound in (start, stop)):
        return None
    if isinstance(size, int):
        first, last, _ = slice(start, stop).indices(size)
        return Cut(dim, first, last) if 0 < 2 * (last - first) <= size else None
    return Cut(dim, -1, END) if start == -1 and stop == END else None


def followed(graph: fx.Graph, seeds: dict[fx.Node, Cut]) -> dict[fx.Node, Needs]:
    """Nodes of which all readers need the same places, and which can be computed of those alone."""
    found: dict[fx.Node, Needs] = {}
    for node in reversed(list(graph.nodes)):
        asked = {_asked(reader, node, seeds, found) for reader in users(node)}
        cut = asked.pop() if len(asked) == 1 else None
        known = None if cut is None else needs(node, cut)
        if known is not None:
            found[node] = known
        else:  # of several results each can be cut, but not all at once
            for result in [reader for reader in node.users if reader.target is operator.getitem]:
                found.pop(result, None)
    return found


def why_not(node: fx.Node, seeds: dict[fx.Node, Cut], found: dict[fx.Node, Needs]) -> str:
    """Why a slice cannot be taken earlier, or '' where it can be or where nothing would be gained: of an input or a
    weight, and of columns, which are parts of one product."""
    source, cut = node.args[0], seeds[node]
    if source in found or source.op != "call_function" or cut.dim == len(shape_of(source)) - 1 or weights_only(source):
        return ""
    whole = [reader for reader in users(source) if _asked(reader, source, seeds, found) != cut]
    if whole:
        return f"{whole[0].name} reads other parts of {source.name}"
    return f"{source.name} does not keep what lies along dim {cut.dim} apart"


def _asked(reader: fx.Node, node: fx.Node, seeds: dict[fx.Node, Cut], found: dict[fx.Node, Needs]) -> Cut | None:
    """The places of the node that a reader needs, None if it needs all."""
    if reader in found:
        return found[reader].cuts.get(node)
    return seeds.get(reader) if reader.args[0] is node else None


def worthwhile(seeds: dict[fx.Node, Cut], found: dict[fx.Node, Needs]) -> set[fx.Node]:
    """The nodes found that belong to a product, or reach one through others."""
    groups: list[set[fx.Node]] = []
    for node in seeds:
        group, stack = {node.args[0]}, [node.args[0]]
        while stack:
            more = [n for n in found[stack.pop()].cuts if n in found and n not in group]
            group.update(more)
            stack += more
        for other in [one for one in groups if one & group]:
            groups.remove(other)
            group |= other
        groups.append(group)
    return {node for group in groups if any(is_call(one, *PRODUCTS) for one in group) for node in group}


def _narrowed(
    graph: fx.Graph, node: fx.Node, wanted: Needs, kept: set[fx.Node], new: dict[fx.Node, fx.Node]
) -> fx.Node:
    """The node computed of its places alone."""

    def of(source: fx.Node) -> fx.Node:
        if source not in wanted.cuts:
            return source
        return new[source] if source in kept else take(graph, source, wanted.cuts[source], node)

    with graph.inserting_before(node):
        return wanted.again(graph, node, fx.node.map_arg(node.args, of))
