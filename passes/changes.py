"""What a pass changed in a graph, cut out: small graphs before and after with the same inputs.

A graph of a whole model cannot be run twice after every pass, but what a pass changed can. `number` marks the nodes
before the pass; `Changes` compares the marked copy with the result from the outputs upwards. Where both agree, node by
node, equal inputs give equal results; each pair of nodes at which they part is the result of one region.

Above such a pair the two graphs may go on alike, from other pairs at which they part, over and over: every layer of a
model may read what a pass changed in the one before. That these are equal as well is no more than a claim, since a pass
may change a value and undo it later. A claim that proves right is a place for regions to start at.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from passes.base import Role
from passes.nodes import of_positions, viewed

MARK = "node_before"
Pair = tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class Region:
    """Two graphs with one output each and the same placeholders; `root` names the value they compute."""

    root: str
    before: fx.Graph
    after: fx.Graph
    whole: bool  # reads nothing but inputs of the model

    def text(self, kind: Callable[[fx.Node], str]) -> str:
        """Equal for regions that compute the same from inputs of the same kind."""
        return f"{_canonical(self.before, kind)}\n{_canonical(self.after, kind)}"


class Same:
    """Nodes before and after that hold the same value, by each other."""

    def __init__(self) -> None:
        self.after: dict[fx.Node, fx.Node] = {}  # by the node before
        self.before: dict[fx.Node, fx.Node] = {}

    def add(self, before: fx.Node, after: fx.Node) -> None:
        self.after[before], self.before[after] = after, before


def number(graph: fx.Graph) -> None:
    """Mark every node, so that it is known again after a pass, whatever its name is then."""
    for index, node in enumerate(graph.nodes):
        node.meta[MARK] = index


class Changes:
    """The differences between a marked graph and what a pass made of it."""

    def __init__(self, before: fx.Graph, after: fx.Graph) -> None:
        self.before, self.after = before, after
        self.roots = self._find_roots()
        marked = {node.meta[MARK]: node for node in after.nodes if MARK in node.meta}
        pairs = [(node, marked.get(node.meta.get(MARK, -1))) for node in before.nodes]
        self.alike = {one: two for one, two in pairs if two is not None and alike(one, two)}
        self.same = self.follow()
        self.given = of_positions(before)

    def _find_roots(self) -> dict[Pair, None]:
        """Pairs of nodes that must be equal and are not computed alike."""
        pairs = [*inner_pairs(self.before.output_node(), self.after.output_node())]
        seen, roots = set(pairs), dict[Pair, None]()
        while pairs:
            pair = pairs.pop()
            inner = [*inner_pairs(*pair)] if alike(*pair) else None
            if inner is None:
                roots[pair] = None
                continue
            fresh = [one for one in inner if one not in seen]
            seen.update(fresh)
            pairs += fresh
        return roots

    def follow(self, holds: Callable[[Pair, Same], bool] | None = None) -> Same:
        """What is the same if all roots are equal, and all claims that hold.

        holds: is a pair equal, given what is the same above it? None: nothing is claimed.
        """
        same, proven = Same(), set(self.roots)
        claims = self._claims() if holds else {}
        for node in self.before.nodes:
            proven.update(claim for claim in claims.get(node, ()) if holds and holds(claim, same))
            other = self.alike.get(node)
            if other is None:
                continue
            if all(same.after.get(one) is two or (one, two) in proven for one, two in inner_pairs(node, other)):
                same.add(node, other)
        return same

    def _claims(self) -> dict[fx.Node, list[Pair]]:
        """By the node before: what nodes that are alike read in one another's place, roots left out."""
        claims: dict[fx.Node, dict[fx.Node, None]] = {}
        for node, other in self.alike.items():
            for one, two in inner_pairs(node, other):
                claimed = self.alike.get(one) is not two and (one, two) not in self.roots
                if claimed and _layout(one) is not None and _layout(one) == _layout(two):
                    claims.setdefault(one, {})[two] = None
        return {one: [(one, two) for two in others] for one, others in claims.items()}

    def region(self, root: Pair, depth: int | None, same: Same) -> Region:
        """What computes one root, from floating-point values that did not change.

        depth: what lies between two inputs that are within so many steps of each other is computed rather than taken as
        an input of its own, because a rewrite may use how the two are related. None: start at the inputs of the model.
        """
        before, after = root
        inputs = self._inputs(before, after, depth, same)
        return Region(
            before.name,
            _cut(before, {node: node for node in inputs}),
            _cut(after, {same.after[node]: node for node in inputs}),
            all(node.op == "placeholder" for node in inputs),
        )

    def _inputs(self, before: fx.Node, after: fx.Node, depth: int | None, same: Same) -> list[fx.Node]:
        """Nodes of the graph before at which the region starts."""
        back, between = same.before, set[fx.Node]()

        def starts(node: fx.Node) -> bool:
            if depth is None or node in between or node in self.given:
                return node.op == "placeholder"
            return node in same.after and _may_start(node)

        while True:
            start = _reached(before, lambda n: n is not before and starts(n))
            start |= {back[n] for n in _reached(after, lambda n: n is not after and n in back and starts(back[n]))}
            more = set[fx.Node]().union(*(_leading_to(node, start, depth or 0) for node in start))
            if not more:
                break
            between |= more
        # and every input of the model that is reached around them
        found = _reached(before, lambda n: n in start or n.op == "placeholder")
        found |= {back[n] for n in _reached(after, lambda n: back.get(n) in start or n.op == "placeholder")}
        return sorted(found)


