"""Experts and routing as ONNX Runtime's own operators (domain com.microsoft): opt-in, that runtime only.

`MoE` softmaxes router scores over the chosen experts, so it is given the logarithm of the weights and its result is
multiplied by their sum. `MoEGroupRouter` is DeepSeek-V3's routing; other routings keep their standard operators.
"""

from __future__ import annotations

import math
from operator import getitem
from typing import Any

import torch
from torch import fx

from codegen.onnx.builder import Builder, Value
from codegen.onnx.translate import Translation
from codegen.onnx.vocabulary import limit_of, route

DOMAIN = "com.microsoft"
NOT_CHOSEN = -1e4  # below the logarithm of any weight
SMALLEST = 1e-30  # a weight of 0 has no logarithm
dsv3 = torch.ops.dsv3


def group_router(b: Builder, node: fx.Node, logits: Value, bias: Value | None, *options: Any) -> tuple[str, str]:
    """Where it fits: log-scores of all experts, and what the experts' sum is multiplied by. Else `route`."""
    if not _is_group_router(node):
        return route(b, node, logits, bias, *options)
    _, top_k, groups, top_groups, *_, scale = options
    scores = b.op(
        "MoEGroupRouter",
        b.cast(logits, torch.float32),
        b.cast(bias, torch.float32),  # type: ignore[arg-type]
        domain=DOMAIN,
        top_k=top_k,
        n_group=groups,
        topk_group=top_groups,
        group_topk=2,
        router_sentinel=NOT_CHOSEN,
    )
    return scores, b.scalar(scale, torch.float32)


def _is_group_router(node: fx.Node) -> bool:
    _, bias, scoring, _, _, _, group_score, masked, normalise, _, _ = node.args
    form = (scoring, group_score, masked, normalise) == ("sigmoid", "top2", -math.inf, True)
    readers = [user for half in node.users for user in half.users]
    return form and bias is not None and all(user.target is dsv3.routed_swiglu.default for user in readers)


def moe(
    b: Builder, node: fx.Node, x: Value, indices: Value, weights: Value, gate_up: Value, down: Value, *more: Any
) -> str:
    """gate_up has its rows interleaved: gate 0, up 0, gate 1, …"""
    experts, (tokens, top_k) = int(down.shape[0]), indices.shape
    half: Any = node.args[1]
    router = half.args[0] if half.target is getitem else half
    if router.target is dsv3.route.default and _is_group_router(router):
        scores, total = indices.name, weights.name
    else:
        wide = b.cast(weights, torch.float32)
        empty = b.op("Expand", b.scalar(NOT_CHOSEN, torch.float32), b.shape((tokens, experts)))
        logarithms = b.op("Log", b.op("Max", wide, b.scalar(SMALLEST, torch.float32)))
        scores = b.op("ScatterElements", empty, indices, logarithms, axis=1)
        total = b.op("ReduceSum", wide, b.ints(1), keepdims=1)
    inputs = (x, _as(b, scores, x.dtype), gate_up, None, down)
    limit = limit_of(*more)
    out = b.op(
        "MoE",
        *inputs,
        domain=DOMAIN,
        k=int(top_k),
        activation_type="swiglu",
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=1,
        swiglu_fusion=1,
        **({} if limit is None else {"swiglu_limit": limit}),
    )
    return b.op("Mul", out, _as(b, total, x.dtype))


def _as(b: Builder, name: str, dtype: torch.dtype) -> str:
    return name if dtype == torch.float32 else b.cast(name, dtype)


CONTRIB: dict[Any, Translation] = {dsv3.route.default: group_router, dsv3.routed_swiglu.default: moe}
