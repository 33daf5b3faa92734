"""The chosen experts of every token: gather, two grouped products with SwiGLU between them, weighted sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.grouped_linear import find_run, grouped_linear_kernel, row_tiles, tiling
from codegen.kernels.layout import as_rows, cdiv, halves, next_power_of_2, started_early
from codegen.kernels.sort_pairs import sort_pairs
from codegen.kernels.swiglu import gated

MAX_STAGES = 5
BLOCK_COMBINE = 1024

# Batches that take each of the tilings, at 8 to 384 experts.
TRIED_SIZES = (1, 43, 131, 263, 601, 4099, 20011)


@triton.jit
def gate_up_kernel(
    x,
    gate,
    up,
    offsets,
    order,
    hidden,
    x_stride,
    LIMIT: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()
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
    residual,
    out,
    residual_stride,
    K: tl.constexpr,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_COMBINE: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COMBINE + tl.arange(0, BLOCK_COMBINE)
    inside = column < D
    total = tl.zeros((BLOCK_COMBINE,), tl.float32)
    for k in tl.static_range(K):
        value = tl.load(y + (token * K + k) * D + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * K + k).to(tl.float32)
        total += value
    if ADD:
        total += tl.load(residual + token * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
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
    combine_kernel[(tokens, cdiv(width, BLOCK_COMBINE))](
        y,
        weights.contiguous(),
        residual,
        out,
        0 if residual is None else residual.stride(0),
        K=top_k,
        D=width,
        WEIGHTED=not weighted,
        ADD=residual is not None,
        BLOCK_COMBINE=BLOCK_COMBINE,
        OVERLAPPED=overlapped,
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
    gate_up_kernel[(cdiv(width, block_i), tiles)](
        x,
        gate,
        up,
        offsets,
        order,
        hidden,
        x.stride(0),
        LIMIT=limit,
        E=experts,
        K=top_k,
        D=hidden_width,
        WIDTH=width,
        EXPERT_STRIDE=gate.stride(0),
        ROW_STRIDE=gate.stride(1),
        COLUMN_STRIDE=gate.stride(2),
        BLOCK_E=next_power_of_2(experts),
        BLOCK_M=tile.rows,
        BLOCK_I=block_i,
        BLOCK_K=block_k,
        OVERLAPPED=overlapped,
        num_warps=tile.warps,
        num_stages=stages,
        **started_early(overlapped),
    )
    # Scattered back to pair order, so that a token's rows lie together and are summed in a fixed order.
    grouped_linear_kernel[(cdiv(hidden_width, tile.columns), tiles)](
        hidden,
        down,
        offsets,
        order,
        y,
        width,
        SCATTER=True,
        E=experts,
        OUT=hidden_width,
        D=width,
        EXPERT_STRIDE=down.stride(0),
        ROW_STRIDE=down.stride(1),
        COLUMN_STRIDE=down.stride(2),
        BLOCK_E=next_power_of_2(experts),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=block_k,
        OVERLAPPED=overlapped,
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
