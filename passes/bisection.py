"""Which rewrite of a pass was wrong: the first value that departs from the one it stands for.

A pass leaves most nodes as they are, under their names. A node that reads something else than it did shows what was
put in whose place; all these pairs, compared in graph order, lead to the first wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from passes.base import is_mutable, source_line


@dataclass(frozen=True)
class Departure:
    """The first node, after a pass, whose value is not the one it had or the one it replaced."""

    node: str
    replaced: str  # the node before the pass whose value it should have; its own name if the pass left it
    error: float
    source: str = ""  # "file:line" of the model

    def __str__(self) -> str:
        instead = "" if self.replaced == self.node else f", in place of {self.replaced}"
        return f"{self.node}{instead}" + (f" ({self.source})" if self.source else "")


def first_departure(
    before: fx.Graph, after: fx.Graph, expected: Mapping[str, Any], found: Mapping[str, Any], bound: float
) -> Departure | None:
    """The first pair of values further apart than `bound`; None if all that can be compared agree.

    `expected` and `found` hold the values of the nodes of `before` and `after` by name. Values that an op writes in
    place are those at the end of the run.
    """
    lines = {node.name: source_line(node) for node in before.nodes}
    for node, culprit, replaced in comparable(before, after):
        error = distance(found.get(node.name), expected.get(replaced))
        if not error <= bound:
            return Departure(culprit.name, replaced, error, source_line(culprit) or lines[replaced])
    return None


def comparable(before: fx.Graph, after: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node, str]]:
    """(node after, node to blame, name of the node before whose value it should have), in the order of `after`."""
    old_nodes = {node.name: node for node in before.nodes}
    replaced: dict[fx.Node, dict[str, None]] = {}
    rewired: dict[fx.Node, dict[tuple[fx.Node, str], None]] = {}
    for reader in after.nodes:
        if reader.name not in old_nodes:
            continue
        for new, old in changed_operands(reader, old_nodes[reader.name]):
            if new.name in old_nodes or new.op == "placeholder":
                rewired.setdefault(reader, {})[new, old.name] = None
            else:
                replaced.setdefault(new, {})[old.name] = None
    for node in after.nodes:
        for old_name in replaced.get(node, ()):
            yield node, node, old_name
        for operand, old_name in rewired.get(node, ()):
            yield operand, _writer(operand, node), old_name
        if node.op == "call_function" and node.name in old_nodes:
            yield node, node, node.name


def changed_operands(new: fx.Node, old: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The operands that are other nodes than they were, each with the old one."""
    operands, were = (tree_leaves([node.args, node.kwargs]) for node in (new, old))
    if len(operands) != len(were):
        return []
    pairs = zip(operands, were, strict=True)
    return [(n, o) for n, o in pairs if isinstance(n, fx.Node) and isinstance(o, fx.Node) and n.name != o.name]


def _writer(operand: fx.Node, reader: fx.Node) -> fx.Node:
    """Who is to blame for the value that `reader` reads: the last node that wrote to it, or the reader's choice."""
    writers = [user for user in operand.users if user < reader and is_mutable(user)]
    return max(writers, default=reader)


def distance(found: Any, expected: Any) -> float:
    """The largest relative error over the tensors of two values."""
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=False)
    return max((relative_error(one, other) for one, other in pairs), default=0.0)


def relative_error(found: Any, expected: Any) -> float:
    """max|found − expected| / max|expected| of what is finite; infinite for another shape, and where a NaN or an
    infinity stands on one side only. Those that stand on both sides are equal."""
    if not isinstance(expected, Tensor):
        return 0.0 if found == expected else math.inf
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else math.inf
    finite = torch.isfinite(found) & torch.isfinite(expected)
    if not finite.all():
        one, other = (side[~finite].double() for side in (found, expected))
        if not torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True):
            return math.inf
        found, expected = found[finite], expected[finite]
    difference = (found - expected).abs().amax().item() if expected.numel() else 0.0
    if difference == 0.0:
        return 0.0
    scale = expected.abs().amax().item()
    return difference / scale if scale else math.inf
