"""Prefill attention: online softmax over full keys and values, causal by positions, grouped heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.kernels.layout import packed

BLOCK_S = 64
BLOCK_T = 64
NUM_WARPS = 4
NUM_STAGES = 2


@triton.jit
def attention_kernel(
    q,
    k,
    v,
    positions,
    out,
    queries,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_g,
    v_stride_b,
    v_stride_t,
    v_stride_g,
    SCALE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    A: tl.constexpr,
    V: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
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
    # A width such as 192 is 128 + 64: tiles are powers of two, and one of 256 would be a quarter padding.
    a = tl.arange(0, MAIN)
    q_row = q + batch * q_stride_b + head * q_stride_h + row.to(tl.int64)[:, None] * q_stride_s
    q_main = tl.load(q_row + a[None, :], mask=inside[:, None] & (a < A)[None, :], other=0.0)
    if REST:
        b = MAIN + tl.arange(0, REST)
        q_rest = tl.load(q_row + b[None, :], mask=inside[:, None] & (b < A)[None, :], other=0.0)
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
        score = tl.dot(q_main, tl.trans(key), input_precision="ieee")
        if REST:
            key = tl.load(k + place * k_stride_t + b[None, :], mask=there & (b < A)[None, :], other=0.0)
            score = tl.dot(q_rest, tl.trans(key), score, input_precision="ieee")
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
    result = (mixed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + o_row + c[None, :], result, mask=inside[:, None] & (c < V)[None, :])


def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float) -> Tensor:
    """q [B, S, H, A], k [B, T, G, A], v [B, T, G, V], positions [B, S] → [B, S, H, V]."""
    q, k, v = packed(q), packed(k), packed(v)
    batch, queries, heads, width = q.shape
    groups, value_width = v.shape[2:]
    main = max(16, 1 << (width.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(width - main)) if width > main else 0
    out = torch.empty((batch, queries, heads, value_width), dtype=q.dtype, device=q.device)
    attention_kernel[(triton.cdiv(queries, BLOCK_S), heads, batch)](
        q,
        k,
        v,
        positions.contiguous(),
        out,
        queries,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        SCALE=scale,
        H=heads,
        G=groups,
        A=width,
        V=value_width,
        MAIN=main,
        REST=rest,
        BLOCK_S=BLOCK_S,
        BLOCK_T=BLOCK_T,
        BLOCK_V=max(16, triton.next_power_of_2(value_width)),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return out
