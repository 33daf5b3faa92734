"""routed_swiglu for sm_80, cut from codegen/kernels/routed_swiglu.py.

Inputs: bfloat16, int64, float32, bfloat16, bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

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


def halves(gate_up: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gates and ups, [E, I, D] each, of one stack [E, 2I, D], or of two."""
    if up is not None:
        return gate_up, up
    gate, up = gate_up.chunk(2, 1)
    return gate, up


def cdiv(size: int, part: int) -> int:
    """How many parts a size is cut into. triton's own, for kernels as well, takes the host longer."""
    return -(-size // part)


def started_early(overlapped: bool) -> dict[str, bool]:
    """Options of a launch that may begin before the one in front of it has ended; not every target knows of them."""
    return {"launch_pdl": True} if overlapped else {}


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    E: tl.constexpr = 6
    OUT: tl.constexpr = 72
    D: tl.constexpr = 24
    EXPERT_STRIDE: tl.constexpr = 1728
    ROW_STRIDE: tl.constexpr = 24
    COLUMN_STRIDE: tl.constexpr = 1
    BLOCK_E: tl.constexpr = 8
    # Whoever lets this kernel start early has waited for the pairs to be sorted.
    expert, first, end = find_run(offsets, tl.program_id(1), E, BLOCK_E, BLOCK_M)
    if expert == E:
        return
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
    target = tl.load(order + row, mask=row < end, other=0)
    written = (row < end)[:, None] & (column < OUT)[None, :]
    tl.store(out + target[:, None] * OUT + column[None, :], total.to(out.dtype.element_ty), mask=written)


def row_tiles(rows: int, experts: int, block: int) -> int:
    """How many row tiles there can be at most, however the rows are spread over the experts."""
    return min(rows, experts + rows // block)


BLOCK_M_FEW = 128
BLOCK_M_MANY = 1024


@triton.jit
def sort_pairs_kernel(
    indices,
    order,
    offsets,
    pairs,
    BLOCK_M: tl.constexpr,
):
    # Every program reads all indices twice; they are few against the weights and stay in the L2 cache.
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK_M)
    before = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(0, pairs, BLOCK_M):
        index = tl.load(indices + first + lane, mask=first + lane < pairs, other=2**31 - 1)
        before += (index < expert).to(tl.int32)
    start = tl.sum(before)
    for first in range(0, pairs, BLOCK_M):
        index = tl.load(indices + first + lane, mask=first + lane < pairs, other=2**31 - 1)
        mine = (index == expert).to(tl.int32)
        place = start + tl.cumsum(mine, 0) - 1
        tl.store(order + place, (first + lane).to(tl.int64), mask=mine != 0)
        start += tl.sum(mine)
    tl.store(offsets + expert, start)


def sort_pairs(indices: Tensor, experts: int, overlapped: bool = False) -> tuple[Tensor, Tensor]:
    """indices [N, K] int64 → (order [M] int64, offsets [E] int32).

    overlapped: with programmatic dependent launch, which is Hopper's and later ones'.
    """
    pairs = indices.shape[0] * indices.shape[1]
    order = torch.empty((pairs,), dtype=torch.int64, device=indices.device)
    offsets = torch.empty((experts,), dtype=torch.int32, device=indices.device)
    expect(OVERLAPPED=(overlapped, False))
    sort_pairs_kernel[(experts,)](
        indices.contiguous(),
        order,
        offsets,
        pairs,
        BLOCK_M=BLOCK_M_FEW if pairs <= BLOCK_M_FEW else BLOCK_M_MANY,
        num_warps=4,
        **started_early(overlapped),
    )
    return order, offsets


@triton.jit
def limited(gate, up, LIMIT: tl.constexpr):
    """Gates up to LIMIT and ups within ± LIMIT, if there is one; what is no number stays none."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate, up


@triton.jit
def gated(gate, up, LIMIT: tl.constexpr):
    gate, up = limited(gate, up, LIMIT)
    return gate * tl.sigmoid(gate) * up


MAX_STAGES = 5
BLOCK_COMBINE = 1024


@triton.jit
def gate_up_kernel(
    x,
    gate,
    up,
    offsets,
    order,
    hidden,
    x_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    LIMIT: tl.constexpr = None
    E: tl.constexpr = 6
    K: tl.constexpr = 2
    D: tl.constexpr = 72
    WIDTH: tl.constexpr = 24
    EXPERT_STRIDE: tl.constexpr = 3456
    ROW_STRIDE: tl.constexpr = 72
    COLUMN_STRIDE: tl.constexpr = 1
    BLOCK_E: tl.constexpr = 8
    expert, first, end = find_run(offsets, tl.program_id(1), E, BLOCK_E, BLOCK_M)
    if expert == E:
        return
    row = first + tl.arange(0, BLOCK_M)
    token = tl.load(order + row, mask=row < end, other=0) // K
    column = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    depth = tl.arange(0, BLOCK_K)
    x_row = x + token[:, None] * x_stride
    rows = expert.to(tl.int64) * EXPERT_STRIDE + column[None, :] * ROW_STRIDE
    gates = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    ups = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = start + depth < D
        a = tl.load(x_row + (start + depth)[None, :], mask=(row < end)[:, None] & inside[None, :], other=0.0)
        wanted = (column < WIDTH)[None, :] & inside[:, None]
        at = rows + (start + depth)[:, None] * COLUMN_STRIDE
        gates = tl.dot(a, tl.load(gate + at, mask=wanted, other=0.0), gates, input_precision="ieee")
        ups = tl.dot(a, tl.load(up + at, mask=wanted, other=0.0), ups, input_precision="ieee")
    written = (row < end)[:, None] & (column < WIDTH)[None, :]
    place = hidden + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(place, gated(gates, ups, LIMIT).to(hidden.dtype.element_ty), mask=written)


@triton.jit
def combine_kernel(
    y,
    weights,
    out,
    BLOCK_COMBINE: tl.constexpr,
):
    K: tl.constexpr = 2
    D: tl.constexpr = 72
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COMBINE + tl.arange(0, BLOCK_COMBINE)
    inside = column < D
    total = tl.zeros((BLOCK_COMBINE,), tl.float32)
    for k in tl.static_range(K):
        value = tl.load(y + (token * K + k) * D + column, mask=inside, other=0.0).to(tl.float32)
        value *= tl.load(weights + token * K + k).to(tl.float32)
        total += value
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=inside)


def combine(
    y: Tensor, weights: Tensor, residual: Tensor | None = None, weighted: bool = False, overlapped: bool = False
) -> Tensor:
    """y [N·K, D] in pair order, weights [N, K] unless it is `weighted` → the sum over K, plus residual [N, D], [N, D].

    overlapped: with programmatic dependent launch.
    """
    tokens, top_k = weights.shape
    width = y.shape[1]
    residual = None if residual is None else as_rows(residual)
    out = torch.empty((tokens, width), dtype=y.dtype, device=y.device)
    expect(
        residual=(residual, None),
        K=(top_k, 2),
        D=(width, 72),
        WEIGHTED=(not weighted, True),
        ADD=(residual is not None, False),
        OVERLAPPED=(overlapped, False),
    )
    combine_kernel[(tokens, cdiv(width, BLOCK_COMBINE))](
        y,
        weights.contiguous(),
        out,
        BLOCK_COMBINE=BLOCK_COMBINE,
        num_warps=4,
        **started_early(overlapped),
    )
    return out


def swiglu_in_tiles(
    x: Tensor,
    indices: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    limit: float | None = None,
    overlapped: bool = False,
) -> Tensor:
    """x [N, D], indices [N, K], gate and up [E, I, D], down [E, D, I], of any strides → each pair's result [N·K, D].

    overlapped: with programmatic dependent launch.
    """
    x = as_rows(x)
    if gate.stride() != up.stride():
        gate, up = gate.contiguous(), up.contiguous()
    tokens, top_k = indices.shape
    experts, hidden_width, width = down.shape
    pairs = tokens * top_k
    order, offsets = sort_pairs(indices, experts, overlapped)
    hidden = torch.empty((pairs, width), dtype=x.dtype, device=x.device)
    y = torch.empty((pairs, hidden_width), dtype=x.dtype, device=x.device)
    tile = tiling(pairs, experts)
    block_k, stages = tile.step_bytes // x.element_size(), min(tile.stages, MAX_STAGES)
    tiles = row_tiles(pairs, experts, tile.rows)
    # Half of a tile's columns are gates, half ups; where neighbours in memory are columns, 64 are a line of it.
    block_i = tile.columns // 2 if gate.stride(2) == 1 else max(64, tile.columns // 2)
    expect(
        LIMIT=(limit, None),
        E=(experts, 6),
        K=(top_k, 2),
        D=(hidden_width, 72),
        WIDTH=(width, 24),
        EXPERT_STRIDE=(gate.stride(0), 3456),
        ROW_STRIDE=(gate.stride(1), 72),
        COLUMN_STRIDE=(gate.stride(2), 1),
        OVERLAPPED=(overlapped, False),
    )
    gate_up_kernel[(cdiv(width, block_i), tiles)](
        x,
        gate,
        up,
        offsets,
        order,
        hidden,
        x.stride(0),
        BLOCK_M=tile.rows,
        BLOCK_I=block_i,
        BLOCK_K=block_k,
        num_warps=tile.warps,
        num_stages=stages,
        **started_early(overlapped),
    )
    # Scattered back to pair order, so that a token's rows lie together and are summed in a fixed order.
    expect(
        E=(experts, 6),
        OUT=(hidden_width, 72),
        D=(width, 24),
        EXPERT_STRIDE=(down.stride(0), 1728),
        ROW_STRIDE=(down.stride(1), 24),
        COLUMN_STRIDE=(down.stride(2), 1),
        OVERLAPPED=(overlapped, False),
    )
    grouped_linear_kernel[(cdiv(hidden_width, tile.columns), tiles)](
        hidden,
        down,
        offsets,
        order,
        y,
        width,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=block_k,
        num_warps=tile.warps,
        num_stages=stages,
        **started_early(overlapped),
    )
    return y


def routed_swiglu(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor | None = None,
    always: int = 0,
    up: Tensor | None = None,
    limit: float | None = None,
) -> Tensor:
    """x [N, D], indices and weights [N, K], gate_up [E, 2I, D], down [E, D, I] → [N, D], plus residual [N, D].

    With up [E, I, D], gate_up [E, I, D] is the gates alone. Stacks may have any strides. `always` experts that every
    token gets are treated like the others.
    """
    return combine(swiglu_in_tiles(x, indices, *halves(gate_up, up), down, limit), weights, residual)
