"""Attention over the two parts of every head where they are, instead of beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from codegen.targets import Target
from passes.base import call, is_call, same_size, shape_of, told
from passes.fuse_rotary import last_axis_of_result
from passes.launches import FuseLaunches
from passes.nodes import dtype_of, erase_dead, readers

aten, dsv3 = torch.ops.aten, torch.ops.dsv3
HEADS = 2  # the axis of [B, T, H, R]


@dataclass(frozen=True)
class SplitHeads(FuseLaunches):
    """attention(cat([q, r], -1), cat([k, s], -1), v, …)    →    attention(q, k, v, …, q_rope=r, k_rope=s)

    A rope key that was expanded to all heads is read as the one that it is. Not on the CPU, where attention is torch's
    and wants whole heads.
    """

    op: ClassVar[str] = "attention"

    def lacks(self, target: Target) -> str | None:
        return "on the CPU attention is torch's, which wants whole heads" if target.backend == "cpu" else None

    def when(self, node: fx.Node) -> str | None:
        if not is_call(node, dsv3.attention) or len(node.args) > 5 or not is_call(node.args[0], aten.cat):
            return ""
        for joined in node.args[:2]:
            if not is_call(joined, aten.cat):
                return f"{joined.name} is not put together from parts"
            reason = why_not_two_parts(joined) or why_not_alone(joined, node)
            if reason is not None:
                return reason
        queries, keys = ([shape_of(part)[-1] for part in joined.args[0]] for joined in node.args[:2])
        return None if all(map(same_size, queries, keys)) else f"queries are cut at {queries[0]}, keys at {keys[0]}"

    def rewrite(self, graph: fx.Graph, node: fx.Node) -> str:
        (q, q_rope), (k, k_rope) = (joined.args[0] for joined in node.args[:2])
        with graph.inserting_before(node):
            new = call(graph, dsv3.attention.default, q, k, *node.args[2:], q_rope, shared_row(k_rope), like=node)
        node.replace_all_uses_with(new)
        erase_dead(graph, node)
        return told(node.name, new)


def why_not_two_parts(joined: fx.Node) -> str | None:
    """Why a concatenation does not put two parts of every head side by side, or None."""
    if not last_axis_of_result(joined):
        return f"{joined.name} is not over the last axis"
    parts = joined.args[0]
    if len(parts) != 2:
        return f"{joined.name} has {len(parts)} parts"
    if len({dtype_of(part) for part in parts}) > 1:
        return f"{parts[0].name} and {parts[1].name} differ in dtype"
    return None


def why_not_alone(joined: fx.Node, reader: fx.Node) -> str | None:
    others = [one.name for one in readers(joined) if one is not reader]
    return f"{joined.name} is read by {others[0]} as well" if others else None


def shared_row(part: fx.Node) -> fx.Node:
    """What was expanded over heads, or the part itself."""
    if not is_call(part, aten.expand):
        return part
    source, before, after = part.args[0], shape_of(part.args[0]), shape_of(part)
    others = [axis for axis in range(len(after)) if axis != HEADS]
    if len(before) != len(after) or not all(same_size(before[axis], after[axis]) for axis in others):
        return part
    return source if same_size(before[HEADS], 1) else part
