"""Prefill attention on Hopper: which calls the kernel of prefill_attention serves, and its launch."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from codegen.kernels.attention import in_parts
from codegen.kernels.layout import cdiv
from codegen.kernels.sm_90.boxes import described, starts_aligned
from codegen.kernels.sm_90.prefill_attention import GROUP_ROWS, STAGES, TILE_ROWS, prefill_attention_kernel

# Keys and values of the heads that run side by side should stay in the cache before memory. With all of 128 heads side
# by side the kernel took a fifth longer on an H200.
CACHED_BYTES = 40 << 20
WIDTHS = (64, 128, 192, 256)
VALUE_WIDTHS = (64, 128, 256)


def serves(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, *rope: Tensor | None) -> str | None:
    """Why this form does not serve a call, or None."""
    q, k, q_rope, k_rope = in_parts(q, k, *rope)
    if q.dtype not in (torch.bfloat16, torch.float16):
        return "neither bfloat16 nor float16"
    if q.shape[3] not in WIDTHS or (q_rope is not None and q_rope.shape[3] not in (32, 64)):
        return "heads are not 64, 128, 192 or 256 wide, alone or beside a part of 32 or 64"
    if v.shape[3] not in VALUE_WIDTHS:
        return "values are not 64, 128 or 256 wide"
    if scale <= 0:
        return "scale is not positive"
    return None


def boxes(x: Tensor, height: int) -> TensorDescriptor:
    """x [B, N, H, W] for the copy engine, in boxes of so many rows of one head; zeros behind its edges."""
    unit = 16 // x.element_size()
    # The stride of a size of one may be any number, which the engine would not take.
    strides = [stride if size > 1 else unit for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    if x.stride(3) != 1 or not starts_aligned(x) or any(one % unit or not one for one in strides):
        x = x.clone(memory_format=torch.contiguous_format)
        strides = list(x.stride()[:3])
    box = (1, height, 1, x.shape[3])
    return described(x, x.shape, [*strides, 1], box)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    scale: float,
    q_rope: Tensor | None = None,
    k_rope: Tensor | None = None,
) -> Tensor:
    """q [B, S, H, A], k [B, T, G, A], v [B, T, G, V], positions [B, S] int64 → [B, S, H, V]; optionally more columns
    q_rope [B, S, H, R] and k_rope [B, T, G or 1, R]."""
    q, k, q_rope, k_rope = in_parts(q, k, q_rope, k_rope)
    batch, queries, heads, width = q.shape
    out = torch.empty((batch, queries, heads, v.shape[3]), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    rope = 0 if q_rope is None else q_rope.shape[3]
    # Tiles of keys are as high as the sums in a thread's registers and the rings in shared memory leave room for.
    height = 64 if v.shape[3] > 128 or width + rope > 192 else 128
    row_tiles, lines = cdiv(queries, TILE_ROWS), batch * heads
    read = k.shape[1] * (k.shape[2] * (width + rope + v.shape[3])) * batch * k.element_size()
    more = 64 if width == 192 else 0
    q, q_more = q.split([width - more, more], -1) if more else (q, q)
    k, k_more = k.split([width - more, more], -1) if more else (k, k)
    keys, queries_read = boxes(k, height), boxes(q, GROUP_ROWS)
    prefill_attention_kernel[(row_tiles * lines,)](
        queries_read,
        boxes(q_more, GROUP_ROWS) if more else queries_read,
        queries_read if q_rope is None else boxes(q_rope, GROUP_ROWS),
        keys,
        boxes(k_more, height) if more else keys,
        keys if k_rope is None else boxes(k_rope, height),
        boxes(v, height),
        positions.contiguous(),
        out,
        queries,
        row_tiles,
        heads,
        lines,
        cdiv(lines, cdiv(read, CACHED_BYTES)),
        LOG2_SCALE=scale * 1.4426950408889634,  # scores in units of log 2
        KEYS=height,
        WIDTH=width - more,
        MORE=more,
        ROPE=rope,
        V=v.shape[3],
        K_SHARE=heads // k.shape[2],
        ROPE_SHARE=1 if k_rope is None else heads // k_rope.shape[2],
        V_SHARE=heads // v.shape[2],
        STAGES=STAGES,
        num_warps=4,
        maxnreg=168,
        launch_pdl=True,
    )
    return out
