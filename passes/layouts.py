"""Moving dims of tensors whose dims carry labels.

Every dim carries one label: `E` for the experts, a lower-case letter for a token axis, `.` for anything else (a
feature), `1` for a dim of size one that is broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

from passes.base import call, is_call, same_size, shape_of
from passes.products import BROADCAST, sources_of_dims

aten = torch.ops.aten

EXPERT, FEATURE = "E", "."
TOKEN_AXES = "tuvw"


def has_labels(axes: int) -> bool:
    """Are there labels for so many axes, one of them of the experts?"""
    return 0 < axes <= len(TOKEN_AXES) + 1


class Layouts:
    """Writes calls in the name of one node, each once."""

    def __init__(self, graph: fx.Graph, like: fx.Node) -> None:
        self.graph, self.like = graph, like
        self.written: dict[Any, fx.Node] = {}

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call, or take the same one inserted before."""
        key = (target, str(args), str(kwargs))
        if key not in self.written:
            self.written[key] = call(self.graph, target, *args, like=self.like, **kwargs)
        return self.written[key]

    def leading(self, node: fx.Node, labels: str, lead: str) -> fx.Node:
        """Dims `lead` first, merged to one; then the others. Broadcast dims are dropped."""
        ones = [d for d, label in enumerate(labels) if label == BROADCAST]
        if ones:
            node = self.squeezed(node, ones)
            labels = labels.replace(BROADCAST, "")
        first = [labels.index(label) for label in lead]
        node = self.permuted(node, first + [d for d in range(len(labels)) if d not in first])
        return self.merged(node, 0, len(lead)) if lead else node

    def permuted(self, node: fx.Node, order: Sequence[int]) -> fx.Node:
        """Dims in another order, with permutations before it merged into one."""
        if list(order) == sorted(order):
            return node
        while is_call(node, aten.permute, aten.transpose, aten.t):
            sources = sources_of_dims(node)
            assert sources is not None
            node, order = node.args[0], [cast(int, sources[d]) for d in order]
        return node if list(order) == sorted(order) else self.call(aten.permute.default, node, list(order))

    def squeezed(self, node: fx.Node, dims: Sequence[int]) -> fx.Node:
        if is_call(node, aten.unsqueeze) and list(dims) == [node.args[1]]:
            return node.args[0]
        return self.call(aten.squeeze.dims, node, list(dims))

    def merged(self, node: fx.Node, start: int, count: int) -> fx.Node:
        """`count` dims from `start` on as one."""
        if count == 0:
            return self.call(aten.unsqueeze.default, node, start)
        if count == 2 and is_call(node, aten.unsqueeze) and node.args[1] in (start, start + 1):
            return node.args[0]
        return node if count == 1 else self.call(aten.flatten.using_ints, node, start, start + count - 1)


def aligned_labels(argument: fx.Node, node: fx.Node, labels: str) -> str:
    """Labels of an input of a pointwise node, whose shape broadcasts to the node's."""
    shape, wide = shape_of(argument), shape_of(node)
    skipped = len(wide) - len(shape)
    return "".join(
        label if label == FEATURE or same_size(size, full) else BROADCAST
        for size, full, label in zip(shape, wide[skipped:], labels[skipped:], strict=True)
    )


def labels_before(node: fx.Node, labels: str, sources: Sequence[int | None]) -> str:
    """Labels of a rearrangement's input; dims it drops are of size one."""
    before = [BROADCAST] * len(shape_of(node.args[0]))
    for source, label in zip(sources, labels, strict=True):
        if source is not None:
            before[source] = label
    return "".join(before)
