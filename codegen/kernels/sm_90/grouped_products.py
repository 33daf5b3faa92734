"""The two grouped products of an expert layer on Hopper: TMA ring, one loading warp, wgmma on the others.

Weights stand on the wide side of the product and tokens on the narrow one, so that a tile of eight tokens wastes
nothing: a decode step is limited by reading weights, each of which passes through shared memory once. For more tokens
per expert than a tile has, there is prefill_products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.sm_90.boxes import in_boxes, matrix_of
from codegen.kernels.sm_90.plan_experts import ExpertPlan
from codegen.kernels.sm_90.rings import advance, make_barriers


@dataclass(frozen=True)
class Tile:
    """Up to `rows` tokens times `outputs` rows of a weight: `depth` columns per step, `stages` steps in flight."""

    rows: int
    outputs: int
    depth: int
    stages: int


@gluon.jit
def _load(
    descs,
    x_desc,
    tiles_ptr,
    max_tiles,
    steps,
    weights_smem,
    x_smem,
    full,
    empty,
    EXPERT_ROWS: gl.constexpr,
    OUTPUT_TILES: gl.constexpr,
    BLOCK_O: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The loading warp: it never waits for an item to end, so reading goes on across items."""
    PARTS: gl.constexpr = len(descs)
    STEP_BYTES: gl.constexpr = PARTS * descs[0].block_type.nbytes + x_desc.block_type.nbytes
    items = gl.load(tiles_ptr + 3 * max_tiles) * OUTPUT_TILES
    first = gl.program_id(0)
    # Weights do not depend on the kernel before: the first ring of them is under way while it still drains.
    ahead = gl.where(first < items, gl.minimum(steps, STAGES), 0)
    tile = gl.minimum(first, items - 1) // OUTPUT_TILES
    weight_row = gl.load(tiles_ptr + tile) * EXPERT_ROWS + (first % OUTPUT_TILES) * BLOCK_O
    for slot in range(ahead):
        mbarrier.expect(full.index(slot), STEP_BYTES)
        for part in gl.static_range(PARTS):
            tma.async_copy_global_to_shared(
                descs[part],
                [weight_row, slot * BLOCK_D],
                full.index(slot),
                weights_smem.index(slot * PARTS + part),
            )
    gdc_wait()
    count = 0
    slot = 0
    phase = 1
    for item in range(first, items, gl.num_programs(0)):
        tile = item // OUTPUT_TILES
        row = gl.load(tiles_ptr + max_tiles + tile)
        weight_row = gl.load(tiles_ptr + tile) * EXPERT_ROWS + (item % OUTPUT_TILES) * BLOCK_O
        for step in range(steps):
            mbarrier.wait(empty.index(slot), phase)
            fresh = count >= ahead
            mbarrier.expect(full.index(slot), STEP_BYTES, pred=fresh)
            for part in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(
                    descs[part],
                    [weight_row, step * BLOCK_D],
                    full.index(slot),
                    weights_smem.index(slot * PARTS + part),
                    pred=fresh,
                )
            tma.async_copy_global_to_shared(x_desc, [row, step * BLOCK_D], full.index(slot), x_smem.index(slot))
            count += 1
            slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _accumulate(
    weights_smem,
    x_smem,
    full,
    empty,
    slot,
    phase,
    steps,
    PARTS: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_O: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One item's products: per part of the weight a [BLOCK_O, ROWS] sum."""
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, ROWS, 16])
    first = gl.zeros((BLOCK_O, ROWS), gl.float32, products)
    second = gl.zeros((BLOCK_O, ROWS), gl.float32, products)
    for step in range(steps):
        mbarrier.wait(full.index(slot), phase)
        tokens = x_smem.index(slot).permute((1, 0))
        first = warpgroup_mma(weights_smem.index(slot * PARTS), tokens, first, is_async=True)
        if PARTS == 2:
            second = warpgroup_mma(weights_smem.index(slot * PARTS + 1), tokens, second, is_async=True)
        # One step stays in flight; the step before it has been read.
        first, second = _settle(first, second, PARTS, PARTS)
        mbarrier.arrive(empty.index(gl.where(slot == 0, STAGES - 1, slot - 1)), pred=step > 0)
        slot, phase = advance(slot, phase, STAGES)
    first, second = _settle(first, second, 0, PARTS)
    mbarrier.arrive(empty.index(gl.where(slot == 0, STAGES - 1, slot - 1)))
    return first, second, slot, phase


@gluon.jit
def _settle(first, second, LEFT: gl.constexpr, PARTS: gl.constexpr):
    """Wait until at most LEFT products are in flight."""
    if PARTS == 2:
        first, second = warpgroup_mma_wait(LEFT, deps=(first, second))
    else:
        first = warpgroup_mma_wait(LEFT, deps=(first,))
    return first, second


