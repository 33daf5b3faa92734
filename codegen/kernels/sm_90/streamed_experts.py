"""Experts of one token or a few on Hopper: matrices times vectors, chosen weights streamed through a TMA ring.

One warp fills the ring, four multiply. Experts that every token gets need no routing: they come first, so that the
rings fill with them while the kernels before still run. What several tokens chose is read for each of them, side by
side, so from the second-level cache but for the first time; tiles of tokens would wait for the pairs to be sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.layout import cdiv
from codegen.kernels.sm_90.boxes import in_boxes, matrix_of
from codegen.kernels.sm_90.rings import advance, make_barriers
from codegen.kernels.swiglu import limited

ROWS = 8  # of a weight, in a tile: few, so that all multiprocessors get about as many
COLUMNS = 512  # of a weight, in a step
RING_BYTES = 48 * 1024
PROGRAMS = 2  # per multiprocessor: while one adds up, the other reads


@gluon.jit
def _choice(order, TOP_K: gl.constexpr, ALWAYS: gl.constexpr):
    """The column of a routing's indices that comes at this place of the order: the last ALWAYS ones come first."""
    return gl.where(order < ALWAYS, TOP_K - ALWAYS + order, order - ALWAYS)


@gluon.jit
def _token_of(item, tokens, ONE: gl.constexpr):
    """What an item is of, and for which token: items for all tokens follow each other."""
    if ONE:
        return item, 0
    else:
        return item // tokens, item % tokens


@gluon.jit
def _stream_row_tile(
    descs,
    row,
    smem,
    full,
    empty,
    slot,
    phase,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The steps of the tile of rows that begins at `row`, side by side of every matrix; returns slot and phase."""
    PARTS: gl.constexpr = len(descs)
    COLUMNS: gl.constexpr = descs[0].block_type.shape[1]
    for step in range(STEPS):
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), PARTS * descs[0].block_type.nbytes)
        for part in gl.static_range(PARTS):
            tma.async_copy_global_to_shared(
                descs[part], [row, step * COLUMNS], full.index(slot), smem.index(slot * PARTS + part)
            )
        slot, phase = advance(slot, phase, STAGES)
    return slot, phase


@gluon.jit
def _load_gate_up(
    gate_desc,
    up_desc,
    indices_ptr,
    tokens,
    smem,
    full,
    empty,
    ONE: gl.constexpr,
    TOP_K: gl.constexpr,
    ALWAYS: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERT_ROWS: gl.constexpr,
    WIDTH: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    ROWS: gl.constexpr = gate_desc.block_type.shape[0]
    TILES: gl.constexpr = (WIDTH + ROWS - 1) // ROWS
    programs = gl.num_programs(0)
    slot = 0
    phase = 1
    item = gl.program_id(0)
    while item < ALWAYS * TILES * tokens:
        tile, _ = _token_of(item, tokens, ONE)
        row = (EXPERTS - ALWAYS + tile // TILES) * EXPERT_ROWS + tile % TILES * ROWS
        slot, phase = _stream_row_tile((gate_desc, up_desc), row, smem, full, empty, slot, phase, STEPS, STAGES)
        item += programs
    gdc_wait()
    while item < TOP_K * TILES * tokens:
        tile, token = _token_of(item, tokens, ONE)
        expert = gl.load(indices_ptr + token * TOP_K + _choice(tile // TILES, TOP_K, ALWAYS)).to(gl.int32)
        row = expert * EXPERT_ROWS + tile % TILES * ROWS
        slot, phase = _stream_row_tile((gate_desc, up_desc), row, smem, full, empty, slot, phase, STEPS, STAGES)
        item += programs


@gluon.jit
def _multiply_gate_up(
    x_ptr,
    hidden_ptr,
    tokens,
    smem,
    full,
    empty,
    ONE: gl.constexpr,
    TOP_K: gl.constexpr,
    ALWAYS: gl.constexpr,
    LIMIT: gl.constexpr,
    DEPTH: gl.constexpr,
    WIDTH: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    TILES: gl.constexpr = (WIDTH + ROWS - 1) // ROWS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    slot = 0
    phase = 0
    gdc_wait()
    for item in range(gl.program_id(0), TOP_K * TILES * tokens, gl.num_programs(0)):
        tile, token = _token_of(item, tokens, ONE)
        gate = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
        up = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
        for step in range(STEPS):
            place = step * COLUMNS + column
            x = gl.load(x_ptr + token * DEPTH + place, mask=place < DEPTH, other=0.0).to(gl.float32)
            mbarrier.wait(full.index(slot), phase)
            one = smem.index(slot * 2).load(layout)
            other = smem.index(slot * 2 + 1).load(layout)
            mbarrier.arrive(empty.index(slot))
            gate += one.to(gl.float32) * x[None, :]
            up += other.to(gl.float32) * x[None, :]
            slot, phase = advance(slot, phase, STAGES)
        gates, ups = limited(gl.sum(gate, 1), gl.sum(up, 1), LIMIT)
        hidden = gates / (1.0 + gl.exp(-gates)) * ups
        output = tile % TILES * ROWS + row
        out_ptr = hidden_ptr + (token * TOP_K + _choice(tile // TILES, TOP_K, ALWAYS)) * WIDTH
        gl.store(out_ptr + output, hidden.to(hidden_ptr.dtype.element_ty), mask=output < WIDTH)


@gluon.jit
def stream_gate_up_kernel(
    gate_desc,
    up_desc,
    x_ptr,
    indices_ptr,
    hidden_ptr,
    tokens,
    ONE: gl.constexpr,
    TOP_K: gl.constexpr,
    ALWAYS: gl.constexpr,
    LIMIT: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERT_ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    WIDTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Every program takes tiles of ROWS gate rows and their up rows, for one pair after the other."""
    ROWS: gl.constexpr = gate_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = gate_desc.block_type.shape[1]
    STEPS: gl.constexpr = (DEPTH + COLUMNS - 1) // COLUMNS
    smem = gl.allocate_shared_memory(gate_desc.dtype, [STAGES * 2, ROWS, COLUMNS], gate_desc.layout)
    full, empty = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_multiply_gate_up, (
                x_ptr, hidden_ptr, tokens, smem, full, empty,
                ONE, TOP_K, ALWAYS, LIMIT, DEPTH, WIDTH, ROWS, COLUMNS, STEPS, STAGES,
            )),
            (_load_gate_up, (
                gate_desc, up_desc, indices_ptr, tokens, smem, full, empty,
                ONE, TOP_K, ALWAYS, EXPERTS, EXPERT_ROWS, WIDTH, STEPS, STAGES,
            )),
        ],
        [1],
        [40],
    )  # fmt: skip


