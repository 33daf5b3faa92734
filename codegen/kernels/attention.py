"""Prefill attention: online softmax over full keys and values, causal by positions, grouped heads.

Queries and keys come in one or two parts. A single one is read as two if its width is no power of two, such as
192 = 128 + 64: tiles are powers of two, and one of 256 would be a quarter padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.kernels.layout import cdiv, next_power_of_2, packed

BLOCK_S = 64
BLOCK_T = 64
NUM_WARPS = 4
NUM_STAGES = 2


@triton.jit
def attention_kernel(
    q,
    q_rope,
    k,
    k_rope,
    v,
    positions,
    out,
    queries,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    q_rope_stride_b,
    q_rope_stride_s,
    q_rope_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_g,
    k_rope_stride_b,
    k_rope_stride_t,
    k_rope_stride_g,
    v_stride_b,
    v_stride_t,
    v_stride_g,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    A: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    LOG2_E: tl.constexpr = 1.4426950408889634
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    group = head // (H // G)
    row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = row < queries
    position = tl.load(positions + batch * queries + row, mask=inside, other=-1).to(tl.int32)
    a = tl.arange(0, BLOCK_A)
    seen = row.to(tl.int64)[:, None]
    q += batch * q_stride_b + head * q_stride_h
    q_tile = tl.load(q + seen * q_stride_s + a[None, :], mask=inside[:, None] & (a < A)[None, :], other=0.0)
    if BLOCK_R:
        r = tl.arange(0, BLOCK_R)
        q_rope += batch * q_rope_stride_b + head * q_rope_stride_h
        wanted = inside[:, None] & (r < R)[None, :]
        q_rope_tile = tl.load(q_rope + seen * q_rope_stride_s + r[None, :], mask=wanted, other=0.0)
        k_rope += batch * k_rope_stride_b + group * k_rope_stride_g
    c = tl.arange(0, BLOCK_V)
    k += batch * k_stride_b + group * k_stride_g
    v += batch * v_stride_b + group * v_stride_g

    end = tl.max(position) + 1
    maximum = tl.full((BLOCK_S,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_S,), tl.float32)
    mixed = tl.zeros((BLOCK_S, BLOCK_V), tl.float32)
    for start in range(0, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        there = (t < end)[:, None]
        place = t.to(tl.int64)[:, None]
        key = tl.load(k + place * k_stride_t + a[None, :], mask=there & (a < A)[None, :], other=0.0)
        score = tl.dot(q_tile, tl.trans(key), input_precision="ieee")
        if BLOCK_R:
            key = tl.load(k_rope + place * k_rope_stride_t + r[None, :], mask=there & (r < R)[None, :], other=0.0)
            score = tl.dot(q_rope_tile, tl.trans(key), score, input_precision="ieee")
        score = tl.where(t[None, :] <= position[:, None], score * (SCALE * LOG2_E), -float("inf"))
        higher = tl.maximum(maximum, tl.max(score, 1))
        # Rows of padding see nothing: their maximum stays -inf, and -inf - -inf must not become NaN.
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(score - safe[:, None])
        fade = tl.exp2(maximum - safe)
        value = tl.load(v + place * v_stride_t + c[None, :], mask=there & (c < V)[None, :], other=0.0)
        mixed = tl.dot(p.to(value.dtype), value, mixed * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(p, 1)
        maximum = higher

    o_row = ((batch * queries + row) * H + head)[:, None] * V
    result = (mixed / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty)
    tl.store(out + o_row + c[None, :], result, mask=inside[:, None] & (c < V)[None, :])


def in_parts(
    q: Tensor, k: Tensor, q_rope: Tensor | None = None, k_rope: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(q, k, q_rope, k_rope), where a single part whose width is no power of two is cut in two."""
    width = q.shape[3]
    main = 1 << (width.bit_length() - 1)
    if q_rope is not None or main == width:
        return q, k, q_rope, k_rope
    (q, q_rope), (k, k_rope) = (x.split([main, width - main], -1) for x in (q, k))
    return q, k, q_rope, k_rope


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    scale: float,
    q_rope: Tensor | None = None,
    k_rope: Tensor | None = None,
) -> Tensor:
    """q [B, S, H, A], k [B, T, G, A], v [B, T, G, V], positions [B, S] → [B, S, H, V]; optionally more columns
    q_rope [B, S, H, R] and k_rope [B, T, G or 1, R]."""
    q, k, q_rope, k_rope = in_parts(packed(q), packed(k), q_rope, k_rope)
    v = packed(v)
    batch, queries, heads, width = q.shape
    groups, value_width = v.shape[2:]
    rope = 0 if q_rope is None else q_rope.shape[3]
    # Without a second part these are not read.
    q_rope = q if q_rope is None else packed(q_rope)
    k_rope = k if k_rope is None else packed(k_rope)
    out = torch.empty((batch, queries, heads, value_width), dtype=q.dtype, device=q.device)
    attention_kernel[(cdiv(queries, BLOCK_S), heads, batch)](
        q,
        q_rope,
        k,
        k_rope,
        v,
        positions.contiguous(),
        out,
        queries,
        *q.stride()[:3],
        *q_rope.stride()[:3],
        *k.stride()[:3],
        *k_rope.stride()[:2],
        0 if k_rope.shape[2] == 1 else k_rope.stride(2),
        *v.stride()[:3],
        SCALE=scale,
        H=heads,
        G=groups,
        A=width,
        R=rope,
        V=value_width,
        BLOCK_A=max(16, next_power_of_2(width)),
        BLOCK_R=max(16, next_power_of_2(rope)) if rope else 0,
        BLOCK_S=BLOCK_S,
        BLOCK_T=BLOCK_T,
        BLOCK_V=max(16, next_power_of_2(value_width)),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return out
