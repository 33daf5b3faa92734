"""SwiGLU as one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from passes.base import call, is_call
from passes.bounds import Limited
from passes.nodes import dtype_of, keeps
from passes.products import join, part_of
from passes.rewrite import Cast, Match, Op, Pattern, Rewrite, Var

aten = torch.ops.aten


def gated(gate: Pattern, up: Pattern) -> Pattern:
    """silu(gate) * up, in any precision, gates up to a limit and ups within ± it if there is one."""
    gate, up = Cast(Limited(Cast(gate))), Cast(Limited(Cast(up), both=True))
    silu = Op((aten.silu,), (gate,)) | gate * Op((aten.sigmoid,), (gate,))
    return Cast(silu, lossy=True) * up


@dataclass(frozen=True)
class FuseSwiglu(Rewrite):
    """gate, up = split(gate_up)
       silu(gate) * up                →    swiglu(gate_up)

    `gate_up` is mostly what merge-projections made; gate and up may also be neighbours in something wider. A limit of
    both is the op's (`passes.bounds`).
    """  # fmt: skip

    prepares: ClassVar[bool] = True

    before: ClassVar[Pattern] = gated(Var("gate"), Var("up"))

    def when(self, match: Match) -> str | None:
        reason = self.why_not(match)
        # Of experts whose gates and ups are no neighbours `fuse-experts` makes one op all the same, or says why not.
        return "" if reason and any(is_of_experts(match[name]) for name in ("gate", "up")) else reason

    def why_not(self, match: Match) -> str | None:
        first, second = (part_of(match[name]) for name in ("gate", "up"))
        if first is None or second is None or first.source is not second.source:
            return f"{match['gate'].name} and {match['up'].name} are not parts of one product"
        if not first.axis == second.axis == len(match.root.meta["val"].shape) - 1:
            return f"{first.source.name} is not split along its last axis"
        if first.length != second.length:
            return f"{match['gate'].name} and {match['up'].name} differ in width"
        if first.start + first.length != second.start or not first.step == second.step == 1:
            return f"{match['up'].name} does not follow {match['gate'].name} in {first.source.name}"
        if keeps(match.root, dtype_of(first.source)):
            return f"{match.root.name} is not rounded to {dtype_of(first.source)}, in which its inputs are"
        return match.leak()

    def after(self, graph: fx.Graph, match: Match) -> fx.Node:
        first, second = (part_of(match[name]) for name in ("gate", "up"))
        assert first is not None and second is not None
        gate_up = join(graph, first, second)
        limit = [] if match["limit"] is None else [match["limit"]]
        return call(graph, torch.ops.dsv3.swiglu.default, gate_up, *limit, like=match.root)


def is_of_experts(node: fx.Node) -> bool:
    """Is it a grouped product, or a part of one?"""
    part = part_of(node)
    return is_call(node if part is None else part.source, torch.ops.dsv3.grouped_linear)
