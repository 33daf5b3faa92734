"""The op vocabulary written in plain ATen that MLIR's dialects can express.

The references of the vocabulary read sizes from data and sort stably, which MLIR's dialects do not offer; the forms
here have static control flow and the same meaning. Axis letters follow docs/architecture.md.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode

import codegen.ops  # noqa: F401  registers the vocabulary
from codegen.ops import cache
from codegen.ops.norm import add_rms_norm, rms_norm, swiglu
from codegen.ops.rotary import rotary
from codegen.ops.routing import SCORES


def write_cache(
    kv: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """dsv3.write_cache, scattered along the axis of slots.

    Not by index_put: torch-mlir broadcasts its indices, and where they are of free length takes [B, S] for [B, 1].
    """
    rows = cache.cache_rows(kv, weight, cos, sin, eps, interleaved)
    first, second = (
        old.scatter(1, positions.unsqueeze(-1).expand(-1, -1, old.shape[2]), new.to(old.dtype))
        for old, new in zip((latent, rope_key), rows, strict=True)
    )
    return first, second


def mla_attention(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope_key: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """dsv3.mla_attention over the whole cache, masked."""
    batch, queries, heads, rank = q_latent.shape
    scores = torch.bmm((q_latent * scale).reshape(batch, queries * heads, rank), latent.transpose(1, 2))
    rotated = (q_rope * scale).reshape(batch, queries * heads, q_rope.shape[3])
    scores = scores + torch.bmm(rotated, rope_key.transpose(1, 2))
    scores = scores.reshape(batch, queries, heads, latent.shape[1]).float()
    shares = scores.masked_fill(_hidden(positions, latent.shape[1]).unsqueeze(2), -math.inf).softmax(-1)
    flat = shares.to(latent.dtype).reshape(batch, queries * heads, latent.shape[1])
    return torch.bmm(flat, latent).reshape(batch, queries, heads, rank)


def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float) -> Tensor:
    """dsv3.attention over the whole cache, masked."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.unsqueeze(3).expand(-1, -1, -1, repeats, -1).flatten(2, 3) for x in (k, v))
    scores = torch.matmul(q.permute(0, 2, 1, 3) * scale, k.permute(0, 2, 3, 1)).float()
    shares = scores.masked_fill(_hidden(positions, k.shape[1]).unsqueeze(1), -math.inf).softmax(-1)
    return torch.matmul(shares.to(v.dtype), v.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)


def _hidden(positions: Tensor, context: int) -> Tensor:
    return torch.arange(context) > positions.unsqueeze(-1)


def route(
    logits: Tensor,
    bias: Tensor | None,
    scoring: str,
    top_k: int,
    groups: int,
    top_groups: int,
    group_score: str,
    masked: float,
    normalise: bool,
    epsilon: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dsv3.route by repeated maxima."""
    wide = logits.float()
    scores = SCORES[scoring](wide)
    choice = scores if bias is None else scores + bias.float()
    if top_groups < groups:
        tokens, members = choice.shape[0], choice.shape[1] // groups
        grouped = choice.reshape(tokens, groups, members)
        score, _ = _largest(grouped, 1 if group_score == "max" else min(2, members))
        _, kept = _largest(score.sum(-1), top_groups)
        member = (kept.unsqueeze(-1) == torch.arange(groups)).any(1)
        choice = grouped.masked_fill(~member.unsqueeze(-1), masked).reshape(tokens, groups * members)
    _, indices = _largest(choice, top_k)
    weights = scores.gather(-1, indices)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + epsilon)
    return indices, weights * scale


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of the last axis in falling order, the lowest index first on ties."""
    numbers = torch.arange(values.shape[-1])
    taken = torch.zeros_like(values, dtype=torch.bool)
    found, indices = [], []
    for _ in range(count):
        best = values.masked_fill(taken, -math.inf).amax(-1, keepdim=True)
        # Where the rest is −inf as well, it is the lowest index that is not yet taken.
        candidates = (values >= best) & ~taken
        index = torch.where(candidates, numbers, values.shape[-1]).amin(-1, keepdim=True)
        taken = taken | (numbers == index)
        found.append(best)
        indices.append(index)
    return torch.cat(found, -1), torch.cat(indices, -1)


def routed_swiglu(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: None = None,
    always: int = 0,
    up: None = None,
    limit: float | None = None,
) -> Tensor:
    """dsv3.routed_swiglu by gathering the weights of every pair: N·K·3·D·I numbers."""
    assert residual is None and up is None  # GPUs' alone
    tokens, top_k = indices.shape
    chosen = indices.reshape(tokens * top_k)
    rows = x.unsqueeze(1).expand(-1, top_k, -1).reshape(tokens * top_k, x.shape[1], 1)
    inner = swiglu(torch.bmm(gate_up.index_select(0, chosen), rows).squeeze(-1), limit).unsqueeze(-1)
    out = torch.bmm(down.index_select(0, chosen), inner).reshape(tokens, top_k, down.shape[1])
    return (out.float() * weights.float().unsqueeze(-1)).sum(1).to(x.dtype)


PORTABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.dsv3.rms_norm.default: rms_norm,
    torch.ops.dsv3.add_rms_norm.default: add_rms_norm,
    torch.ops.dsv3.swiglu.default: swiglu,
    torch.ops.dsv3.rotary.default: rotary,
    torch.ops.dsv3.write_cache.default: write_cache,
    torch.ops.dsv3.mla_attention.default: mla_attention,
    torch.ops.dsv3.attention.default: attention,
    torch.ops.dsv3.route.default: route,
    torch.ops.dsv3.routed_swiglu.default: routed_swiglu,
}


class PortableBlock(fx.Interpreter):
    """Runs a block with the vocabulary in the forms above."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(PORTABLE.get(target, target), args, kwargs)


def applied(node: fx.Node) -> set[str]:
    """ATen operators that a node's portable form calls, such as "aten.bmm"; run on the node's fake values.

    The graph's sizes stay free: without the Python dispatcher some fake kernels would fix them at their examples.
    """
    found = {str(getattr(node.target, "overloadpacket", node.target))}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.add(str(function.overloadpacket))
            return function(*args, **(kwargs or {}))

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: one.meta["val"])
    mode = detect_fake_mode((args, kwargs)) or contextlib.nullcontext()  # what is made on the way is fake as well
    with mode, torch.no_grad(), enable_python_dispatcher(), Record():
        PORTABLE.get(node.target, node.target)(*args, **kwargs)
    return found
