"""Which axes of the operands around a softmax are batch, heads, queries and cached positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from passes.base import shape_of
from passes.contraction import Axis, Operand, Value
from passes.masks import NotAttention


@dataclass(frozen=True)
class Axes:
    """The axes of scores [B, H, S, T]; several for heads in groups."""

    b: Axis
    h: tuple[Axis, ...]
    s: Axis
    t: Axis

    @classmethod
    def of(cls, groups: Sequence[Sequence[Axis]], queries: int) -> Axes:
        """Of four dims, the queries along dim `queries`."""
        b, s, t = (_single(groups[dim]) for dim in (0, queries, 3))
        return cls(b, tuple(groups[3 - queries]) or (Axis(1),), s, t)

    def width(self, operand: Operand) -> Axis:
        known = (self.b, *self.h, self.s, self.t)
        left = [axis for axis in operand.axes if axis not in known and axis.size != 1]
        if len(left) != 1:
            raise NotAttention(f"{operand.node.name} has {len(left)} widths instead of one")
        return left[0]

    def heads(self, *operands: Operand) -> tuple[Axis, ...]:
        """The fewest leading axes of the heads that hold all that the operands have."""
        held = {axis for operand in operands for axis in operand.axes if axis.size != 1}
        return self.h[: max((k + 1 for k, axis in enumerate(self.h) if axis in held), default=0)]


def unfolded(groups: Sequence[Sequence[Axis]], batched: bool) -> list[Sequence[Axis]]:
    """Of scores [B·H, S, T], or shares, the axes as if they were [B, H, S, T].

    batched: is a first axis that stands alone the batch? Else it is the heads of one request.
    """
    if len(groups) == 4:
        return list(groups)
    folded, *rest = groups
    batch = 1 if batched or len(folded) > 1 else 0
    return [folded[:batch], folded[batch:], *rest]


def is_batch_alone(scores: Value) -> bool:
    """Of scores [X, S, T] or [B, H, S, T] that the softmax has in three dims: is their first one no more than a batch?

    All keys have rows of their own for every request.
    """
    groups = scores.dims
    if len(groups) == 4:
        return is_one(groups[1])
    keys = [one for term in scores.terms for one in term.operands if set(groups[2]) & set(one.axes)]
    return len(groups[0]) <= 1 and all(set(groups[0]) <= set(key.axes) for key in keys)


def _single(group: Sequence[Axis]) -> Axis:
    wide = [axis for axis in group if axis.size != 1] or list(group[:1])
    if len(wide) > 1:
        raise NotAttention("the scores have merged dims")
    return wide[0] if wide else Axis(1)


def is_one(group: Sequence[Axis]) -> bool:
    return all(axis.size == 1 for axis in group)


def dims_of(operand: Operand) -> list[list[Axis]]:
    """The axes that each dim of the operand's tensor was split into."""
    groups: list[list[Axis]] = [[] for _ in shape_of(operand.node)]
    for dim, axis in zip(_owners(operand)[0], operand.axes, strict=True):
        groups[dim].append(axis)
    return groups


def identity(operand: Operand) -> tuple[Any, ...]:
    """Equal for operands that are the same part of the same tensor, whatever dims of size one they show."""
    return operand.node, _owners(operand)[1]


def _owners(operand: Operand) -> tuple[list[int], tuple[Any, ...]]:
    """For each axis the tensor's dim that it comes from, and the slices and splits on the way."""
    owners, changes = list(range(len(shape_of(operand.node)))), []
    for kind, dim, *how in operand.steps:
        if kind == "slice" or how[0]:
            changes.append((kind, owners[dim], *how))
        if kind != "slice":
            owners[dim : dim + 1] = [owners[dim]] * len(how[0])
    return owners, tuple(changes)