def _layout(node: fx.Node) -> tuple[Any, ...] | None:
    """Shape and dtype of a tensor."""
    value = node.meta.get("val")
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else None


def alike(one: fx.Node, two: fx.Node) -> bool:
    """Is it the same node, calling the same with arguments of the same form?"""
    return (
        one.meta.get(MARK) == two.meta.get(MARK, -1)
        and (one.op, one.target) == (two.op, two.target)
        and _form((one.args, one.kwargs)) == _form((two.args, two.kwargs))
    )


def inner_pairs(one: fx.Node, two: fx.Node) -> Iterator[Pair]:
    return zip(_nodes((one.args, one.kwargs)), _nodes((two.args, two.kwargs)), strict=True)


def _nodes(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(arguments, found.append)
    return found


def _form(arguments: Any) -> str:
    return repr(fx.node.map_arg(arguments, lambda node: _HERE))


class _Here:
    def __repr__(self) -> str:
        return "·"


_HERE = _Here()


def _may_start(node: fx.Node) -> bool:
    """Can any number stand for the value? Indices and masks are computed from their source instead, and so are views,
    which are numbers of somebody else."""
    value = node.meta.get("val")
    if node.op == "placeholder" or not isinstance(value, torch.Tensor):
        return node.op == "placeholder"
    source = viewed(node)
    if node.target is operator.getitem and source is not None:
        source = viewed(source)  # an item of several results is a view where these are views
    return value.is_floating_point() and source is None


def _reached(root: fx.Node, stop: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Nodes at which the way up from `root` stops."""
    found, seen, stack = set(), {root}, [root]
    while stack:
        node = stack.pop()
        if stop(node):
            found.add(node)
            continue
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        stack += fresh
    return found


def _leading_to(node: fx.Node, others: set[fx.Node], depth: int) -> set[fx.Node]:
    """What at most `depth` steps lead through from one of the others to a node, and the node; nothing where no other is
    so near."""
    others, layer, above = others - {node}, {node}, {node}
    for _ in range(depth):
        layer = {n for one in layer - others for n in one.all_input_nodes} - above
        above |= layer
    found = set[fx.Node]()
    for one in sorted(above - others):
        if any(n in found or n in others for n in one.all_input_nodes if n in above):
            found.add(one)
    return found if node in found else set()


def _cut(root: fx.Node, starts: dict[fx.Node, fx.Node]) -> fx.Graph:
    """The computation of `root` from `starts`; a placeholder bears the name of the node before that it stands for."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for start, original in starts.items():
        copies[start] = graph.create_node("placeholder", original.name, name=original.name)
        role = original.meta.get("role", Role.INPUT)
        copies[start].meta = {"val": original.meta["val"], "role": role}
    needed, stack = set(starts), [root]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    for node in sorted(needed):
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output((copies[root],))
    return graph


def _canonical(graph: fx.Graph, kind: Callable[[fx.Node], str]) -> str:
    names: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            lines.append(f"{len(names)} {kind(node)}")
        else:
            arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{names[n]}")
            lines.append(f"{len(names)} {node.target} {arguments}")
        names[node] = str(len(names))
    return "\n".join(lines)