@gluon.jit
def _finish(first, second, begin, end, output_begin, out_ptr, order_ptr, pair_weights_ptr, width, SWIGLU: gl.constexpr):
    """What the product ends with: SwiGLU in sorted order, or the pair's weight, scattered back to pair order."""
    ROWS: gl.constexpr = first.shape[1]
    # Eight neighbouring outputs of one token per thread: 16-byte stores.
    stored: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, gl.num_warps()], [0, 1])
    row = begin + gl.arange(0, ROWS, gl.SliceLayout(0, stored))
    output = output_begin + gl.arange(0, first.shape[0], gl.SliceLayout(1, stored))
    if SWIGLU:
        result = first / (1.0 + gl.exp(-first)) * second
        out_row = row.to(gl.int64)
    else:
        weighed = begin + gl.arange(0, ROWS, gl.SliceLayout(0, first.type.layout))
        weight = gl.load(pair_weights_ptr + gl.load(order_ptr + weighed, mask=weighed < end, other=0))
        result = first * weight[None, :]
        out_row = gl.load(order_ptr + row, mask=row < end, other=0).to(gl.int64)
    values = gl.convert_layout(result.to(out_ptr.dtype.element_ty), stored)
    written = (output < width)[:, None] & (row < end)[None, :]
    gl.store(out_ptr + out_row[None, :] * width + output[:, None], values, mask=written)


@gluon.jit
def _multiply(
    out_ptr,
    order_ptr,
    pair_weights_ptr,
    tiles_ptr,
    max_tiles,
    steps,
    width,
    weights_smem,
    x_smem,
    full,
    empty,
    OUTPUT_TILES: gl.constexpr,
    PARTS: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_O: gl.constexpr,
    STAGES: gl.constexpr,
    SWIGLU: gl.constexpr,
):
    """The multiplying warps."""
    items = gl.load(tiles_ptr + 3 * max_tiles) * OUTPUT_TILES
    slot = 0
    phase = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = item // OUTPUT_TILES
        begin = gl.load(tiles_ptr + max_tiles + tile)
        end = gl.load(tiles_ptr + 2 * max_tiles + tile)
        output = (item % OUTPUT_TILES) * BLOCK_O
        first, second, slot, phase = _accumulate(
            weights_smem, x_smem, full, empty, slot, phase, steps, PARTS, ROWS, BLOCK_O, STAGES
        )
        _finish(first, second, begin, end, output, out_ptr, order_ptr, pair_weights_ptr, width, SWIGLU)


@gluon.jit
def product_kernel(
    first_desc,
    second_desc,
    x_desc,
    out_ptr,
    order_ptr,
    pair_weights_ptr,
    tiles_ptr,
    max_tiles,
    steps,
    width,
    EXPERT_ROWS: gl.constexpr,
    OUTPUT_TILES: gl.constexpr,
    PARTS: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_O: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    SWIGLU: gl.constexpr,
    AFTER_PLAN: gl.constexpr,
):
    dtype: gl.constexpr = first_desc.dtype
    weights_smem = gl.allocate_shared_memory(dtype, [STAGES * PARTS, BLOCK_O, BLOCK_D], first_desc.layout)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_D], x_desc.layout)
    descs = (first_desc, second_desc) if PARTS == 2 else (first_desc,)
    full, empty = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    if AFTER_PLAN:
        # The plan itself is the predecessor's output; after this the successor may rely on it.
        gdc_wait()
    gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_multiply, (
                out_ptr, order_ptr, pair_weights_ptr, tiles_ptr, max_tiles, steps, width,
                weights_smem, x_smem, full, empty, OUTPUT_TILES, PARTS, ROWS, BLOCK_O, STAGES, SWIGLU,
            )),
            (_load, (
                descs, x_desc, tiles_ptr, max_tiles, steps, weights_smem, x_smem, full, empty,
                EXPERT_ROWS, OUTPUT_TILES, BLOCK_O, BLOCK_D, STAGES,
            )),
        ],
        [1],
        [40],
    )  # fmt: skip


def grouped_product(
    x: Tensor, stacks: tuple[Tensor, ...], plan: ExpertPlan, tile: Tile, pair_weights: Tensor | None
) -> Tensor:
    """One grouped product over the tiles of `plan`, made for tile.rows.

    With two stacks, gates and ups: x [M, D] sorted, [E, I, D] each → swiglu of the products [M, I], sorted.
    With one and pair weights [M] fp32 in pair order: x [M, D] sorted, [E, O, D] → [M, O] in pair order, weighted.
    """
    _, width, depth = stacks[0].shape
    _, expert_rows = matrix_of(stacks[0])
    first, *others = (in_boxes(matrix_of(stack)[0], tile.outputs, tile.depth) for stack in stacks)
    swiglu = pair_weights is None
    out = torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    output_tiles = triton.cdiv(width, tile.outputs)
    programs = min(processors, plan.tiles.shape[1] * output_tiles)
    product_kernel[(programs,)](
        first,
        others[0] if swiglu else first,
        in_boxes(x, tile.rows, tile.depth),
        out,
        plan.order,
        out if pair_weights is None else pair_weights,
        plan.tiles,
        plan.tiles.shape[1],
        triton.cdiv(depth, tile.depth),
        width,
        EXPERT_ROWS=expert_rows,
        OUTPUT_TILES=output_tiles,
        PARTS=len(stacks),
        ROWS=tile.rows,
        BLOCK_O=tile.outputs,
        BLOCK_D=tile.depth,
        STAGES=tile.stages,
        SWIGLU=swiglu,
        AFTER_PLAN=swiglu,
        num_warps=4,
        launch_pdl=True,
    )
    return out
