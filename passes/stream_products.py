"""Products of few rows with a weight, in the kernel that streams weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from passes.base import Context, call, is_call, source_line
from passes.launches import FuseLaunches, why_not_few
from passes.nodes import dtype_of, erase_dead, weights_only

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


@dataclass(frozen=True)
class StreamProducts(FuseLaunches):
    """linear(x, W)    →    dsv3.linear(x, W)

    For rows so few that reading the weight is all there is to do: the kernel begins to read it while the one before
    still runs. Products of many rows are the library's.
    """

    op: ClassVar[str] = "linear"

    def when(self, node: fx.Node) -> str | None:
        if not is_call(node, aten.linear):
            return ""
        if len(node.args) > 2 and node.args[2] is not None:
            return f"{node.name} has a bias"
        if not weights_only(node.args[1]):
            return f"{node.name} is no product with a weight"
        if any(dtype_of(one) not in (torch.bfloat16, torch.float16) for one in node.args[:2]):
            return f"{node.name} is not one of 16-bit floats"
        return None

    def outside(self, node: fx.Node, context: Context) -> str | None:
        return why_not_few(node, context)

    def rewrite(self, graph: fx.Graph, node: fx.Node) -> str:
        with graph.inserting_before(node):
            new = call(graph, dsv3.linear.default, *node.args[:2], like=node)
        node.replace_all_uses_with(new)
        erase_dead(graph, node)
        where = source_line(new)
        return f"{node.name} → {new.name}" + (f" ({where})" if where else "")
