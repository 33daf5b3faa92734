"""What a decode step does between projections and attention, in one launch: absorb, rotate, write the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.layout import as_rows, cdiv, check_written, next_power_of_2, packed

BLOCK_N = 16
NUM_WARPS = 4


@triton.jit
def _rotated(first, second, c, s, dtype: tl.constexpr):
    return (first * c - second * s).to(dtype), (first * s + second * c).to(dtype)


@triton.jit
def attention_inputs_kernel(
    q,
    kv,
    weight,
    norm_weight,
    cos,
    sin,
    positions,
    q_latent,
    q_rope,
    latent,
    rope_key,
    tokens,
    queries,
    q_stride,
    kv_stride,
    weight_head_stride,
    weight_in_stride,
    latent_batch_stride,
    latent_row_stride,
    rope_batch_stride,
    rope_row_stride,
    EPS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_F: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    """Programs of a head: one per block of latent columns, one that rotates. Behind the heads, all write the cache."""
    head = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1) - 1
    token = (tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside = token < tokens
    pair = tl.arange(0, BLOCK_F)
    left = 2 * pair if INTERLEAVED else pair
    right = 2 * pair + 1 if INTERLEAVED else pair + F
    turning = inside[:, None] & (pair < F)[None, :]
    dtype: tl.constexpr = q.dtype.element_ty
    if head < H and part < parts:
        column = part * BLOCK_C + tl.arange(0, BLOCK_C)
        row = tl.arange(0, BLOCK_P)
        wanted = (row < P)[:, None] & (column < C)[None, :]
        place = weight + head.to(tl.int64) * weight_head_stride + row[:, None] * weight_in_stride + column[None, :]
        up = tl.load(place, mask=wanted, other=0.0)
        if OVERLAPPED:
            gdc_launch_dependents()
            gdc_wait()
        nope = q + token[:, None] * q_stride + head * (P + 2 * F) + row[None, :]
        query = tl.load(nope, mask=inside[:, None] & (row < P)[None, :], other=0.0)
        absorbed = tl.dot(query, up, input_precision="ieee").to(dtype)
        tl.store(
            q_latent + (token[:, None] * H + head) * C + column[None, :],
            absorbed,
            mask=inside[:, None] & (column < C)[None, :],
        )
    elif head < H:
        if OVERLAPPED:
            gdc_launch_dependents()
            gdc_wait()
        c = tl.load(cos + token[:, None] * F + pair[None, :], mask=turning, other=0.0).to(tl.float32)
        s = tl.load(sin + token[:, None] * F + pair[None, :], mask=turning, other=0.0).to(tl.float32)
        source = q + token[:, None] * q_stride + head * (P + 2 * F) + P
        first = tl.load(source + left[None, :], mask=turning, other=0.0).to(tl.float32)
        second = tl.load(source + right[None, :], mask=turning, other=0.0).to(tl.float32)
        first, second = _rotated(first, second, c, s, dtype)
        place = q_rope + (token[:, None] * H + head) * (2 * F)
        tl.store(place + left[None, :], first, mask=turning)
        tl.store(place + right[None, :], second, mask=turning)
    else:
        if OVERLAPPED:
            gdc_launch_dependents()
            gdc_wait()
        column = tl.arange(0, BLOCK_RANK)
        scale = tl.load(norm_weight + column, mask=column < C, other=0.0).to(tl.float32)
        # Each program one row after the other: rows of a block may belong to any requests.
        end = tl.minimum(tl.program_id(2) * BLOCK_N + BLOCK_N, tokens)
        for one in range(tl.program_id(2) * BLOCK_N + part, end, tl.num_programs(1)):
            batch = (one // queries).to(tl.int64)
            position = tl.load(positions + one)
            source = kv + one * kv_stride
            value = tl.load(source + column, mask=column < C, other=0.0).to(tl.float32)
            inverse = tl.rsqrt(tl.sum(value * value) / C + EPS)
            row_ptr = latent + batch * latent_batch_stride + position * latent_row_stride
            normed = (value * inverse * scale).to(dtype).to(latent.dtype.element_ty)
            tl.store(row_ptr + column, normed, mask=column < C)
            c = tl.load(cos + one * F + pair, mask=pair < F, other=0.0).to(tl.float32)
            s = tl.load(sin + one * F + pair, mask=pair < F, other=0.0).to(tl.float32)
            first = tl.load(source + C + left, mask=pair < F, other=0.0).to(tl.float32)
            second = tl.load(source + C + right, mask=pair < F, other=0.0).to(tl.float32)
            first, second = _rotated(first, second, c, s, dtype)
            row_ptr = rope_key + batch * rope_batch_stride + position * rope_row_stride
            tl.store(row_ptr + left, first.to(rope_key.dtype.element_ty), mask=pair < F)
            tl.store(row_ptr + right, second.to(rope_key.dtype.element_ty), mask=pair < F)


def attention_inputs_(
    q: Tensor,
    kv: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Kernel of the op `attention_inputs_`: q [B, S, H·(P+R)], kv [B, S, C+R], weight [H, P, C], norm_weight [C],
    cos and sin [B, S, F], positions [B, S]; writes latent [B, T, C] and rope_key [B, T, R] at the positions.

    Returns q_latent [B, S, H, C] = q_nope · weight, and q_rope [B, S, H, R], rotated. q and kv may be column ranges of
    one tensor. The last axis of both caches must be contiguous (ValueError otherwise).
    """
    check_written("attention_inputs_", latent, rope_key)
    batch, queries = positions.shape
    heads, nope, rank = weight.shape
    half, tokens = cos.shape[-1], batch * queries
    q, kv, weight, positions = as_rows(q), as_rows(kv), packed(weight), positions.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    q_latent = torch.empty((batch, queries, heads, rank), dtype=q.dtype, device=q.device)
    q_rope = torch.empty((batch, queries, heads, 2 * half), dtype=q.dtype, device=q.device)
    block_c = 64 if heads * rank <= 64 * 256 else 128
    attention_inputs_kernel[(heads + 1, cdiv(rank, block_c) + 1, cdiv(tokens, BLOCK_N))](
        q,
        kv,
        weight,
        packed(norm_weight),
        cos,
        sin,
        positions,
        q_latent,
        q_rope,
        latent,
        rope_key,
        tokens,
        queries,
        q.stride(0),
        kv.stride(0),
        weight.stride(0),
        weight.stride(1),
        latent.stride(0),
        latent.stride(1),
        rope_key.stride(0),
        rope_key.stride(1),
        EPS=eps,
        INTERLEAVED=interleaved,
        H=heads,
        P=nope,
        C=rank,
        F=half,
        BLOCK_N=BLOCK_N,
        BLOCK_P=max(16, next_power_of_2(nope)),
        BLOCK_C=block_c,
        BLOCK_RANK=next_power_of_2(rank),
        BLOCK_F=next_power_of_2(half),
        OVERLAPPED=q.is_cuda,
        num_warps=NUM_WARPS,
        launch_pdl=q.is_cuda,
    )
    return q_latent, q_rope
