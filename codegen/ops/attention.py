"""Causal attention by positions: over the latent cache (absorbed form) and over full keys and values.

Their FLOPs are those of every query with every cached position handed in, hidden ones too, as torch counts its own
attention; what a kernel skips depends on positions, which no shape tells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codegen.ops.registry import compute_dtype, opaque


def _latent_output(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope_key: Tensor, positions: Tensor, scale: float
) -> Tensor:
    return q_latent.new_empty(q_latent.shape)


def _latent_flops(q_latent: Sequence[Any], q_rope: Sequence[Any], latent: Sequence[Any], *rest: Any, **_: Any) -> Any:
    (b, s, h, c), r, t = q_latent, q_rope[-1], latent[1]
    return 2 * b * s * h * t * (2 * c + r)


@opaque(
    "mla_attention(Tensor q_latent, Tensor q_rope, Tensor latent, Tensor rope_key, Tensor positions, "
    "float scale) -> Tensor",
    fake=_latent_output,
    flops=_latent_flops,
)
def mla_attention(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope_key: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """q_latent [B, S, H, C], q_rope [B, S, H, R], latent [B, T, C], rope_key [B, T, R], positions [B, S].

    softmax over t ≤ positions[b, s] of scale · (q_latent · latent[b, t] + q_rope · rope_key[b, t]), times
    latent → [B, S, H, C]. One latent row is key and value of every head. positions are int64; cache rows
    behind the last one are not read. A row at a negative position is padding: it sees nothing, and is zero or, on
    Hopper, some other finite number.
    """
    heads, wide = q_latent.shape[2], compute_dtype(q_latent)
    length = int(positions.max()) + 1 if positions.numel() else 0
    latent, rope_key = latent[:, :length].to(wide), rope_key[:, :length].to(wide)
    scores = torch.bmm((q_latent.to(wide) * scale).flatten(1, 2), latent.mT)
    scores = torch.baddbmm(scores, (q_rope.to(wide) * scale).flatten(1, 2), rope_key.mT)
    hidden = torch.arange(length, device=positions.device) > positions.unsqueeze(-1)
    scores.unflatten(1, (-1, heads)).masked_fill_(hidden.unsqueeze(2), -math.inf)
    return torch.bmm(torch._safe_softmax(scores, -1), latent).view(q_latent.shape).to(q_latent.dtype)


def _value_output(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _value_flops(
    q: Sequence[Any],
    k: Sequence[Any],
    v: Sequence[Any],
    positions: Any,
    scale: float,
    q_rope: Sequence[Any] | None = None,
    *rest: Any,
    **_: Any,
) -> Any:
    (b, s, h, a), t = q, k[1]
    return 2 * b * s * h * t * (a + (q_rope[-1] if q_rope else 0) + v[-1])


@opaque(
    "attention(Tensor q, Tensor k, Tensor v, Tensor positions, float scale, Tensor? q_rope=None, "
    "Tensor? k_rope=None) -> Tensor",
    fake=_value_output,
    flops=_value_flops,
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    scale: float,
    q_rope: Tensor | None = None,
    k_rope: Tensor | None = None,
) -> Tensor:
    """q [B, S, H, A], k [B, T, G, A], v [B, T, G, V], positions [B, S] int64 → [B, S, H, V].

    softmax over t ≤ positions[b, s] of scale · q · k, times v; query head h reads group h // (H/G).
    Rows of k and v behind the last position are not read; padding is as in mla_attention. A second part of every head,
    q_rope [B, S, H, R] and k_rope [B, T, G, R] or, shared by all heads, [B, T, 1, R], adds its product to the first
    one's.
    """
    if q_rope is not None and k_rope is not None:
        q, k = torch.cat([q, q_rope], -1), torch.cat([k, k_rope.expand(-1, -1, k.shape[2], -1)], -1)
    length, value_width = int(positions.max()) + 1 if positions.numel() else 0, v.shape[3]
    k, v = k[:, :length], v[:, :length]
    # torch's fused kernels want one head width for keys and values; zero columns change no score and no sum.
    width = max(q.shape[3], value_width)
    q, k, v = (F.pad(x, (0, width - x.shape[3])).transpose(1, 2) for x in (q, k, v))
    visible = torch.arange(length, device=positions.device) <= positions.unsqueeze(-1)
    plain = q.shape[2] == length and bool((positions == torch.arange(length, device=positions.device)).all())
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if plain else visible.unsqueeze(1),
        is_causal=plain,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[..., :value_width].transpose(1, 2).contiguous()
