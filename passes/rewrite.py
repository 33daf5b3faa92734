"""Local rewrites: patterns over FX graphs, and the loop that applies them.

A rewrite is a pass that declares three things:

    before   a pattern, written with the operators it matches: `silu(Var("gate")) * Var("up")`
    when     the reason for leaving a match alone, or None
    after    the nodes that take its place

Patterns see through nodes that change neither value, shape, dtype nor meaning of their input, and know that sums and
products commute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from passes.base import Context, Outcome, Pass, is_call, source_line, sweep
from passes.nodes import dtype_of, is_division, is_rounding, readers, settled, substitute, widens

aten = torch.ops.aten

# ---- patterns ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a pattern has bound so far, and the nodes it covers."""

    bound: Mapping[str, Any] = field(default_factory=dict)
    inner: tuple[fx.Node, ...] = ()

    def bind(self, name: str, value: Any) -> Found:
        return Found({**self.bound, name: value}, self.inner)

    def cover(self, node: fx.Node) -> Found:
        return Found(self.bound, (*self.inner, node))


class Pattern:
    """Something a value can be; `search` yields every way in which it is."""

    def search(self, value: Any, found: Found) -> Iterator[Found]:
        raise NotImplementedError

    def __add__(self, other: Pattern) -> Pattern:
        return Op((aten.add,), (self, other), commutes=True)

    def __sub__(self, other: Pattern) -> Pattern:
        return Op((aten.sub,), (self, other))

    def __mul__(self, other: Pattern) -> Pattern:
        return Op((aten.mul,), (self, other), commutes=True)

    def __truediv__(self, other: Pattern) -> Pattern:
        return Op((aten.div,), (self, other), check=is_division)

    def __neg__(self) -> Pattern:
        return Op((aten.neg,), (self,))

    def __or__(self, other: Pattern) -> Pattern:
        return Either((self, other))


@dataclass(frozen=True)
class Var(Pattern):
    """Any tensor; the same name is the same node everywhere in the pattern."""

    name: str

    def search(self, value: Any, found: Found) -> Iterator[Found]:
        value = settled(value)
        if isinstance(value, fx.Node) and found.bound.get(self.name, value) is value:
            yield found.bind(self.name, value)


@dataclass(frozen=True)
class Number(Pattern):
    """Any Python number, or the one given."""

    name: str = ""
    value: float | None = None

    def search(self, value: Any, found: Found) -> Iterator[Found]:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and self.value in (None, value):
            yield found.bind(self.name, value) if self.name else found


@dataclass(frozen=True)
class Op(Pattern):
    """A call of one of `targets` whose leading arguments match `inputs` and which passes `check`.

    A tuple among the inputs is a list argument, None an argument of any kind.
    """

    targets: tuple[Any, ...]
    inputs: tuple[Any, ...]
    check: Callable[[fx.Node], bool] | None = None
    commutes: bool = False
    name: str = ""  # bind the node itself

    def search(self, value: Any, found: Found) -> Iterator[Found]:
        node = settled(value)
        if not is_call(node, *self.targets) or len(node.args) < len(self.inputs):
            return
        if node.kwargs.get("alpha", 1) != 1 or (self.check is not None and not self.check(node)):
            return
        found = found.cover(node)
        if self.name:
            found = found.bind(self.name, node)
        arguments = tuple(node.args[: len(self.inputs)])
        yield from _search_all(self.inputs, arguments, found)
        if self.commutes:
            yield from _search_all(self.inputs, arguments[::-1], found)


def _search_all(patterns: tuple[Any, ...], values: Any, found: Found) -> Iterator[Found]:
    if not patterns:
        yield found
        return
    first, *rest = patterns
    starts: Iterator[Found]
    if first is None:
        starts = iter((found,))
    elif isinstance(first, tuple):
        listed = isinstance(values[0], (list, tuple)) and len(values[0]) == len(first)
        starts = _search_all(first, values[0], found) if listed else iter(())
    else:
        starts = first.search(values[0], found)
    for start in starts:
        yield from _search_all(tuple(rest), values[1:], start)


@dataclass(frozen=True)
class Either(Pattern):
    options: tuple[Pattern, ...]

    def search(self, value: Any, found: Found) -> Iterator[Found]:
        for option in self.options:
            yield from option.search(value, found)


@dataclass(frozen=True)
class Cast(Pattern):
    """The pattern itself, or a cast of it: one that loses nothing, or any one to a float if `lossy`."""

    inside: Pattern
    lossy: bool = False

    def search(self, value: Any, found: Found) -> Iterator[Found]:
        node = settled(value)
        if is_rounding(node) and (self.lossy or widens(dtype_of(node.args[0]), dtype_of(node))):
            yield from self.inside.search(node.args[0], found.cover(node))
        yield from self.inside.search(value, found)


# ---- the loop ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """One place where `before` was found: its last node, what the names stand for, and all nodes it covers."""

    root: fx.Node
    bound: Mapping[str, Any]
    inner: tuple[fx.Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.bound.get(name, default)

    def leak(self) -> str | None:
        """Why an intermediate value must stay: somebody else reads it."""
        for node in self.inner:
            outside = [reader for reader in readers(node) if reader not in self.inner]
            if node is not self.root and outside:
                return f"{node.name} is used by {outside[0].name} as well"
        return None


@dataclass(frozen=True)
class Rewrite(Pass):
    """A pass that replaces every match of one pattern. Subclasses give `before` and `after`, and mostly `when`."""

    before: ClassVar[Pattern]

    def when(self, match: Match) -> str | None:
        """The reason for leaving this match alone, '' if it is none worth telling, or None."""
        return match.leak()

    def after(self, graph: fx.Graph, match: Match) -> fx.Node:
        """Insert what replaces `match.root`; the graph's insertion point is just before it."""
        raise NotImplementedError

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        outcome, graph = Outcome(), graph_module.graph
        # Backwards: of two overlapping matches the larger one ends later.
        for root in reversed(list(graph.nodes)):
            if root.op == "call_function" and root.users:
                self.rewrite(graph, root, outcome)
        outcome.matches.reverse()
        outcome.refusals.reverse()
        sweep(graph_module)
        return outcome

    def rewrite(self, graph: fx.Graph, root: fx.Node, outcome: Outcome) -> None:
        misses: list[tuple[int, str]] = []
        if settled(root) is not root:
            return
        for found in self.before.search(root, Found()):
            match = Match(root, found.bound, found.inner)
            reason = self.when(match)
            if reason is None:
                with graph.inserting_before(root):
                    new = self.after(graph, match)
                substitute(graph, root, new)
                outcome.matches.append(matched(root, new))
                return
            if reason:
                misses.append((len(match.inner), reason))
        if misses:
            reached, reason = max(misses, key=lambda miss: miss[0])
            outcome.refuse(root, reason, reached)


def matched(old: fx.Node, new: fx.Node) -> str:
    """One line of prose about a replacement."""
    where = source_line(old)
    return f"{old.name} → {new.name}" + (f" ({where})" if where else "")


class Refused(Exception):
    """Raised while a candidate is looked at: it must stay as it is."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason
