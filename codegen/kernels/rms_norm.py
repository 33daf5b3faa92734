"""RMSNorm of rows, alone or of a residual sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.layout import as_rows, next_power_of_2, packed, started_early


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
    OVERLAPPED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    # The weight depends on no kernel: started early, this one reads it while the one before still drains.
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if OVERLAPPED:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if ADD:
        addend = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)
        # Rounded before it is normalised: the sum is what the next residual addition reads.
        value = (value.to(tl.float32) + addend.to(tl.float32)).to(value.dtype)
        tl.store(total + row * D + column, value, mask=inside)
    wide = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide) / D + EPS)
    tl.store(normed + row * D + column, (wide * inverse * scale).to(value.dtype), mask=inside)


def normed_rows(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, overlapped: bool = False
) -> tuple[Tensor, Tensor | None]:
    """x, and residual if there is one, [.., D], weight [D] → (the RMSNorm of x or of their sum, the sum), [.., D].

    overlapped: with programmatic dependent launch.
    """
    rows = as_rows(x)
    added = None if residual is None else as_rows(residual)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    BLOCK_D = next_power_of_2(x.shape[-1])
    rms_norm_kernel[(rows.shape[0],)](
        rows,
        added,
        packed(weight),
        normed,
        total,
        rows.stride(0),
        0 if added is None else added.stride(0),
        EPS=eps,
        ADD=added is not None,
        D=x.shape[-1],
        BLOCK_D=BLOCK_D,
        OVERLAPPED=overlapped,
        num_warps=max(1, min(8, BLOCK_D // 512)),
        **started_early(overlapped),
    )
    return normed, total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [.., D], weight [D] → [.., D]."""
    return normed_rows(x, None, weight, eps)[0]
