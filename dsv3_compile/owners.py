"""Whose memory a value of a graph lies in.

The passes compare values, and a copy has the value of what it copies. What a caller can tell is whether writing to one
result changes another, or an input; so it is noted before the passes and restored behind them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import fx

from passes.base import placeholders
from passes.nodes import is_tensor, viewed


def owner_of(node: fx.Node) -> fx.Node:
    """The node that a view, or what may be one, is a view of; a node that is none owns its memory."""
    while node.op == "call_function":
        source = viewed(node)
        if source is None:
            return node
        node = source
    return node


def views_between(start: fx.Node, node: fx.Node) -> list[fx.Node] | None:
    """The views that make `node` of `start`, in their order: none where they are the same, None where it is no view."""
    views: list[fx.Node] = []
    while node is not start:
        source = viewed(node) if node.op == "call_function" else None
        if source is None:
            return None
        views.append(node)
        node = source
    return views[::-1]


def owners(graph: fx.Graph) -> tuple[Hashable, ...]:
    """Of every returned value a name for the memory it lies in: an input's position, or the node's own name."""
    positions = {node: position for position, node in enumerate(placeholders(graph))}
    values: Sequence[Any] = graph.output_node().args[0]
    found: list[Hashable] = []
    for value in values:
        owner = owner_of(value) if is_tensor(value) else None
        found.append(None if owner is None else positions.get(owner, owner.name))
    return tuple(found)
