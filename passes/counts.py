"""What counts of indices count."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from passes.base import is_call, shape_of
from passes.distinct import distinct
from passes.nodes import CASTS, constant_of, counts_up, settled

aten = torch.ops.aten


def counted_indices(offsets: fx.Node) -> tuple[fx.Node, bool] | None:
    """The indices that `offsets` [E] count: their number up to each expert. True: only if they are sorted."""
    offsets, experts = uncast_integers(offsets), shape_of(offsets)[0]
    if is_call(offsets, aten.searchsorted):
        indices, bounds = offsets.args[:2]
        right = offsets.kwargs.get("right", False) or offsets.kwargs.get("side") == "right"
        return (indices, True) if counts_up(bounds, 0 if right else 1) else None
    if not is_call(offsets, aten.cumsum):
        return None
    counts = uncast_integers(offsets.args[0])
    indices = _counted(counts, experts)
    return None if indices is None else (indices, False)


def _counted(counts: Any, experts: int) -> fx.Node | None:
    """The indices of which there are `counts` [E]."""
    if is_call(counts, aten.histc):
        indices, bins, low, high = (*counts.args, 100, 0, 0)[:4] if len(counts.args) < 4 else counts.args
        return indices if bins == experts and low == 0 and high in (experts - 1, experts) else None
    if is_call(counts, aten.bincount):
        return counts.args[0] if len(counts.args) < 2 or counts.args[1] is None else None
    if is_call(counts, aten.scatter_add, aten.index_add):
        base, _, indices, ones = counts.args[:4]
        return indices if constant_of(base) == 0 and constant_of(ones) == 1 else None
    if is_call(counts, aten.sum) and len(counts.args) > 1:
        hot = counts.args[0]
        rank = len(shape_of(hot))
        if {d % rank for d in counts.args[1]} == set(range(rank - 1)):
            indices = one_hot_indices(hot)
            return _marked_indices(hot) if indices is None else indices
    return None


def one_hot_indices(hot: Any) -> fx.Node | None:
    """indices behind hot[.., e] = (indices[..] == e): the op, or a comparison with 0, 1, …, in any type."""
    hot = uncast_integers(hot)
    if is_call(hot, aten.one_hot):
        return hot.args[0]
    if is_call(hot, aten.eq):
        for column, row in (hot.args[:2], hot.args[1::-1]):
            if counts_up(row, 0) and is_call(column, aten.unsqueeze):
                return column.args[0] if column.args[1] in (-1, len(shape_of(column)) - 1) else None
    return None


def _marked_indices(hot: Any) -> fx.Node | None:
    """indices behind a mask of different ones: hot[.., e] = any(indices[.., k] == e)."""
    hot = uncast_integers(hot)
    if is_call(hot, aten.scatter) and constant_of(hot.args[0]) == 0 and constant_of(hot.args[3]) == 1:
        axis, indices = hot.args[1:3]
        last = len(shape_of(hot)) - 1
        if axis % (last + 1) == last and distinct(indices, last):
            column = is_call(indices, aten.unsqueeze) and shape_of(indices)[-1] == 1
            return indices.args[0] if column else indices
    return None


def uncast_integers(node: Any) -> Any:
    """Integers behind casts: up to 2²⁴ they are exact in any type that they are counted in."""
    node = settled(node)
    while is_call(node, *CASTS):
        node = settled(node.args[0])
    return node
