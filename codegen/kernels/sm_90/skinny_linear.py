"""A product with few rows: every weight is read once, with vector arithmetic, by many small programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.sm_90.launch import overlapped


@triton.jit
def _skinny_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    depth,
    width,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    output = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    total = tl.zeros((ROWS, BLOCK_O, BLOCK_D), tl.float32)
    weight_ptr += output.to(tl.int64)[:, None] * depth + column[None, :]
    x_ptr += row[:, None] * depth + column[None, :]
    is_output = (output < width)[:, None]
    # Weights do not depend on the kernel before: the first of them are under way while it still drains.
    weight = tl.load(weight_ptr, mask=is_output & (column < depth)[None, :], other=0.0)
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()
    for start in range(0, depth, BLOCK_D):
        following = start + BLOCK_D + column < depth
        inside = start + column < depth
        x = tl.load(x_ptr + start, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        ahead = tl.load(weight_ptr + start + BLOCK_D, mask=is_output & following[None, :], other=0.0)
        total += weight.to(tl.float32)[None, :, :] * x.to(tl.float32)[:, None, :]
        weight = ahead
    out = tl.sum(total, 2).to(out_ptr.dtype.element_ty)
    place = row[:, None] * width + output[None, :]
    tl.store(out_ptr + place, out, mask=(row < rows)[:, None] & (output < width)[None, :])


def skinny_linear(x: Tensor, weight: Tensor, block: tuple[int, int] = (4, 512), warps: int = 4) -> Tensor:
    """x [N, D], weight [O, D] → [N, O] in the dtype of x, for a handful of rows; accumulates in fp32."""
    rows, depth = x.shape
    width = weight.shape[0]
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    tile = min(8, triton.next_power_of_2(rows))
    _skinny_kernel[(triton.cdiv(width, block[0]), triton.cdiv(rows, tile))](
        x,
        weight,
        out,
        rows,
        depth,
        width,
        ROWS=tile,
        BLOCK_O=block[0],
        BLOCK_D=block[1],
        num_warps=warps,
        **overlapped(x),
    )
    return out
