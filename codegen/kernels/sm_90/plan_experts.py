"""Which rows of which expert the products of a prefill work on: the sorted pairs, cut into tiles, and their rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.layout import cdiv, next_power_of_2

BLOCK_TOKENS = 32  # whose pairs one program sorts
PROGRAMS = 256  # that copy tokens: more of them count the same pairs again
FEW_PROGRAMS = 48  # that copy tokens while others multiply those of shared experts


@dataclass(frozen=True)
class ExpertPlan:
    """Row r of the sorted order is pair order[r]; tile t is rows begin[t] to end[t] of expert[t].

    Tiles are in the order of their experts, so that those which use the same weights are worked on together.
    order int32 [M]; tiles int32 [5, T]: expert, begin, end; the number of tiles in use and a zero to take items by; a
    zero per tile to count what is done. T bounds the tiles of any routing. gathered [M, D]: the token of each row.
    tokens [N, D]: what was planned for.

    Rows behind the last of gathered belong to experts that serve every token: they are the tokens themselves, over and
    over. Their tiles, `early` many, are the first, and they and the zeros are there before the rest of the plan is: a
    kernel that starts early may use them. busy: what the plan's kernels may still read then, so that nobody else is
    given its memory.
    """

    order: Tensor
    tiles: Tensor
    gathered: Tensor
    tokens: Tensor
    early: int
    busy: tuple[Tensor, ...] = ()


@triton.jit
def count_kernel(
    indices_ptr,
    counts_ptr,
    tiles_ptr,
    pairs,
    max_tiles,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    """How many of each block of PAIRS pairs each expert has: counts [blocks, EXPERTS].

    The first program also writes what of the tiles needs no counting: zeros, and the shared experts' tiles.
    """
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()
    experts = tl.arange(0, BLOCK_E)
    place = tl.arange(0, BLOCK_M)
    pair = tl.program_id(0) * PAIRS + place
    inside = (place < PAIRS) & (pair < pairs)
    chosen = tl.load(indices_ptr + pair, mask=inside, other=0).to(tl.int32)
    counts = tl.histogram(chosen, BLOCK_E, mask=inside)
    tl.store(counts_ptr + tl.program_id(0) * EXPERTS + experts, counts, mask=experts < EXPERTS)
    if tl.program_id(0) == 0:
        tl.store(tiles_ptr + 3 * max_tiles + 1, 0)
        tokens = pairs // TOP_K
        parts = tl.cdiv(tokens, ROWS)
        size = tl.cdiv(tokens, parts * UNIT) * UNIT
        for first in range(0, max_tiles, BLOCK_M):
            tile = first + place
            tl.store(tiles_ptr + 4 * max_tiles + tile, tl.zeros_like(tile), mask=tile < max_tiles)
            begin = pairs - tokens * SHARED + tile // parts * tokens
            early = tile < SHARED * parts
            tl.store(tiles_ptr + tile, EXPERTS - SHARED + tile // parts, mask=early)
            tl.store(tiles_ptr + max_tiles + tile, begin + tile % parts * size, mask=early)
            end = begin + tl.minimum((tile % parts + 1) * size, tokens)
            tl.store(tiles_ptr + 2 * max_tiles + tile, end, mask=early)


@triton.jit
def _write_tiles(tiles_ptr, max_tiles, early, counts, begin, first, step, ROWS: tl.constexpr, UNIT: tl.constexpr):
    """Of every expert's tiles each step-th, from the first on, behind the early ones."""
    experts = tl.arange(0, counts.shape[0])
    # Equal tiles rather than full ones and a rest: a product's rows are rounded up per tile.
    parts = (counts + ROWS - 1) // ROWS
    size = tl.cdiv(counts, tl.maximum(parts, 1) * UNIT) * UNIT
    tile = early + tl.cumsum(parts, 0) - parts
    for part in range(first, tl.max(parts), step):
        at = tiles_ptr + tile + part
        tl.store(at, experts, mask=part < parts)
        tl.store(at + max_tiles, begin + part * size, mask=part < parts)
        tl.store(at + 2 * max_tiles, begin + tl.minimum((part + 1) * size, counts), mask=part < parts)
    if first == 0:
        tl.store(tiles_ptr + 3 * max_tiles, early + tl.sum(parts))


