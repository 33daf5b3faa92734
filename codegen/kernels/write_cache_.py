"""One new cache row per token: RMSNorm of the latent, rotation of the rope key, stored at its position."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from codegen.kernels.layout import check_written, next_power_of_2, packed


@triton.jit
def write_cache_kernel(
    kv,
    weight,
    cos,
    sin,
    positions,
    latent,
    rope_key,
    queries,
    kv_batch_stride,
    kv_query_stride,
    latent_batch_stride,
    latent_row_stride,
    rope_batch_stride,
    rope_row_stride,
    EPS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch = token // queries
    position = tl.load(positions + token)
    source = kv + batch * kv_batch_stride + token % queries * kv_query_stride

    column = tl.arange(0, BLOCK_C)
    inside = column < C
    value = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value) / C + EPS)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded to the activations' dtype first, as the rest of the graph rounds, should the cache be wider.
    normed = (value * inverse * scale).to(kv.dtype.element_ty)
    row = latent + batch * latent_batch_stride + position * latent_row_stride
    tl.store(row + column, normed.to(latent.dtype.element_ty), mask=inside)

    pair = tl.arange(0, BLOCK_F)
    inside = pair < F
    c = tl.load(cos + token * F + pair, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + token * F + pair, mask=inside, other=0.0).to(tl.float32)
    if INTERLEAVED:
        left, right = 2 * pair, 2 * pair + 1
    else:
        left, right = pair, pair + F
    first = tl.load(source + C + left, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + C + right, mask=inside, other=0.0).to(tl.float32)
    row = rope_key + batch * rope_batch_stride + position * rope_row_stride
    turned = (first * c - second * s).to(kv.dtype.element_ty)
    tl.store(row + left, turned.to(rope_key.dtype.element_ty), mask=inside)
    turned = (first * s + second * c).to(kv.dtype.element_ty)
    tl.store(row + right, turned.to(rope_key.dtype.element_ty), mask=inside)


def write_cache_(
    kv: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    eps: float,
    interleaved: bool,
) -> None:
    """kv [B, S, C+R], weight [C], cos and sin [B, S, F], positions [B, S]; writes latent [B, T, C], rope_key [B, T, R].

    The last axis of both caches must be contiguous (ValueError otherwise).
    """
    check_written("write_cache_", latent, rope_key)
    kv = packed(kv)
    batch, queries, rank = kv.shape[0], kv.shape[1], weight.shape[0]
    half = rope_key.shape[2] // 2
    write_cache_kernel[(batch * queries,)](
        kv,
        packed(weight),
        cos.contiguous(),
        sin.contiguous(),
        positions.contiguous(),
        latent,
        rope_key,
        queries,
        kv.stride(0),
        kv.stride(1),
        latent.stride(0),
        latent.stride(1),
        rope_key.stride(0),
        rope_key.stride(1),
        EPS=eps,
        INTERLEAVED=interleaved,
        C=rank,
        F=half,
        BLOCK_C=next_power_of_2(rank),
        BLOCK_F=next_power_of_2(half),
        num_warps=2,
    )
