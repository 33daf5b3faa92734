"""Prefill attention on Hopper: cuDNN's kernel for a fresh prompt, which is faster than a plain one, else the plain one.

Where as many queries as keys come in, every key was written by one of the queries: the prompt is fresh, and the mask is
the causal one as long as the positions are 0, 1, 2, … That is a fact of the device, so it is not asked for: blocks of
queries at other positions are computed again afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.kernels.attention import BLOCK_S, BLOCK_T, NUM_STAGES, NUM_WARPS, attention_kernel
from codegen.kernels.layout import packed

# What cuDNN's kernel was seen to serve.
WIDEST_KEY = 192
WIDEST_VALUE = 128


@triton.jit
def attention_elsewhere_kernel(
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
    FRESH: tl.constexpr,
):
    """The plain kernel; of a fresh prompt only for blocks whose queries are not at positions 0, 1, 2, …"""
    row = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    place = tl.program_id(2).to(tl.int64) * queries + row
    elsewhere = tl.load(positions + place, mask=row < queries, other=0) != tl.where(row < queries, row, 0)
    if not FRESH or tl.max(elsewhere.to(tl.int32)) > 0:
        attention_kernel(
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
            SCALE,
            H,
            G,
            A,
            V,
            MAIN,
            REST,
            BLOCK_S,
            BLOCK_T,
            BLOCK_V,
        )


def serves(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float) -> str | None:
    """Why this form does not serve a call, or None."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return "neither bfloat16 nor float16"
    if q.shape[2] != k.shape[2]:
        return "heads share keys"
    if q.shape[3] % 64 or q.shape[3] > WIDEST_KEY or v.shape[3] % 64 or v.shape[3] > WIDEST_VALUE:
        return f"widths are not multiples of 64 up to {WIDEST_KEY} and {WIDEST_VALUE}"
    return None


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
    """cuDNN's causal attention of [B, S, H, ·], or None where torch has no cuDNN that does it."""
    try:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *heads_first, None, False, is_causal=True, scale=scale
        )[0]
    except RuntimeError:
        return None
    return out.transpose(1, 2).contiguous()


def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float) -> Tensor:
    """q [B, S, H, A], k [B, T, H, A], v [B, T, H, V], positions [B, S] int64 → [B, S, H, V]."""
    q, k, v = packed(q), packed(k), packed(v)
    batch, queries, heads, width = q.shape
    value_width = v.shape[3]
    out = causal(q, k, v, scale) if 1 < queries == k.shape[1] else None
    fresh = out is not None
    if out is None:
        out = torch.empty((batch, queries, heads, value_width), dtype=q.dtype, device=q.device)
    main = 1 << (width.bit_length() - 1)
    attention_elsewhere_kernel[(triton.cdiv(queries, BLOCK_S), heads, batch)](
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
        G=heads,
        A=width,
        V=value_width,
        MAIN=main,
        REST=width - main,
        BLOCK_S=BLOCK_S,
        BLOCK_T=BLOCK_T,
        BLOCK_V=triton.next_power_of_2(value_width),
        FRESH=fresh,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return out
