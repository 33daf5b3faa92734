"""Two products around a softmax, as `open-attention` writes them → scaled_dot_product_attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes.base import Context, Outcome, Pass, call, calls, is_call, same_size, shape_of
from passes.lifting import is_product, lift
from passes.masks import counts_to
from passes.nodes import CASTS, constant_of, dtype_of
from passes.open_attention import Arguments

aten = torch.ops.aten


@dataclass(frozen=True)
class CloseAttention(Pass):
    """softmax(mask(scale · q · kᵀ)) · v   →   scaled_dot_product_attention(q, k, v, mask, scale)

    Takes back what `open-attention` did wherever no pass between the two had a use for it; the safe softmax tells.
    Scores that were brought to another order stay products.
    """

    prepares: ClassVar[bool] = True

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        graph, outcome = graph_module.graph, Outcome()
        for softmax in calls(graph, aten._safe_softmax):
            try:
                out, found = read(softmax)
            except NotOpened as refusal:
                outcome.refuse(softmax, str(refusal))
                continue
            with graph.inserting_before(out):
                node = closed(graph, out, found)
            out.replace_all_uses_with(node)
            outcome.matches.append(node.name)
        graph.eliminate_dead_code()
        return outcome


class NotOpened(Exception):
    """Why a softmax is not the middle of an opened attention."""


def read(softmax: fx.Node) -> tuple[fx.Node, Arguments]:
    """(the product of shares and values, arguments of the call that it stands for)."""
    out = _only_user(softmax)
    if is_call(out, *CASTS):
        out = _only_user(out)
    if not is_call(out, aten.matmul) or len(shape_of(softmax)) != 4 or softmax.args[1] not in (-1, 3):
        raise NotOpened("the shares are not multiplied with values [B, H, T, V]")
    values = out.args[1]
    node, mask, causal = read_mask(softmax)
    scale = 1.0
    if is_call(node, aten.mul) and isinstance(node.args[1], (int, float)):
        node, scale = _inside(node).args[0], float(node.args[1])
    if is_call(node, *CASTS):
        node = _inside(node).args[0]
    if not is_call(node, aten.matmul) or not is_call(node.args[1], aten.transpose):
        raise NotOpened(f"{node.name} is no product of queries [B, H, S, A] and keys [B, H, T, A]")
    query, transposed = _inside(node).args
    if {d % 4 for d in transposed.args[1:3]} != {2, 3}:
        raise NotOpened(f"{transposed.name} does not exchange positions and widths")
    key = transposed.args[0]
    if any(len(shape_of(n)) != 4 for n in (query, key, values)) or len({dtype_of(n) for n in (query, key, values)}) > 1:
        raise NotOpened("queries, keys and values differ in rank or dtype")
    sources = [grouped(n) for n in (key, values)]
    repeated = shape_of(query)[1], sources[0] is not key and sources[1] is not values
    if repeated[1] and _same_groups(*sources):
        return out, Arguments(query, sources[0], sources[1], mask, 0.0, causal, scale, True)
    return out, Arguments(query, key, values, mask, 0.0, causal, scale, False)


def _only_user(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise NotOpened(f"{node.name} is used by {', '.join(user.name for user in node.users) or 'nothing'}")
    return next(iter(node.users))


def _inside(node: fx.Node) -> fx.Node:
    _only_user(node)
    return node


def read_mask(softmax: fx.Node) -> tuple[fx.Node, fx.Node | None, bool]:
    """(scaled scores, mask, whether it is the causal one)."""
    node = softmax.args[0]
    if is_call(node, aten.where) and constant_of(node.args[2]) == -math.inf:
        mask, scores, _ = _inside(node).args
        return (scores, None, True) if is_causal(mask, scores) else (scores, mask, False)
    if is_call(node, aten.add) and not is_product(lift(node.args[1])):
        scores, mask = _inside(node).args
        if is_call(mask, *CASTS) and dtype_of(mask.args[0]).is_floating_point:
            mask = mask.args[0]
        return scores, mask, False
    return node, None, False


def is_causal(mask: fx.Node, scores: fx.Node) -> bool:
    """Is it arange(T) ≤ arange(S)[:, None]?"""
    if not is_call(mask, aten.le) or not is_call(mask.args[1], aten.unsqueeze) or mask.args[1].args[1] != 1:
        return False
    queries, cached = shape_of(scores)[2:]
    return counts_to(mask.args[0], cached) and counts_to(mask.args[1].args[0], queries)


def grouped(node: fx.Node) -> fx.Node:
    """Keys or values before they are repeated for every head of their group."""
    return node.args[0] if is_call(node, aten.repeat_interleave) and node.args[2:] == (1,) else node


def _same_groups(key: fx.Node, values: fx.Node) -> bool:
    return same_size(shape_of(key)[1], shape_of(values)[1])


def closed(graph: fx.Graph, out: fx.Node, found: Arguments) -> fx.Node:
    options: dict[str, Any] = {"scale": found.scale}
    if found.grouped:
        options["enable_gqa"] = True
    return call(
        graph, aten.scaled_dot_product_attention.default,
        found.q, found.k, found.v, found.mask, found.dropout, found.causal, like=out, **options,
    )  # fmt: skip
