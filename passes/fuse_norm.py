"""RMSNorm, alone or behind a residual sum, as one op."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from passes.base import call, is_call, shape_of
from passes.nodes import (
    CASTS,
    bring_before,
    dtype_of,
    is_tensor,
    keeps,
    over_last_axis,
    same_shape,
    weights_only,
    widens,
)
from passes.rewrite import Cast, Found, Match, Number, Op, Pattern, Rewrite, Var

aten, dsv3 = torch.ops.aten, torch.ops.dsv3


def mean_is_kept(node: fx.Node) -> bool:
    return over_last_axis(node, 1) and (node.args[2:3] == (True,) or node.kwargs.get("keepdim", False))


def one_axis(node: fx.Node) -> bool:
    return len(node.args[1]) == 1


x, weight, eps = Var("x"), Cast(Var("weight")), Number("eps")
wide = Cast(x)
square = Op((aten.pow,), (wide, Number(value=2))) | Op((aten.square,), (wide,)) | wide * wide
variance = Op((aten.mean,), (square,), check=mean_is_kept) + eps
root = Op((aten.sqrt,), (variance,)) | Op((aten.pow,), (variance, Number(value=0.5)))
inverse = (
    Op((aten.rsqrt,), (variance,)) | Op((aten.pow,), (variance, Number(value=-0.5))) | Op((aten.reciprocal,), (root,))
)
unit = wide * inverse | wide / root
written_out = Cast(unit, lossy=True) * weight | wide * weight * inverse | wide * (inverse * weight)
RMS_NORM = (
    Op((aten.rms_norm,), (wide, None, weight, eps), check=one_axis)
    | written_out
    | Op((aten.rms_norm,), (x,))  # something is missing: `when` says what
)


@dataclass(frozen=True)
class FuseNorm(Rewrite):
    """s = a + b                                  n, s = add_rms_norm(a, b, w, ε)
       n = s · rsqrt(mean(s²) + ε) · w       →
       n = rms_norm(x, w, ε)                      n = rms_norm(x, w, ε)

    The sum stays there for its other readers. A norm that rounds before it multiplies by the weight stays as it is,
    unless its dtype has nothing to round.
    """  # fmt: skip

    before: ClassVar[Pattern] = RMS_NORM

    def when(self, match: Match) -> str | None:
        return why_no_norm(match) or match.leak()

    def after(self, graph: fx.Graph, match: Match) -> fx.Node:
        return normalised(graph, match)


def normalised(graph: fx.Graph, match: Match) -> fx.Node:
    """The op in place of a norm, at the graph's insertion point; with the residual sum in front of it, in its place."""
    total, weight, eps = match["x"], match["weight"], float(match["eps"])
    if not is_residual_sum(total) or not (weights_only(weight) or weight < total):
        return call(graph, dsv3.rms_norm.default, total, weight, eps, like=match.root)
    bring_before(total, weight)
    with graph.inserting_before(total):
        both = call(graph, dsv3.add_rms_norm.default, *total.args[:2], weight, eps, like=match.root)
        normed, summed = (call(graph, operator.getitem, both, i, like=match.root) for i in (0, 1))
    total.replace_all_uses_with(summed)
    return normed


def why_no_norm(match: Match, rounded: bool = False) -> str | None:
    """What keeps a matched norm from being the op, apart from readers of its intermediate values.

    rounded: a value that is rounded to the dtype of x before it is multiplied by the weight is none of that.
    """
    if "weight" not in match.bound:
        if not one_axis(match.root):
            return f"{match.root.name} normalises {len(match.root.args[1])} axes"
        missing = "weight" if match.root.args[2:3] in ((), (None,)) else "eps of its own"
        return f"{match.root.name} has no {missing}"
    x, weight = match["x"], match["weight"]
    if tuple(shape_of(weight)) != tuple(shape_of(x)[-1:]):
        return f"the weight {weight.name} is not one number per element of the last axis"
    for node in match.inner:
        if not is_call(node, *CASTS) or widens(dtype_of(node.args[0]), dtype_of(node)):
            continue
        if not (rounded and widens(dtype_of(x), dtype_of(node))):
            return f"{node.name} rounds to {dtype_of(node)} before the weight is applied"
    if keeps(match.root, dtype_of(x)):
        return f"{match.root.name} is not rounded to {dtype_of(x)}, in which its input is"
    return None


def is_residual_sum(node: fx.Node) -> bool:
    return (
        is_call(node, aten.add)
        and not node.kwargs
        and all(is_tensor(a) and same_shape(a, node) and dtype_of(a) == dtype_of(node) for a in node.args)
    )


def read_norm(node: fx.Node) -> Match | None:
    """The node as an RMSNorm, if the op computes the same."""
    for found in RMS_NORM.search(node, Found()):
        match = Match(node, found.bound, found.inner)
        if why_no_norm(match) is None:
            return match
    return None


def nearest_norm(node: fx.Node, rounded: bool = False) -> Match | str:
    """The node as an RMSNorm of which nobody reads a part, or why it is none; '' if it does not look like one."""
    misses = [(0, "")]
    for found in RMS_NORM.search(node, Found()):
        match = Match(node, found.bound, found.inner)
        reason = why_no_norm(match, rounded) or match.leak()
        if reason is None:
            return match
        misses.append((len(match.inner), reason))
    return max(misses, key=lambda miss: miss[0])[1]
