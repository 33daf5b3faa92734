"""Values added to rows of a tensor, in torch's ways to write it and in other libraries'."""

from __future__ import annotations

import functools

import torch
from torch import fx

from passes.base import is_call
from passes.foreign_ops import gives, named_arguments

aten = torch.ops.aten

INDICES = ("index", "indices")  # what libraries call the second argument


def added_rows(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(base, rows, values) of a node that adds values to rows of a base."""
    if is_call(node, aten.index_add) and node.args[1] == 0 and node.kwargs.get("alpha", 1) == 1:
        return node.args[0], node.args[2], node.args[3]
    if is_call(node, aten.scatter_add) and node.args[1] == 0:
        return node.args[0], node.args[2], node.args[3]
    if is_call(node, aten.index_put) and node.args[3:] == (True,) and len(node.args[1]) == 1:
        return node.args[0], node.args[1][0], node.args[2]
    if isinstance(node.target, torch._ops.OpOverload) and adds_to_rows(node.target):
        base, rows, values = named_arguments(node).values()
        return base, rows, values
    return None


@functools.cache
def adds_to_rows(target: torch._ops.OpOverload) -> bool:
    """Is it another library's scatter_add along the first axis?"""
    schema = target._schema
    kinds = [str(one.type) for one in (*schema.arguments, *schema.returns)]
    if target.namespace == "aten" or schema.is_mutable or kinds != ["Tensor"] * 4:
        return False
    if schema.arguments[1].name not in INDICES:
        return False
    generator = torch.Generator().manual_seed(0)
    base, values = (torch.randn(rows, 3, generator=generator, dtype=torch.float64) for rows in (4, 5))
    rows = torch.tensor([2, 0, 2, 3, 0])[:, None].repeat(1, 3)
    return gives(target, (base, rows, values), base.scatter_add(0, rows, values))
