"""RMSNorm of rows, alone or of a residual sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.kernels.layout import as_rows, packed


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    normed,
    total,
    x_stride,
    residual_stride,
    EPS: tl.constexpr,
    ADD: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if ADD:
        addend = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)
        # Rounded before it is normalised: the sum is what the next residual addition reads.
        value = (value.to(tl.float32) + addend.to(tl.float32)).to(value.dtype)
        tl.store(total + row * D + column, value, mask=inside)
    wide = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide) / D + EPS)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * D + column, (wide * inverse * scale).to(value.dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [.., D], weight [D] → [.., D]."""
    rows = as_rows(x)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    BLOCK_D = triton.next_power_of_2(x.shape[-1])
    rms_norm_kernel[(rows.shape[0],)](
        rows,
        None,
        packed(weight),
        normed,
        None,
        rows.stride(0),
        0,
        EPS=eps,
        ADD=False,
        D=x.shape[-1],
        BLOCK_D=BLOCK_D,
        num_warps=max(1, min(8, BLOCK_D // 512)),
    )
    return normed
