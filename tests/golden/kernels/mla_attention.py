"""mla_attention for sm_80, cut from codegen/kernels/mla_attention.py.

Inputs: bfloat16, bfloat16, bfloat16, bfloat16, int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def expect(**constants: tuple[object, object]) -> None:
    """These kernels serve the constants that they were cut for: given value, value cut for."""
    for name, (given, cut_for) in constants.items():
        if given != cut_for:
            raise ValueError(f"{name} is {given!r}; this kernel was written for {cut_for!r}")


def packed(x: Tensor) -> Tensor:
    """x itself if neighbours on its last axis are neighbours in memory, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def cdiv(size: int, part: int) -> int:
    """How many parts a size is cut into. triton's own, for kernels as well, takes the host longer."""
    return -(-size // part)


BLOCK_M_FEW = 16  # rows (query position, head) per tile, where there are no more
BLOCK_M_MANY = 32
BLOCK_T = 32
MERGE_C = 128
MERGE_SPLITS = 16
MIN_SPLIT = 256  # cached positions that are worth a program of their own
PROGRAMS = 216  # that keep the device busy
NUM_WARPS = 8
NUM_STAGES = 2


@triton.jit
def split_length(length, splits, MIN_SPLIT: tl.constexpr):
    """Cached positions per split: as even as multiples of MIN_SPLIT allow."""
    return tl.cdiv(tl.cdiv(length, splits), MIN_SPLIT) * MIN_SPLIT


@triton.jit
def mla_attention_kernel(
    q_latent,
    q_rope,
    latent,
    rope_key,
    positions,
    out,
    maxima,
    sums,
    queries,
    splits,
    q_latent_stride_b,
    q_latent_stride_s,
    q_latent_stride_h,
    q_rope_stride_b,
    q_rope_stride_s,
    q_rope_stride_h,
    latent_stride_b,
    latent_stride_t,
    rope_stride_b,
    rope_stride_t,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    SCALE: tl.constexpr = 0.2
    H: tl.constexpr = 3
    C: tl.constexpr = 40
    R: tl.constexpr = 12
    BLOCK_C: tl.constexpr = 64
    BLOCK_R: tl.constexpr = 16
    LOG2_E: tl.constexpr = 1.4426950408889634
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = row // H, row % H
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    rows = queries * H
    inside = row < rows
    position = tl.load(positions + batch * queries + query, mask=inside, other=-1).to(tl.int32)

    q_c = tl.load(
        q_latent
        + batch * q_latent_stride_b
        + (query * q_latent_stride_s + head * q_latent_stride_h)[:, None]
        + c[None, :],
        mask=inside[:, None] & (c < C)[None, :],
        other=0.0,
    )
    q_r = tl.load(
        q_rope + batch * q_rope_stride_b + (query * q_rope_stride_s + head * q_rope_stride_h)[:, None] + r[None, :],
        mask=inside[:, None] & (r < R)[None, :],
        other=0.0,
    )

    begin = 0
    end = tl.max(position) + 1
    if SPLIT:
        share = split_length(end, splits, MIN_SPLIT)
        begin = tl.program_id(1) * share
        end = tl.minimum(end, begin + share)
    maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    latent += batch * latent_stride_b
    rope_key += batch * rope_stride_b
    for start in range(begin, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        cached = (t < end)[:, None]
        place = t.to(tl.int64)[:, None]
        k_c = tl.load(latent + place * latent_stride_t + c[None, :], mask=cached & (c < C)[None, :], other=0.0)
        k_r = tl.load(rope_key + place * rope_stride_t + r[None, :], mask=cached & (r < R)[None, :], other=0.0)
        score = tl.dot(q_c, tl.trans(k_c), input_precision="ieee")
        score = tl.dot(q_r, tl.trans(k_r), score, input_precision="ieee") * (SCALE * LOG2_E)
        visible = (t[None, :] <= position[:, None]) & (t < end)[None, :]
        score = tl.where(visible, score, -float("inf"))
        higher = tl.maximum(maximum, tl.max(score, 1))
        # A row may see nothing of this split; its maximum stays -inf, and -inf - -inf must not become NaN.
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(score - safe[:, None])
        fade = tl.exp2(maximum - safe)
        total = total * fade + tl.sum(p, 1)
        mixed = tl.dot(p.to(k_c.dtype), k_c, mixed * fade[:, None], input_precision="ieee")
        maximum = higher

    written = inside[:, None] & (c < C)[None, :]
    if SPLIT:
        part = (batch * splits + tl.program_id(1)) * rows + row
        tl.store(maxima + part, maximum, mask=inside)
        tl.store(sums + part, total, mask=inside)
        seen = (maximum > -float("inf"))[:, None]
        tl.store(out + part[:, None] * C + c[None, :], mixed, mask=written & seen)
    else:
        place = (batch * rows + row)[:, None] * C + c[None, :]
        sure = tl.where(total > 0, total, 1.0)  # zero where a row of padding saw nothing
        tl.store(out + place, (mixed / sure[:, None]).to(out.dtype.element_ty), mask=written)


@triton.jit
def merge_splits_kernel(
    parts,
    maxima,
    sums,
    out,
    rows,
    splits,
    MERGE_C: tl.constexpr,
    MERGE_SPLITS: tl.constexpr,
):
    C: tl.constexpr = 40
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0)
    c = tl.program_id(1) * MERGE_C + tl.arange(0, MERGE_C)
    maximum = tl.full((1,), -float("inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    mixed = tl.zeros((MERGE_C,), tl.float32)
    for first in range(0, splits, MERGE_SPLITS):
        split = first + tl.arange(0, MERGE_SPLITS)
        part = (batch * splits + split) * rows + row
        own = tl.load(maxima + part, mask=split < splits, other=-float("inf"))
        # A split that this row sees nothing of has written no values; what lies there must not be read.
        used = own > -float("inf")
        higher = tl.maximum(maximum, tl.max(own, 0))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        fade = tl.exp2(maximum - safe)
        weight = tl.exp2(own - safe)
        values = tl.load(parts + part[:, None] * C + c[None, :], mask=used[:, None] & (c < C)[None, :], other=0.0)
        total = total * fade + tl.sum(tl.load(sums + part, mask=used, other=0.0) * weight, 0)
        mixed = mixed * fade + tl.sum(values * weight[:, None], 0)
        maximum = higher
    sure = tl.where(total > 0, total, 1.0)
    tl.store(out + (batch * rows + row) * C + c, (mixed / sure).to(out.dtype.element_ty), mask=c < C)


def mla_attention(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope_key: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """q_latent [B, S, H, C], q_rope [B, S, H, R], latent [B, T, C], rope_key [B, T, R], positions [B, S]
    → [B, S, H, C].

    The number of splits follows from shapes alone; where they begin follows from the positions, on the device.
    """
    q_latent, q_rope, latent, rope_key = (packed(x) for x in (q_latent, q_rope, latent, rope_key))
    batch, queries, heads, rank = q_latent.shape
    rows, rope, device = queries * heads, q_rope.shape[3], q_latent.device
    out = torch.empty((batch, queries, heads, rank), dtype=q_latent.dtype, device=device)
    if out.numel() == 0:
        return out
    block = BLOCK_M_FEW if rows <= BLOCK_M_FEW else BLOCK_M_MANY
    tiles = cdiv(rows, block)
    splits = max(1, min(PROGRAMS // (tiles * batch), cdiv(latent.shape[1], MIN_SPLIT)))
    parts, maxima, sums = out, None, None
    if splits > 1:
        parts = torch.empty((batch, splits, rows, rank), dtype=torch.float32, device=device)
        maxima = torch.empty((batch, splits, rows), dtype=torch.float32, device=device)
        sums = torch.empty((batch, splits, rows), dtype=torch.float32, device=device)
    expect(SCALE=(scale, 0.2), H=(heads, 3), C=(rank, 40), R=(rope, 12))
    mla_attention_kernel[(tiles, splits, batch)](
        q_latent,
        q_rope,
        latent,
        rope_key,
        positions.contiguous(),
        parts,
        maxima,
        sums,
        queries,
        splits,
        *q_latent.stride()[:3],
        *q_rope.stride()[:3],
        *latent.stride()[:2],
        *rope_key.stride()[:2],
        BLOCK_M=block,
        BLOCK_T=BLOCK_T,
        MIN_SPLIT=MIN_SPLIT,
        SPLIT=splits > 1,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    if splits > 1:
        expect(C=(rank, 40))
        merge_splits_kernel[(rows, cdiv(rank, MERGE_C), batch)](
            parts,
            maxima,
            sums,
            out,
            rows,
            splits,
            MERGE_C=MERGE_C,
            MERGE_SPLITS=MERGE_SPLITS,
            num_warps=4,
        )
    return out
