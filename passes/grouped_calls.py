"""Grouped products as libraries have them: rows sorted by group, one matrix per group, and where each group ends."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from passes.base import shape_of
from passes.foreign_ops import gives, named_arguments

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
    known = named_arguments(node)
    if len(known) < 3 or [*known][2] not in ENDS:
        return None
    rows, stack, offsets, *others = known.values()
    if any(other is not None for other in others) or not all(isinstance(n, fx.Node) for n in (rows, stack, offsets)):
        return None
    ranks = tuple(len(shape_of(n)) for n in (rows, stack, offsets))
    return GroupedCall(rows, stack, offsets) if ranks == (2, 3, 1) and multiplies_groups(node.target) else None


@functools.cache
def multiplies_groups(target: torch._ops.OpOverload) -> bool:
    """Is it a grouped product? Tried with an empty group."""
    if target is aten._grouped_mm.default:
        return True
    generator = torch.Generator().manual_seed(0)
    rows, stack = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 3), (3, 3, 4)))
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    return gives(target, (rows, stack, offsets), grouped_product(rows, stack, offsets))


def grouped_product(rows: Tensor, stack: Tensor, offsets: Tensor) -> Tensor:
    """rows [M, D], stack [E, D, O], offsets [E], the ends of the groups → [M, O]. What such calls compute."""
    groups = rows.tensor_split(offsets[:-1].cpu().to(torch.int64))
    return torch.cat([group @ matrix for group, matrix in zip(groups, stack, strict=True)])
