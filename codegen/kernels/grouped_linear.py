"""Grouped products: rows sorted by expert, each expert's run times its own weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.layout import as_rows, cdiv, next_power_of_2, packed

MAX_STAGES = 5


class Tiling(NamedTuple):
    """For up to `mean` rows per expert: tiles of `rows` times `columns`, of which steps read so many bytes of a row."""

    mean: int
    rows: int
    columns: int
    step_bytes: int
    warps: int
    stages: int


# Few rows per expert are limited by reading weights (decode), many reuse them (prefill). Measured on one H200.
TILINGS = (Tiling(8, 16, 64, 256, 4, 5), Tiling(48, 64, 128, 128, 4, 3), Tiling(1 << 30, 128, 128, 128, 8, 3))

# Numbers of rows that take each of them, at 8 to 384 experts.
TRIED_SIZES = (1, 131, 601, 4099, 20011)


def tiling(rows: int, experts: int) -> Tiling:
    """The first that serves so many rows."""
    return next(one for one in TILINGS if rows <= one.mean * experts)


@triton.jit
def find_run(
    offsets,
    tile,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """(expert, first row, end of its run) of a row tile; expert = E for tiles behind the last one.

    Runs are cut into tiles of BLOCK_M rows each, so that no tile straddles two experts.
    """
    expert = tl.arange(0, BLOCK_E)
    end = tl.load(offsets + expert, mask=expert < E, other=0)
    begin = tl.load(offsets + expert - 1, mask=(expert > 0) & (expert < E), other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    tiles_to_here = tl.cumsum(tiles, 0)
    found = tl.sum(((tiles_to_here <= tile) & (expert < E)).to(tl.int32))
    here = expert == found
    first = tl.sum(tl.where(here, begin + (tile - tiles_to_here + tiles) * BLOCK_M, 0))
    return found, first, tl.sum(tl.where(here, end, 0))


@triton.jit
def grouped_linear_kernel(
    x,
    weight,
    offsets,
    order,
    out,
    x_stride,
    SCATTER: tl.constexpr,
    E: tl.constexpr,
    OUT: tl.constexpr,
    D: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    if OVERLAPPED:
        gdc_launch_dependents()
    # Whoever lets this kernel start early has waited for the pairs to be sorted.
    expert, first, end = find_run(offsets, tl.program_id(1), E, BLOCK_E, BLOCK_M)
    if expert == E:
        return
    if OVERLAPPED:
        gdc_wait()
    row = first + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    x_row = x + row.to(tl.int64)[:, None] * x_stride
    w_row = weight + expert.to(tl.int64) * EXPERT_STRIDE + column[None, :] * ROW_STRIDE
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = start + depth < D
        a = tl.load(x_row + (start + depth)[None, :], mask=(row < end)[:, None] & inside[None, :], other=0.0)
        wanted = (column < OUT)[None, :] & inside[:, None]
        b = tl.load(w_row + (start + depth)[:, None] * COLUMN_STRIDE, mask=wanted, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    if SCATTER:
        target = tl.load(order + row, mask=row < end, other=0)
    else:
        target = row.to(tl.int64)
    written = (row < end)[:, None] & (column < OUT)[None, :]
    tl.store(out + target[:, None] * OUT + column[None, :], total.to(out.dtype.element_ty), mask=written)


def row_tiles(rows: int, experts: int, block: int) -> int:
    """How many row tiles there can be at most, however the rows are spread over the experts."""
    return min(rows, experts + rows // block)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [M, D], weight [E, O, D] of any strides, offsets [E] int32 → [M, O]."""
    x = as_rows(x)
    rows, (experts, width, depth) = x.shape[0], weight.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    tile = tiling(rows, experts)
    grouped_linear_kernel[(cdiv(width, tile.columns), row_tiles(rows, experts, tile.rows))](
        x,
        weight,
        packed(offsets),
        None,
        out,
        x.stride(0),
        SCATTER=False,
        E=experts,
        OUT=width,
        D=depth,
        EXPERT_STRIDE=weight.stride(0),
        ROW_STRIDE=weight.stride(1),
        COLUMN_STRIDE=weight.stride(2),
        BLOCK_E=next_power_of_2(experts),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.step_bytes // x.element_size(),
        OVERLAPPED=False,
        num_warps=tile.warps,
        num_stages=min(tile.stages, MAX_STAGES),
    )
    return out
