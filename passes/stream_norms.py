"""Norms between kernels, in a kernel that does not end their chain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes.base import Context, is_call, shape_of
from passes.fuse_norm import is_residual_sum, nearest_norm, normalised
from passes.launches import REGROUPINGS, FuseLaunches, runs_kernel, why_not_few
from passes.nodes import settled, substitute, users, weights_only
from passes.products import part_of
from passes.rewrite import Match, matched

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


@dataclass(frozen=True)
class StreamNorms(FuseLaunches):
    """s = a + b                                  n, s = add_rms_norm(a, b, w, ε)
       n = s · rsqrt(mean(s²) + ε) · w       →
       n = x · rsqrt(mean(x²) + ε) · w            n = rms_norm(x, w, ε)

    Of few rows that come from a kernel of the target and go to nothing but kernels of the target: the one behind
    begins to read its weight while the one before still runs, which no other kernel in between would let it. Other
    norms are better fused with what surrounds them. The op rounds once; a graph may have rounded before it multiplied
    by the weight.
    """  # fmt: skip

    op: ClassVar[str] = "rms_norm"

    def when(self, node: fx.Node) -> str | None:
        match = nearest_norm(node, rounded=True)
        if not isinstance(match, Match):
            return match
        # The kernel reads it while the kernel before may still write.
        return None if weights_only(match["weight"]) else f"{match['weight'].name} is no weight"

    def outside(self, node: fx.Node, context: Context) -> str | None:
        match = norm_of(node)
        few = why_not_few(node, shape_of(node)[:-1], context)
        if few is not None:
            return few
        if not any(runs_kernel(source, context.target) for source in sources(match["x"])):
            return f"{match['x'].name} comes from no kernel of {context.target.name}"
        other = next((one for one in readers(node) if not runs_kernel(one, context.target)), None)
        return None if other is None else f"{other.name} reads {node.name} and is no kernel of {context.target.name}"

    def rewrite(self, graph: fx.Graph, node: fx.Node) -> str:
        with graph.inserting_before(node):
            new = normalised(graph, norm_of(node))
        substitute(graph, node, new)
        return matched(node, new)


def norm_of(node: fx.Node) -> Match:
    match = nearest_norm(node, rounded=True)
    assert isinstance(match, Match)
    return match


def sources(x: fx.Node) -> Iterator[Any]:
    """What a value is made of: itself or both sides of a residual sum, through views and parts."""
    for value in x.args if is_residual_sum(x) else (x,):
        value = settled(value)
        while is_call(value, *REGROUPINGS) or part_of(value) is not None:
            part = part_of(value)
            value = settled(value.args[0] if part is None else part.source)
        yield value


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a value, through views that regroup its rows."""
    for user in users(node):
        if is_call(user, *REGROUPINGS):
            yield from readers(user)
        else:
            yield user
