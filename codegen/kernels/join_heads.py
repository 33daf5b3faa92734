"""Two parts of every head side by side, the second rotated on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.kernels.layout import packed
from codegen.kernels.rotary import turn_rows

COLUMNS = 4096  # of the wider part, over all heads of a program
NUM_WARPS = 4


@triton.jit
def join_heads_kernel(
    first,
    second,
    cos,
    sin,
    out,
    queries,
    first_batch_stride,
    first_query_stride,
    first_head_stride,
    second_batch_stride,
    second_query_stride,
    second_head_stride,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch, query = token // queries, token % queries
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    column = tl.arange(0, BLOCK_P)[None, :]
    inside = (head < H) & (column < P)
    source = first + batch * first_batch_stride + query * first_query_stride + head * first_head_stride
    target = out + (token * H + head) * (P + R)
    kept = tl.load(source + column, mask=inside)
    source = second + batch * second_batch_stride + query * second_query_stride + head * second_head_stride
    if ROTATED:
        angles = token * (R // 2)
        turn_rows(source, target + P, cos + angles, sin + angles, head < H, INTERLEAVED, R // 2, BLOCK_H, BLOCK_R // 2)
    else:
        rest = tl.arange(0, BLOCK_R)[None, :]
        wanted = (head < H) & (rest < R)
        tl.store(target + P + rest, tl.load(source + rest, mask=wanted), mask=wanted)
    tl.store(target + column, kept, mask=inside)


def join_heads(
    first: Tensor,
    second: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """first [B, S, H, P], second [B, S, H, R], cos and sin [B, S, F] → [B, S, H, P+R]; strides are free but for the
    last, so that parts of a projection and heads that share a row are read where they are."""
    batch, queries, heads, nope = first.shape
    rope = second.shape[3]
    first, second = packed(first), packed(second)
    out = torch.empty((batch, queries, heads, nope + rope), dtype=first.dtype, device=first.device)
    block_p, block_r = triton.next_power_of_2(nope), triton.next_power_of_2(rope)
    block_h = min(triton.next_power_of_2(heads), max(1, COLUMNS // max(block_p, block_r)))
    join_heads_kernel[(batch * queries, triton.cdiv(heads, block_h))](
        first,
        second,
        None if cos is None else cos.contiguous(),
        None if sin is None else sin.contiguous(),
        out,
        queries,
        first.stride(0),
        first.stride(1),
        first.stride(2),
        second.stride(0),
        second.stride(1),
        second.stride(2),
        ROTATED=cos is not None,
        INTERLEAVED=interleaved,
        H=heads,
        P=nope,
        R=rope,
        BLOCK_H=block_h,
        BLOCK_P=block_p,
        BLOCK_R=block_r,
        num_warps=NUM_WARPS,
    )
    return out
