"""A product with a weight on Hopper, with the norm before and the sum after it: few rows stream through TMA rings,
many are left to the library."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.layout import as_rows, next_power_of_2
from codegen.kernels.sm_90.boxes import aligned
from codegen.kernels.sm_90.skinny_linear import skinny_linear, why_not_skinny

# Up to here streaming was measured faster than the library's product on one H200; it works up to 64.
SKINNY_ROWS = 16
# Rows that take other paths or tiles: a single one, more up to SKINNY_ROWS, many.
TRIED_SIZES = (1, 13, 4099)
SPLIT_ROWS = 1024  # beyond this, cutting a weight into bfloat16 numbers costs less than the product gains


@triton.jit
def unit_norm_kernel(
    x,
    normed,
    x_stride,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    if OVERLAPPED:
        gdc_launch_dependents()
        gdc_wait()
    wide = tl.load(x + row * x_stride + column, mask=column < D, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide) / D + EPS)
    tl.store(normed + row * D + column, (wide * inverse).to(normed.dtype.element_ty), mask=column < D)


def unit_norm(rows: Tensor, eps: float) -> Tensor:
    """rows [N, D] → every row over its root mean square, [N, D]."""
    normed = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    block = next_power_of_2(rows.shape[1])
    unit_norm_kernel[(rows.shape[0],)](
        rows,
        normed,
        rows.stride(0),
        EPS=eps,
        D=rows.shape[1],
        BLOCK_D=block,
        OVERLAPPED=rows.is_cuda,
        num_warps=max(1, min(8, block // 512)),
        launch_pdl=rows.is_cuda,
    )
    return normed


def exact_product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [N, D] · weight [E, D]ᵀ → [N, E] in float32.

    Products of 16-bit numbers are exact in float32, so the matrix units, which sum in it, lose nothing. A float32
    weight has 24 bits, as many as three bfloat16 numbers; with many rows of that dtype three products on the matrix
    units are faster than one of float32 numbers off them.
    """
    if rows.is_cuda and rows.dtype == weight.dtype and rows.element_size() == 2:
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    weight = weight.to(torch.float32)
    if rows.dtype != torch.bfloat16 or rows.shape[0] <= SPLIT_ROWS:
        return F.linear(rows.to(torch.float32), weight)
    high = weight.to(torch.bfloat16)
    rest = weight - high.to(torch.float32)
    middle = rest.to(torch.bfloat16)
    low = (rest - middle.to(torch.float32)).to(torch.bfloat16)
    parts = torch.mm(rows, torch.cat([low, middle, high]).T, out_dtype=torch.float32)
    return parts.view(rows.shape[0], 3, weight.shape[0]).sum(1)


def linear(
    x: Tensor, weight: Tensor, eps: float | None = None, residual: Tensor | None = None, exact: bool = False
) -> Tensor:
    """Kernel of the op `linear`: x [.., D], weight [O, D], residual [.., O] → x · weightᵀ, with eps over
    sqrt(mean(x²) + eps), plus residual, [.., O]; where `exact` in float32."""
    rows, shape = as_rows(x), (*x.shape[:-1], weight.shape[0])
    added = None if residual is None else residual.reshape(-1, weight.shape[0]).contiguous()
    if rows.shape[0] <= SKINNY_ROWS and weight.is_contiguous() and why_not_skinny(rows, weight) is None:
        return skinny_linear(aligned(rows), weight, eps, added, exact=exact).view(shape)
    if eps is not None:
        rows = unit_norm(rows, eps)
    if exact:
        out = exact_product(rows, weight)
        return (out if added is None else out + added).view(shape)
    out = F.linear(rows, weight) if added is None else torch.addmm(added, rows, weight.T)
    return out.view(shape)
