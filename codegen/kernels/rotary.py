"""Rotary embedding of all heads of a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.kernels.layout import packed


@triton.jit
def rotary_kernel(
    x,
    cos,
    sin,
    out,
    queries,
    x_batch_stride,
    x_query_stride,
    x_head_stride,
    INTERLEAVED: tl.constexpr,
    H: tl.constexpr,
    F: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)[:, None]
    pair = tl.arange(0, BLOCK_F)[None, :]
    inside = (head < H) & (pair < F)
    c = tl.load(cos + token * F + pair, mask=pair < F, other=0.0).to(tl.float32)
    s = tl.load(sin + token * F + pair, mask=pair < F, other=0.0).to(tl.float32)
    if INTERLEAVED:
        left, right = 2 * pair, 2 * pair + 1
    else:
        left, right = pair, pair + F
    source = x + token // queries * x_batch_stride + token % queries * x_query_stride + head * x_head_stride
    first = tl.load(source + left, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + right, mask=inside, other=0.0).to(tl.float32)
    row = out + (token * H + head) * (2 * F)
    tl.store(row + left, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(row + right, (first * s + second * c).to(out.dtype.element_ty), mask=inside)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, S, H, R], cos and sin [B, S, F] → [B, S, H, R]."""
    batch, queries, heads, width = x.shape
    x = packed(x)
    out = torch.empty((batch, queries, heads, width), dtype=x.dtype, device=x.device)
    rotary_kernel[(batch * queries,)](
        x,
        cos.contiguous(),
        sin.contiguous(),
        out,
        queries,
        x.stride(0),
        x.stride(1),
        x.stride(2),
        INTERLEAVED=interleaved,
        H=heads,
        F=width // 2,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_F=triton.next_power_of_2(width // 2),
        num_warps=4,
    )
    return out