@gluon.jit
def _load_down(
    weight_desc,
    indices_ptr,
    tokens,
    smem,
    full,
    empty,
    ONE: gl.constexpr,
    TOP_K: gl.constexpr,
    ALWAYS: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERT_ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    ROWS: gl.constexpr = weight_desc.block_type.shape[0]
    TILES: gl.constexpr = (DEPTH + ROWS - 1) // ROWS
    slot = 0
    phase = 1
    for item in range(gl.program_id(0), TILES * tokens, gl.num_programs(0)):
        tile, token = _token_of(item, tokens, ONE)
        for order in range(ALWAYS):
            row = (EXPERTS - ALWAYS + order) * EXPERT_ROWS + tile * ROWS
            slot, phase = _stream_row_tile((weight_desc,), row, smem, full, empty, slot, phase, STEPS, STAGES)
        gdc_wait()
        for order in range(ALWAYS, TOP_K):
            expert = gl.load(indices_ptr + token * TOP_K + _choice(order, TOP_K, ALWAYS)).to(gl.int32)
            row = expert * EXPERT_ROWS + tile * ROWS
            slot, phase = _stream_row_tile((weight_desc,), row, smem, full, empty, slot, phase, STEPS, STAGES)


@gluon.jit
def _multiply_down(
    hidden_ptr,
    weights_ptr,
    residual_ptr,
    out_ptr,
    tokens,
    smem,
    full,
    empty,
    ONE: gl.constexpr,
    TOP_K: gl.constexpr,
    ALWAYS: gl.constexpr,
    DEPTH: gl.constexpr,
    WIDTH: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    ADD: gl.constexpr,
):
    TILES: gl.constexpr = (DEPTH + ROWS - 1) // ROWS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    slot = 0
    phase = 0
    gdc_wait()
    for item in range(gl.program_id(0), TILES * tokens, gl.num_programs(0)):
        tile, token = _token_of(item, tokens, ONE)
        total = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
        for order in range(TOP_K):
            pair = token * TOP_K + _choice(order, TOP_K, ALWAYS)
            pair_weight = gl.load(weights_ptr + pair)
            for step in range(STEPS):
                place = step * COLUMNS + column
                hidden = gl.load(hidden_ptr + pair * WIDTH + place, mask=place < WIDTH, other=0.0).to(gl.float32)
                mbarrier.wait(full.index(slot), phase)
                weight = smem.index(slot).load(layout)
                mbarrier.arrive(empty.index(slot))
                total += weight.to(gl.float32) * (hidden * pair_weight)[None, :]
                slot, phase = advance(slot, phase, STAGES)
        out = gl.sum(total, 1)
        output = tile * ROWS + row
        if ADD:
            out += gl.load(residual_ptr + token * DEPTH + output, mask=output < DEPTH, other=0.0).to(gl.float32)
        gl.store(out_ptr + token * DEPTH + output, out.to(out_ptr.dtype.element_ty), mask=output < DEPTH)


@gluon.jit
def stream_down_kernel(
    weight_desc,
    hidden_ptr,
    indices_ptr,
    weights_ptr,
    residual_ptr,
    out_ptr,
    tokens,
    ONE: gl.constexpr,
    TOP_K: gl.constexpr,
    ALWAYS: gl.constexpr,
    EXPERTS: gl.constexpr,
    EXPERT_ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    WIDTH: gl.constexpr,
    STAGES: gl.constexpr,
    ADD: gl.constexpr,
):
    """The weighted sum over the experts is part of the reduction: nothing is left to combine."""
    ROWS: gl.constexpr = weight_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = weight_desc.block_type.shape[1]
    STEPS: gl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    smem = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, ROWS, COLUMNS], weight_desc.layout)
    full, empty = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_multiply_down, (
                hidden_ptr, weights_ptr, residual_ptr, out_ptr, tokens, smem, full, empty,
                ONE, TOP_K, ALWAYS, DEPTH, WIDTH, ROWS, COLUMNS, STEPS, STAGES, ADD,
            )),
            (_load_down, (
                weight_desc, indices_ptr, tokens, smem, full, empty,
                ONE, TOP_K, ALWAYS, EXPERTS, EXPERT_ROWS, DEPTH, STEPS, STAGES,
            )),
        ],
        [1],
        [40],
    )  # fmt: skip


