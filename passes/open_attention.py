"""scaled_dot_product_attention → the two products and the softmax that it stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes.base import Context, Outcome, Pass, call, calls, is_call, shape_of
from passes.lifting import is_product, lift
from passes.masks import size_of
from passes.nodes import cast, dtype_of

aten = torch.ops.aten
CACHE_WRITES = (aten.cat, aten.index_copy, aten.index_put, aten.slice_scatter, aten.scatter)
WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@dataclass(frozen=True)
class OpenAttention(Pass):
    """scaled_dot_product_attention(q, k, v, mask, scale)   →   softmax(mask(scale · q · kᵀ)) · v

    So that products before and behind it can be ordered together with those inside. The softmax is the one of which
    a row that sees nothing is zero. `close-attention` puts together again what no pass had a use for.
    """

    prepares: ClassVar[bool] = True

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        graph, outcome = graph_module.graph, Outcome()
        for node in calls(graph, aten.scaled_dot_product_attention):
            arguments = arguments_of(node)
            reason = why_not(arguments)
            if reason is not None:
                outcome.refuse(node, reason)
                continue
            with graph.inserting_before(node):
                node.replace_all_uses_with(opened(graph, node, arguments))
            outcome.matches.append(node.name)
            graph.erase_node(node)  # a sweep would not: dropout makes it random
        return outcome


@dataclass(frozen=True)
class Arguments:
    """q [B, H, S, A], k [B, G, T, A], v [B, G, T, V]; the mask broadcasts to [B, H, S, T]."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    dropout: float
    causal: bool
    scale: float
    grouped: bool


def arguments_of(node: fx.Node) -> Arguments:
    """The call's arguments with torch's defaults filled in."""
    given: dict[str, Any] = dict(
        zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False)
    )
    given.update(node.kwargs)
    q = given["query"]
    scale = given.get("scale")
    if scale is None:
        width = shape_of(q)[-1]
        scale = 1 / math.sqrt(width) if isinstance(width, int) else math.nan
    return Arguments(
        q, given["key"], given["value"], given.get("attn_mask"), given.get("dropout_p", 0.0),
        given.get("is_causal", False), scale, given.get("enable_gqa", False),
    )  # fmt: skip


def why_not(found: Arguments) -> str | None:
    """The reason for leaving a call closed, or None."""
    if found.dropout:
        return "dropout is at work"
    if any(len(shape_of(n)) != 4 for n in (found.q, found.k, found.v)):
        return "queries, keys and values do not have four dims"
    if math.isnan(found.scale):
        return "the width of a head is free"
    if len({dtype_of(n) for n in (found.q, found.k, found.v)}) > 1:
        return "queries, keys and values have different dtypes"
    heads = [shape_of(n)[1] for n in (found.q, found.k, found.v)]
    if found.grouped and not (all(isinstance(h, int) for h in heads) and heads[1] == heads[2]):
        return "the groups of heads are of free or different number"
    return why_keys_stay(found.k)


def why_keys_stay(keys: fx.Node) -> str | None:
    """Why no weight before the keys [B, H, T, A] can go anywhere else, or None."""
    value = lift(keys)
    if is_product(value) and (value.joined is None or value.joined not in value.dims[2]):
        return None
    seen, stack = {keys}, [keys]
    while stack:
        node = stack.pop()
        if is_call(node, aten.linear) and len(node.args) > 2 and node.args[2] is not None:
            return f"{node.name} adds a bias to the keys, so its weight cannot be absorbed"
        for source in node.all_input_nodes:
            if isinstance(source.meta["val"], torch.Tensor) and is_product(lift(source)):
                return _why_edge_blocks(source, node)
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return "no weight stands before the keys"


def _why_edge_blocks(source: fx.Node, node: fx.Node) -> str:
    others = [one for one in node.all_input_nodes if one is not source]
    if is_call(node, *CACHE_WRITES) and others:
        return f"the rows of {others[0].name} come in expanded already: {node.name} caches keys, not latents"
    if is_call(node, aten.mul):
        how = "multiplies element by element"
    elif is_call(node, aten.slice):
        how = "takes columns in steps, which is not followed"
    else:
        how = "is not linear"
    return f"the edge {source.name} → {node.name} {how}, so the weight before it cannot be absorbed"


def opened(graph: fx.Graph, node: fx.Node, found: Arguments) -> fx.Node:
    k, v = found.k, found.v
    if found.grouped:
        times = shape_of(found.q)[1] // shape_of(k)[1]
        k, v = (repeated(graph, one, times, node) for one in (k, v))
    transposed = call(graph, aten.transpose.int, k, -2, -1, like=node)
    scores = call(graph, aten.matmul.default, found.q, transposed, like=node)
    # The fused kernels keep scores wide.
    scores = cast(graph, scores, WIDE.get(dtype_of(scores), dtype_of(scores)))
    if found.scale != 1.0:
        scores = call(graph, aten.mul.Tensor, scores, found.scale, like=node)
    mask = causal_mask(graph, scores, node) if found.causal else found.mask
    if mask is not None and dtype_of(mask) == torch.bool:
        scores = call(graph, aten.where.ScalarOther, mask, scores, -math.inf, like=node)
    elif mask is not None:
        scores = call(graph, aten.add.Tensor, scores, cast(graph, mask, dtype_of(scores)), like=node)
    shares = call(graph, aten._safe_softmax.default, scores, -1, like=node)
    return call(graph, aten.matmul.default, cast(graph, shares, dtype_of(v)), v, like=node)


def repeated(graph: fx.Graph, node: fx.Node, times: int, like: fx.Node) -> fx.Node:
    """[B, G, T, A] → [B, G · times, T, A]"""
    if times == 1:
        return node
    return call(graph, aten.repeat_interleave.self_int, node, times, 1, like=like)


def causal_mask(graph: fx.Graph, scores: fx.Node, like: fx.Node) -> fx.Node:
    """[S, T] bool: query s sees the cached positions t ≤ s, aligned at the top left as torch does."""
    device = scores.meta["val"].device
    queries, cached = (
        call(graph, aten.arange.default, size_of(graph, scores, dim), device=device, like=like) for dim in (2, 3)
    )
    return call(graph, aten.le.Tensor, cached, call(graph, aten.unsqueeze.default, queries, 1, like=like), like=like)