@triton.jit
def place_kernel(
    indices_ptr,
    counts_ptr,
    x_ptr,
    order_ptr,
    rows_ptr,
    tiles_ptr,
    gathered_ptr,
    pairs,
    max_tiles,
    EXPERTS: tl.constexpr,
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    """Blocks of tokens: the rows that their pairs have in sorted order, and copies of each token to those rows that do
    not belong to SHARED experts."""
    PAIRS: tl.constexpr = TOKENS * TOP_K
    blocks = tl.cdiv(pairs, PAIRS)
    own = tl.cdiv(blocks, tl.num_programs(0))
    first_block = tl.program_id(0) * own
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()
    experts = tl.arange(0, BLOCK_E)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    before = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, blocks, BLOCK_B):
        other = first + tl.arange(0, BLOCK_B)
        known = (other < blocks)[:, None] & (experts < EXPERTS)[None, :]
        part = tl.load(counts_ptr + other[:, None] * EXPERTS + experts[None, :], mask=known, other=0)
        counts += tl.sum(part, 0)
        before += tl.sum(tl.where((other < first_block)[:, None], part, 0), 0)
    begin = tl.cumsum(counts, 0) - counts
    if tl.program_id(1) == 0:
        early = SHARED * tl.cdiv(pairs // TOP_K, ROWS)
        routed = tl.where(experts < EXPERTS - SHARED, counts, 0)
        _write_tiles(tiles_ptr, max_tiles, early, routed, begin, tl.program_id(0), tl.num_programs(0), ROWS, UNIT)

    place = tl.arange(0, BLOCK_M)
    for block in range(first_block, tl.minimum(first_block + own, blocks)):
        pair = block * PAIRS + place
        inside = (place < PAIRS) & (pair < pairs)
        chosen = tl.load(indices_ptr + pair, mask=inside, other=0).to(tl.int32)
        row = tl.gather(begin + before, chosen, 0)
        for first in range(0, PAIRS, TOKENS):
            other = first + tl.arange(0, TOKENS)
            theirs = tl.load(indices_ptr + block * PAIRS + other, mask=block * PAIRS + other < pairs, other=-1)
            earlier = (other[None, :] < place[:, None]) & (theirs.to(tl.int32)[None, :] == chosen[:, None])
            row += tl.sum(earlier.to(tl.int32), 1)
        # Every column program writes the same numbers: it reads them back without waiting for another.
        tl.store(order_ptr + row, pair, mask=inside)
        tl.store(rows_ptr + pair, row, mask=inside)
        before += tl.load(counts_ptr + block * EXPERTS + experts, mask=experts < EXPERTS, other=0)
        tl.debug_barrier()

        token = block * TOKENS + tl.arange(0, TOKENS)
        for first in range(tl.program_id(1) * BLOCK_D, WIDTH, tl.num_programs(1) * BLOCK_D):
            column = first + tl.arange(0, BLOCK_D)
            copied = (token * TOP_K < pairs)[:, None] & (column < WIDTH)[None, :]
            values = tl.load(x_ptr + token.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=copied)
            for choice in tl.static_range(TOP_K - SHARED):
                copy = tl.load(rows_ptr + token * TOP_K + choice, mask=token * TOP_K < pairs, other=0).to(tl.int64)
                tl.store(gathered_ptr + copy[:, None] * WIDTH + column[None, :], values, mask=copied)


def plan_experts(x: Tensor, indices: Tensor, experts: int, rows: int, unit: int = 1, shared: int = 0) -> ExpertPlan:
    """x [N, D], indices [N, K] below `experts` → the plan for tiles of at most `rows` rows, all on the device.

    In two launches: one counts, one places. Tiles are cut between units of rows, `rows` a multiple of them.
    shared: so many of the last experts serve every token, as its last choices. Gathered has none of their rows.
    """
    tokens, top_k = indices.shape
    pairs, width = tokens * top_k, x.shape[1]
    max_tiles = max(2, min(pairs, experts + pairs // rows))  # of any routing; the row of numbers has two
    order = torch.empty(pairs, dtype=torch.int32, device=x.device)
    tiles = torch.empty((5, max_tiles), dtype=torch.int32, device=x.device)
    block_e, block = next_power_of_2(experts), next_power_of_2(BLOCK_TOKENS * top_k)
    blocks, block_d = cdiv(tokens, BLOCK_TOKENS), min(512, next_power_of_2(width))
    gathered = torch.empty((pairs - tokens * shared, width), dtype=x.dtype, device=x.device)
    counts = torch.empty((blocks, experts), dtype=torch.int32, device=x.device)
    rows_of_pairs = torch.empty(pairs, dtype=torch.int32, device=x.device)
    count_kernel[(blocks,)](
        indices,
        counts,
        tiles,
        pairs,
        max_tiles,
        EXPERTS=experts,
        SHARED=shared,
        TOP_K=top_k,
        ROWS=rows,
        UNIT=unit,
        PAIRS=BLOCK_TOKENS * top_k,
        BLOCK_E=block_e,
        BLOCK_M=block,
        OVERLAPPED=x.is_cuda,
        num_warps=4,
        launch_pdl=x.is_cuda,
    )
    # Whoever multiplies the shared experts' tiles meanwhile wants processors of its own.
    programs = FEW_PROGRAMS if shared else PROGRAMS
    columns = min(cdiv(width, block_d), cdiv(programs, blocks))
    place_kernel[(min(blocks, FEW_PROGRAMS) if shared else blocks, columns)](
        indices,
        counts,
        x,
        order,
        rows_of_pairs,
        tiles,
        gathered,
        pairs,
        max_tiles,
        EXPERTS=experts,
        SHARED=shared,
        TOP_K=top_k,
        WIDTH=width,
        ROWS=rows,
        UNIT=unit,
        TOKENS=BLOCK_TOKENS,
        BLOCK_E=block_e,
        BLOCK_M=block,
        BLOCK_B=32,
        BLOCK_D=block_d,
        OVERLAPPED=x.is_cuda,
        num_warps=16 if shared else 8,
        launch_pdl=x.is_cuda,
    )
    return ExpertPlan(order, tiles, gathered, x, shared * cdiv(tokens, rows), (counts, rows_of_pairs))