def _row_tiles(weight: Tensor) -> TensorDescriptor:
    """The stacked weights [E, O, D] as one matrix, in tiles of rows."""
    return in_boxes(matrix_of(weight)[0], ROWS, COLUMNS)


def streamed_swiglu(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    residual: Tensor | None = None,
    always: int = 0,
    limit: float | None = None,
) -> Tensor:
    """x [N, D], indices and weights [N, K], gate and up [E, I, D], down [E, D, I] → [N, D], plus residual [N, D].

    The last `always` indices are the last experts of the stacks.
    """
    (tokens, top_k), experts = indices.shape, gate.shape[0]
    depth, width = down.shape[1:]
    hidden = torch.empty((tokens * top_k, width), dtype=x.dtype, device=x.device)
    out = torch.empty((tokens, depth), dtype=x.dtype, device=x.device)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    step_bytes = ROWS * COLUMNS * x.element_size()
    stream_gate_up_kernel[(min(PROGRAMS * processors, tokens * top_k * cdiv(width, ROWS)),)](
        _row_tiles(gate),
        _row_tiles(up),
        x,
        indices,
        hidden,
        tokens,
        ONE=tokens == 1,
        TOP_K=top_k,
        ALWAYS=always,
        LIMIT=limit,
        EXPERTS=experts,
        EXPERT_ROWS=matrix_of(gate)[1],
        DEPTH=depth,
        WIDTH=width,
        STAGES=RING_BYTES // (2 * step_bytes),
        num_warps=4,
        maxnreg=96,
        launch_pdl=True,
    )
    stream_down_kernel[(min(PROGRAMS * processors, tokens * cdiv(depth, ROWS)),)](
        _row_tiles(down),
        hidden,
        indices,
        weights,
        out if residual is None else residual,
        out,
        tokens,
        ONE=tokens == 1,
        TOP_K=top_k,
        ALWAYS=always,
        EXPERTS=experts,
        EXPERT_ROWS=matrix_of(down)[1],
        DEPTH=depth,
        WIDTH=width,
        STAGES=RING_BYTES // step_bytes,
        ADD=residual is not None,
        num_warps=4,
        maxnreg=96,
        launch_pdl=True,
    )
    return out
