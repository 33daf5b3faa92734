"""Rotary embedding of all heads of a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.kernels.layout import next_power_of_2, packed


@triton.jit
def turn_rows(
    source,
    target,
    cos,
    sin,
    wanted,
    INTERLEAVED: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Rotate the 2F columns at each `source` by the F angles at `cos` and `sin` into `target`; both [ROWS, 1]."""
    dtype: tl.constexpr = target.dtype.element_ty
    pair = tl.arange(0, BLOCK_F)[None, :]
    c = tl.load(cos + pair, mask=pair < F, other=0.0).to(tl.float32)
    s = tl.load(sin + pair, mask=pair < F, other=0.0).to(tl.float32)
    if INTERLEAVED:
        # Pairs are parted in registers: a load of every other column would move one number at a time.
        column = tl.arange(0, 2 * BLOCK_F)[None, :]
        inside = wanted & (column < 2 * F)
        both = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (ROWS, BLOCK_F, 2)))
        turned = tl.join(first * c - second * s, first * s + second * c)
        tl.store(target + column, tl.reshape(turned, (ROWS, 2 * BLOCK_F)).to(dtype), mask=inside)
    else:
        inside = wanted & (pair < F)
        first = tl.load(source + pair, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + F + pair, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + pair, (first * c - second * s).to(dtype), mask=inside)
        tl.store(target + F + pair, (first * s + second * c).to(dtype), mask=inside)


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
    source = x + token // queries * x_batch_stride + token % queries * x_query_stride + head * x_head_stride
    target = out + (token * H + head) * (2 * F)
    turn_rows(source, target, cos + token * F, sin + token * F, head < H, INTERLEAVED, F, BLOCK_H, BLOCK_F)


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
        BLOCK_H=next_power_of_2(heads),
        BLOCK_F=next_power_of_2(width // 2),
        num_warps=4,
    )
    return out
