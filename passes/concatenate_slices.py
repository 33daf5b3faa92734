"""A buffer filled slice by slice → the concatenation that it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from passes.base import Context, Outcome, Pass, call, calls, is_call, same_size, shape_of
from passes.nodes import dtype_of

aten = torch.ops.aten
BUFFERS = (
    aten.empty, aten.new_empty, aten.empty_like, aten.zeros, aten.new_zeros, aten.zeros_like, aten.full, aten.new_full,
    aten.full_like, aten.ones, aten.new_ones, aten.ones_like,
)  # fmt: skip


@dataclass(frozen=True)
class ConcatenateSlices(Pass):
    """buffer = empty(…)
       buffer[…, :n] = a
       buffer[…, n:] = b    →   cat([a, b], −1)

    The slices must fill the buffer along one dim.
    """

    prepares: ClassVar[bool] = True

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        graph, outcome = graph_module.graph, Outcome()
        for last in reversed(list(calls(graph, aten.slice_scatter))):
            if any(is_call(user, aten.slice_scatter) and user.args[0] is last for user in last.users):
                continue  # not the last of its buffer
            pieces = filled(last)
            if isinstance(pieces, str):
                outcome.refuse(last, pieces)
                continue
            with graph.inserting_before(last):
                parts = [_as_written(graph, piece, last) for piece in pieces]
                new = call(graph, aten.cat.default, parts, _axis(last), like=last)
            last.replace_all_uses_with(new)
            outcome.matches.append(f"{last.name} is a concatenation of {len(parts)}")
        graph.eliminate_dead_code()
        return outcome


@dataclass(frozen=True)
class Written:
    """What was written to [start, stop) of the buffer's dim."""

    start: int
    stop: int
    slice: fx.Node  # the slice_scatter


def filled(last: fx.Node) -> list[Written] | str:
    """The pieces in the order in which they lie, or why they are no concatenation."""
    axis, node = _axis(last), last
    size = shape_of(last)[axis]
    if not isinstance(size, int):
        return "the slices lie along a dim of free size"
    pieces: list[Written] = []
    while is_call(node, aten.slice_scatter):
        given = list(node.args[3:])
        start, stop, step = (given + [None, None, 1][len(given) :])[:3]
        if _axis(node) != axis:
            return "the slices lie along different dims"
        if step != 1 or not all(n is None or isinstance(n, int) for n in (start, stop)):
            return "the slices have steps or free bounds"
        low, high, _ = slice(start, stop).indices(size)
        if all(high <= piece.start or low >= piece.stop for piece in pieces):
            pieces.append(Written(low, high, node))
        elif not any(piece.start <= low and high <= piece.stop for piece in pieces):
            return "later slices cover earlier ones in part"
        node = node.args[0]
    pieces.sort(key=lambda piece: piece.start)
    if not is_call(node, *BUFFERS):
        return f"{node.name} under the slices is not a fresh buffer"
    edges = [0, *(edge for piece in pieces for edge in (piece.start, piece.stop)), size]
    if edges[::2] != edges[1::2]:
        return "the slices do not fill the buffer"
    for piece in pieces:
        if _broadcasts_freely(piece.slice):
            return "a slice is filled by broadcasting along a dim of free size"
    return pieces


def _broadcasts_freely(scatter: fx.Node) -> bool:
    source = scatter.args[1].args[1] if is_call(scatter.args[1], aten.copy) else scatter.args[1]
    own, full = shape_of(source), shape_of(scatter)
    free = [size for size in full[: len(full) - len(own)] if not isinstance(size, int)]
    pairs = zip(own, full[len(full) - len(own) :], strict=True)
    return bool(free) or any(same_size(a, 1) and not isinstance(b, int) for a, b in pairs)


def _axis(scatter: fx.Node) -> int:
    return int(scatter.args[2] if len(scatter.args) > 2 else 0) % len(shape_of(scatter))


def _as_written(graph: fx.Graph, piece: Written, last: fx.Node) -> fx.Node:
    """The source at the shape and dtype of the slice that it fills."""
    scatter, source = piece.slice, piece.slice.args[1]
    if is_call(source, aten.copy):  # into a slice of the buffer, whose old content is overwritten
        source = source.args[1]
    axis = _axis(scatter)
    shape = [*shape_of(scatter)]
    shape[axis] = piece.stop - piece.start
    for _ in range(len(shape) - len(shape_of(source))):
        source = call(graph, aten.unsqueeze.default, source, 0, like=last)
    sizes = [-1 if same_size(own, full) else full for own, full in zip(shape_of(source), shape, strict=True)]
    if any(size != -1 for size in sizes):
        source = call(graph, aten.expand.default, source, sizes, like=last)
    if dtype_of(source) != dtype_of(scatter):
        source = call(graph, aten._to_copy.default, source, dtype=dtype_of(scatter), like=last)
    return source
