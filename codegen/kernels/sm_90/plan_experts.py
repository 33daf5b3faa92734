"""Which rows of which expert a program works on: the sorted pairs, cut into tiles, with the rows gathered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MANY_PAIRS = 4096


@dataclass(frozen=True)
class ExpertPlan:
    """Row r of the sorted order is pair order[r]; tile t is rows begin[t] to end[t] of expert[t].

    order int32 [M]; tiles int32 [4, T]: expert, begin, end, and in the last row's first place the number of
    tiles in use; gathered [M, D]: the token of each row. T bounds the tiles of any routing.
    """

    order: Tensor
    tiles: Tensor
    gathered: Tensor


@triton.jit
def plan_kernel(
    indices_ptr,
    x_ptr,
    order_ptr,
    tiles_ptr,
    gathered_ptr,
    pairs,
    max_tiles,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    """One program per expert: it counts everybody, places its own pairs, and copies their tokens."""
    expert = tl.program_id(0)
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()
    experts = tl.arange(0, BLOCK_E)
    place = tl.arange(0, BLOCK_M)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for block in range(0, pairs, BLOCK_M):
        chosen = tl.load(indices_ptr + block + place, mask=block + place < pairs, other=0).to(tl.int32)
        counts += tl.histogram(chosen, BLOCK_E, mask=block + place < pairs)
    tiles = (counts + ROWS - 1) // ROWS
    begin = tl.sum(tl.where(experts < expert, counts, 0))
    end = begin + tl.sum(tl.where(experts == expert, counts, 0))
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0))
    if (expert == 0) & (tl.program_id(1) == 0):
        tl.store(tiles_ptr + 3 * max_tiles, tl.sum(tiles))
    if end > begin:
        if tl.program_id(1) == 0:
            # Equal tiles rather than full ones and a rest: a product's width is rounded up per tile.
            parts = (end - begin + ROWS - 1) // ROWS
            size = tl.cdiv(end - begin, parts * UNIT) * UNIT
            for part in range(0, parts):
                tile = tiles_ptr + first_tile + part
                tl.store(tile, expert)
                tl.store(tile + max_tiles, begin + part * size)
                tl.store(tile + 2 * max_tiles, tl.minimum(begin + (part + 1) * size, end))
        row = begin
        for block in range(0, pairs, BLOCK_M):
            chosen = tl.load(indices_ptr + block + place, mask=block + place < pairs, other=-1).to(tl.int32)
            mine = (chosen == expert).to(tl.int32)
            rank = row + tl.cumsum(mine, 0) - 1
            # Every column program writes the same numbers: it reads them back without waiting for another.
            tl.store(order_ptr + rank, block + place, mask=mine != 0)
            row += tl.sum(mine)
        if GATHER:
            tl.debug_barrier()
            column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
            for block in range(begin, end, BLOCK_R):
                rows = block + tl.arange(0, BLOCK_R)
                _copy_rows(x_ptr, order_ptr, gathered_ptr, rows, end, column, WIDTH, TOP_K)


@triton.jit
def _copy_rows(x_ptr, order_ptr, gathered_ptr, rows, end, column, WIDTH: tl.constexpr, TOP_K: tl.constexpr):
    token = (tl.load(order_ptr + rows, mask=rows < end, other=0) // TOP_K).to(tl.int64)
    inside = (rows < end)[:, None] & (column < WIDTH)[None, :]
    values = tl.load(x_ptr + token[:, None] * WIDTH + column[None, :], mask=inside)
    tl.store(gathered_ptr + rows.to(tl.int64)[:, None] * WIDTH + column[None, :], values, mask=inside)


@triton.jit
def gather_kernel(
    x_ptr,
    order_ptr,
    gathered_ptr,
    pairs,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    _copy_rows(x_ptr, order_ptr, gathered_ptr, rows, pairs, column, WIDTH, TOP_K)


def plan_experts(x: Tensor, indices: Tensor, experts: int, rows: int, unit: int = 1) -> ExpertPlan:
    """x [N, D], indices [N, K] below `experts` → the plan for tiles of at most `rows` rows, cut between units of rows;
    all on the device."""
    tokens, top_k = indices.shape
    pairs, width = tokens * top_k, x.shape[1]
    max_tiles = min(pairs, experts + pairs // rows)
    order = torch.empty(pairs, dtype=torch.int32, device=x.device)
    tiles = torch.empty((4, max_tiles), dtype=torch.int32, device=x.device)
    gathered = torch.empty((pairs, width), dtype=x.dtype, device=x.device)
    block_d = min(1024, triton.next_power_of_2(width))
    columns = triton.cdiv(width, block_d)
    # One launch while counting is cheap; with many pairs, counting once per block of columns costs more.
    together = pairs <= MANY_PAIRS
    block = min(8192, max(128, triton.next_power_of_2(pairs)))
    plan_kernel[(experts, columns if together else 1)](
        indices,
        x,
        order,
        tiles,
        gathered,
        pairs,
        max_tiles,
        EXPERTS=experts,
        TOP_K=top_k,
        WIDTH=width,
        ROWS=rows,
        UNIT=unit,
        GATHER=together,
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_M=block,
        BLOCK_D=block_d,
        BLOCK_R=8,
        num_warps=16 if block > 4096 else 8,
        OVERLAPPED=x.is_cuda,
        launch_pdl=x.is_cuda,
    )
    if not together:
        gather_kernel[(triton.cdiv(pairs, 4), columns)](
            x,
            order,
            gathered,
            pairs,
            TOP_K=top_k,
            WIDTH=width,
            BLOCK_R=4,
            BLOCK_D=block_d,
            num_warps=4,
            OVERLAPPED=x.is_cuda,
            launch_pdl=x.is_cuda,
        )
    return ExpertPlan(order, tiles, gathered)
