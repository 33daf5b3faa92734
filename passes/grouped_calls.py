"""Grouped products as libraries have them: rows sorted by group, one matrix per group, and where each group ends."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from passes.base import is_call, shape_of
from passes.nodes import CASTS, constant_of, counts_up, settled

aten = torch.ops.aten

ENDS = ("offs", "offsets")  # what libraries call the argument


@dataclass(frozen=True)
class GroupedCall:
    """rows [M, D], stack [E, D, O], offsets [E]: rows of group e times stack[e]."""

    rows: fx.Node
    stack: fx.Node
    offsets: fx.Node


def grouped_call(node: fx.Node) -> GroupedCall | None:
    """Read a node as a grouped product, or None."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    names = [argument.name for argument in node.target._schema.arguments]
    if len(names) < 3 or names[2] not in ENDS:
        return None
    known = node.kwargs | dict(zip(names, node.args, strict=False))
    rows, stack, offsets, *others = (known.get(name) for name in names)
    if any(other is not None for other in others) or not all(isinstance(n, fx.Node) for n in (rows, stack, offsets)):
        return None
    ranks = tuple(len(shape_of(n)) for n in (rows, stack, offsets))
    return GroupedCall(rows, stack, offsets) if ranks == (2, 3, 1) and multiplies_groups(node.target) else None


@functools.cache
def multiplies_groups(target: torch._ops.OpOverload) -> bool:
    """Is it a grouped product? Other libraries' ops are opaque, so it is asked for one, with an empty group in it."""
    if target is aten._grouped_mm.default:
        return True
    generator = torch.Generator().manual_seed(0)
    rows, stack = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 3), (3, 3, 4)))
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    try:
        found = target(rows, stack, offsets)
    except Exception:  # whatever somebody else's op raises
        return False
    expected = grouped_product(rows, stack, offsets)
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def grouped_product(rows: Tensor, stack: Tensor, offsets: Tensor) -> Tensor:
    """rows [M, D], stack [E, D, O], offsets [E], the ends of the groups → [M, O]. What such calls compute."""
    groups = rows.tensor_split(offsets[:-1].cpu().to(torch.int64))
    return torch.cat([group @ matrix for group, matrix in zip(groups, stack, strict=True)])


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
        hot = uncast_integers(counts.args[0])
        rank = len(shape_of(hot))
        if {d % rank for d in counts.args[1]} == set(range(rank - 1)):
            return _of_one_hot(hot)
    return None


def _of_one_hot(hot: Any) -> fx.Node | None:
    """indices behind hot[.., e] = (indices[..] == e)."""
    if is_call(hot, aten.one_hot):
        return hot.args[0]
    if is_call(hot, aten.eq):
        for column, row in (hot.args[:2], hot.args[1::-1]):
            if counts_up(row, 0) and is_call(column, aten.unsqueeze) and shape_of(column)[-1] == 1:
                return column.args[0]
    if is_call(hot, aten.scatter) and constant_of(hot.args[0]) == 0 and constant_of(hot.args[3]) == 1:
        column = hot.args[2]
        if is_call(column, aten.unsqueeze) and shape_of(column)[-1] == 1:
            return column.args[0]
    return None


def uncast_integers(node: Any) -> Any:
    """Integers behind casts: up to 2²⁴ they are exact in any type that they are counted in."""
    node = settled(node)
    while is_call(node, *CASTS):
        node = settled(node.args[0])
    return node
