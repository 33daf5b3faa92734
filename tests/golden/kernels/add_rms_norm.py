"""add_rms_norm for sm_80, cut from codegen/kernels/add_rms_norm.py.

Inputs: bfloat16, bfloat16, bfloat16.
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


def as_rows(x: Tensor) -> Tensor:
    """x [.., D] as [rows, D] with neighbouring columns; a copy only where no such view exists."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def packed(x: Tensor) -> Tensor:
    """x itself if neighbours on its last axis are neighbours in memory, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is not less than a size of at least 1."""
    return 1 << (size - 1).bit_length()


def started_early(overlapped: bool) -> dict[str, bool]:
    """Options of a launch that may begin before the one in front of it has ended; not every target knows of them."""
    return {"launch_pdl": True} if overlapped else {}


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    normed,
    total,
    x_stride,
    residual_stride,
    BLOCK_D: tl.constexpr,
):
    EPS: tl.constexpr = 1e-06
    D: tl.constexpr = 72
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    # The weight depends on no kernel: started early, this one reads it while the one before still drains.
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
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
    expect(
        EPS=(eps, 1e-06),
        ADD=(added is not None, True),
        D=(x.shape[-1], 72),
        OVERLAPPED=(overlapped, False),
    )
    rms_norm_kernel[(rows.shape[0],)](
        rows,
        added,
        packed(weight),
        normed,
        total,
        rows.stride(0),
        0 if added is None else added.stride(0),
        BLOCK_D=BLOCK_D,
        num_warps=1,
        **started_early(overlapped),
    )
    return normed, total


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """x, residual [.., D], weight [D] → (rms_norm(sum), sum), both [.., D]."""
    return normed_rows(x, residual, weight, eps)
