"""The two grouped products of an expert layer on Hopper, for many tokens: three warp groups multiply, one warp loads.

    group 0, 1, 2   64 tokens times 2 · 128 weight rows each
    loading warp    two boxes of 128 weight rows and up to three of 64 tokens per step

192 tokens times 256 weight rows are the largest tile whose sums fit into registers, and so read the least. Then the
matrix units are the limit, nearly always busy, at a clock that the chip lowers for its power: fetching each box of
tokens once for two multiprocessors (multicast) was tried and gained nothing. Tokens stand on the M side, so that a tile
of fewer wastes no product, and the groups go their own ways: one's ending runs under the others' products.
"""

from __future__ import annotations

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.sm_90.plan_experts import ExpertPlan

GROUP_ROWS = 64  # of one wgmma
TILE_ROWS = 3 * GROUP_ROWS
BLOCK_D = 64
STAGES = 4


@gluon.jit
def _load_weights(desc, row, column, full, smem, slot, fresh, APART: gl.constexpr):
    """The two boxes of a step, whose first rows are APART from each other."""
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(
            desc, [row + half * APART, column], full.index(slot), smem.index(slot * 2 + half), pred=fresh
        )


@gluon.jit
def _expect(barrier, groups, fresh, WEIGHT_BYTES: gl.constexpr, X_BYTES: gl.constexpr):
    """The bytes of a step whose tokens fill this many groups."""
    for used in gl.static_range(1, 4):
        mbarrier.expect(barrier, WEIGHT_BYTES + used * X_BYTES, pred=fresh & (groups == used))


@gluon.jit
def _load(
    weight_desc,
    x_desc,
    tokens_desc,
    tiles_ptr,
    max_tiles,
    steps,
    gathered,
    tokens,
    weights_smem,
    x_smem,
    full,
    empty,
    EXPERT_ROWS: gl.constexpr,
    OUTPUT_TILES: gl.constexpr,
    OUTPUTS: gl.constexpr,
    APART: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    SWIGLU: gl.constexpr,
):
    """The loading warp: it never waits for an item to end, so reading goes on across items.

    Rows behind the gathered ones are the tokens themselves, over and over.
    """
    WEIGHT_BYTES: gl.constexpr = 2 * weight_desc.block_type.nbytes
    X_BYTES: gl.constexpr = x_desc.block_type.nbytes
    items = gl.load(tiles_ptr + 3 * max_tiles) * OUTPUT_TILES
    first = gl.program_id(0)
    # Weights do not depend on the kernel before: the first ring of them is under way while it still drains.
    ahead = gl.where(first < items, gl.minimum(steps, STAGES), 0)
    tile = gl.minimum(first, items - 1) // OUTPUT_TILES
    weight_row = gl.load(tiles_ptr + tile) * EXPERT_ROWS + (first % OUTPUT_TILES) * OUTPUTS
    groups = (gl.load(tiles_ptr + 2 * max_tiles + tile) - gl.load(tiles_ptr + max_tiles + tile) + 63) // 64
    for slot in range(ahead):
        _expect(full.index(slot), groups, True, WEIGHT_BYTES, X_BYTES)
        _load_weights(weight_desc, weight_row, slot * BLOCK_D, full, weights_smem, slot, True, APART)
    gdc_wait()
    count = 0
    slot = 0
    phase = 1
    for item in range(first, items, gl.num_programs(0)):
        tile = item // OUTPUT_TILES
        row = gl.load(tiles_ptr + max_tiles + tile)
        groups = (gl.load(tiles_ptr + 2 * max_tiles + tile) - row + 63) // 64
        weight_row = gl.load(tiles_ptr + tile) * EXPERT_ROWS + (item % OUTPUT_TILES) * OUTPUTS
        copied = row < gathered
        if not copied:
            row = (row - gathered) % tokens
        for step in range(steps):
            column = step * BLOCK_D
            mbarrier.wait(empty.index(slot), phase)
            fresh = count >= ahead
            _expect(full.index(slot), groups, fresh, WEIGHT_BYTES, X_BYTES)
            _load_weights(weight_desc, weight_row, column, full, weights_smem, slot, fresh, APART)
            for group in gl.static_range(3):
                box = x_smem.index(slot * 3 + group)
                used = group < groups
                if SWIGLU:
                    tma.async_copy_global_to_shared(
                        tokens_desc, [row + group * 64, column], full.index(slot), box, pred=used & (not copied)
                    )
                    used = used & copied
                tma.async_copy_global_to_shared(x_desc, [row + group * 64, column], full.index(slot), box, pred=used)
            count += 1
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


@gluon.jit
def _accumulate(weights_smem, x_smem, full, empty, slot, phase, steps, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """One item's products of a group: two sums of [64 tokens, 128 weight rows].

    One of 256 would read the tokens once, but wants more registers than a thread has where a program starts.
    """
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    first = gl.zeros((64, 128), gl.float32, products)
    second = gl.zeros((64, 128), gl.float32, products)
    for step in range(steps):
        mbarrier.wait(full.index(slot), phase)
        tokens = x_smem.index(slot * 3 + GROUP)
        weights = weights_smem.index(slot * 2).permute((1, 0))
        first = warpgroup_mma(tokens, weights, first, use_acc=step > 0, is_async=True)
        weights = weights_smem.index(slot * 2 + 1).permute((1, 0))
        second = warpgroup_mma(tokens, weights, second, use_acc=step > 0, is_async=True)
        # One step stays in flight; the step before it has been read.
        first, second = warpgroup_mma_wait(2, deps=(first, second))
        mbarrier.arrive(empty.index(gl.where(slot == 0, STAGES - 1, slot - 1)), pred=step > 0)
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1
    first, second = warpgroup_mma_wait(0, deps=(first, second))
    mbarrier.arrive(empty.index(gl.where(slot == 0, STAGES - 1, slot - 1)))
    return first, second, slot, phase


@gluon.jit
def _store(values, out_ptr, out_row, inside, column, width):
    """values [64, 128] → the first of `column` and its 127 neighbours of each row that is inside.

    Neighbouring lanes trade columns, so that a row's four write 32 bytes together and no shared memory is needed.
    """
    stored: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64]],
        lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 128],
    )
    rows: gl.constexpr = gl.SliceLayout(1, stored)
    output = column + gl.arange(0, 128, gl.SliceLayout(0, stored))
    written = gl.convert_layout(inside, rows)[:, None] & (output < width)[None, :]
    first = gl.convert_layout(out_row, rows).to(gl.int64) * width
    values = gl.convert_layout(values.to(out_ptr.dtype.element_ty), stored)
    gl.store(out_ptr + first[:, None] + output[None, :], values, mask=written)


@gluon.jit
def _finish(first, second, begin, end, column, out_ptr, order_ptr, pair_weights_ptr, width, SWIGLU: gl.constexpr):
    """What the product ends with: SwiGLU in sorted order, or the pair's weight, scattered back to pair order."""
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    row = begin + gl.arange(0, 64, gl.SliceLayout(1, products))
    if SWIGLU:
        _store(first / (1.0 + gl.exp(-first)) * second, out_ptr, row, row < end, column, width)
    else:
        pair = gl.load(order_ptr + row, mask=row < end, other=0)
        weight = gl.load(pair_weights_ptr + pair)
        _store(first * weight[:, None], out_ptr, pair, row < end, column, width)
        _store(second * weight[:, None], out_ptr, pair, row < end, column + 128, width)


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
    GROUP: gl.constexpr,
    OUTPUT_TILES: gl.constexpr,
    OUTPUTS: gl.constexpr,
    STAGES: gl.constexpr,
    SWIGLU: gl.constexpr,
):
    """A multiplying group: the GROUP-th 64 tokens of every tile."""
    items = gl.load(tiles_ptr + 3 * max_tiles) * OUTPUT_TILES
    slot = 0
    phase = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = item // OUTPUT_TILES
        begin = gl.load(tiles_ptr + max_tiles + tile) + GROUP * 64
        end = gl.load(tiles_ptr + 2 * max_tiles + tile)
        if begin < end:
            first, second, slot, phase = _accumulate(
                weights_smem, x_smem, full, empty, slot, phase, steps, GROUP, STAGES
            )
            column = (item % OUTPUT_TILES) * OUTPUTS
            _finish(first, second, begin, end, column, out_ptr, order_ptr, pair_weights_ptr, width, SWIGLU)
        else:
            # Without tokens it still follows the ring: a barrier tells one lap from the next, not from the one after.
            for _ in range(steps):
                mbarrier.wait(full.index(slot), phase)
                mbarrier.arrive(empty.index(slot))
                slot += 1
                if slot == STAGES:
                    slot = 0
                    phase ^= 1


@gluon.jit
def prefill_product_kernel(
    weight_desc,
    x_desc,
    tokens_desc,
    out_ptr,
    order_ptr,
    pair_weights_ptr,
    tiles_ptr,
    max_tiles,
    steps,
    eighths,
    gathered,
    tokens,
    EXPERT_ROWS: gl.constexpr,
    OUTPUT_TILES: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    SWIGLU: gl.constexpr,
    AFTER_PLAN: gl.constexpr,
):
    dtype: gl.constexpr = weight_desc.dtype
    # Of gate and up the same 128 rows, or 256 rows.
    OUTPUTS: gl.constexpr = 128 if SWIGLU else 256
    APART: gl.constexpr = EXPERT_ROWS // 2 if SWIGLU else 128
    weights_smem = gl.allocate_shared_memory(dtype, [STAGES * 2, 128, BLOCK_D], weight_desc.layout)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES * 3, 64, BLOCK_D], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=3)
    width = eighths * 8  # so that the compiler knows that 16 bytes are aligned
    if AFTER_PLAN:
        # The plan itself is the predecessor's output; after this the successor may rely on it.
        gdc_wait()
    gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_multiply, (
                out_ptr, order_ptr, pair_weights_ptr, tiles_ptr, max_tiles, steps, width,
                weights_smem, x_smem, full, empty, 0, OUTPUT_TILES, OUTPUTS, STAGES, SWIGLU,
            )),
            (_multiply, (
                out_ptr, order_ptr, pair_weights_ptr, tiles_ptr, max_tiles, steps, width,
                weights_smem, x_smem, full, empty, 1, OUTPUT_TILES, OUTPUTS, STAGES, SWIGLU,
            )),
            (_multiply, (
                out_ptr, order_ptr, pair_weights_ptr, tiles_ptr, max_tiles, steps, width,
                weights_smem, x_smem, full, empty, 2, OUTPUT_TILES, OUTPUTS, STAGES, SWIGLU,
            )),
            (_load, (
                weight_desc, x_desc, tokens_desc, tiles_ptr, max_tiles, steps, gathered, tokens,
                weights_smem, x_smem, full, empty, EXPERT_ROWS, OUTPUT_TILES, OUTPUTS, APART, BLOCK_D, STAGES, SWIGLU,
            )),
        ],
        [4, 4, 1],
        [160, 160, 32],
    )  # fmt: skip


def prefill_product(x: Tensor, weight: Tensor, plan: ExpertPlan, pair_weights: Tensor | None) -> Tensor:
    """One grouped product over the tiles of `plan`, made for TILE_ROWS in units of GROUP_ROWS, of M pairs.

    Without pair weights: x is plan.gathered, weight [E, 2I, D] → swiglu of the products [M, I], sorted.
    With pair weights [M] fp32 in pair order: x [M, D] sorted, weight [E, O, D] → [M, O] in pair order, weighted.
    """
    experts, expert_rows, depth = weight.shape
    swiglu = pair_weights is None
    width = expert_rows // 2 if swiglu else expert_rows
    weight_box, x_box = [128, BLOCK_D], [GROUP_ROWS, BLOCK_D]
    dtype = getattr(gl, str(x.dtype).removeprefix("torch."))
    x_layout = gl.NVMMASharedLayout.get_default_for(x_box, dtype)
    tokens = plan.tokens if swiglu else x
    out = torch.empty((plan.order.shape[0], width), dtype=x.dtype, device=x.device)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    output_tiles = triton.cdiv(width, 128 if swiglu else 256)
    prefill_product_kernel[(min(processors, plan.tiles.shape[1] * output_tiles),)](
        TensorDescriptor.from_tensor(
            weight.view(experts * expert_rows, depth),
            weight_box,
            gl.NVMMASharedLayout.get_default_for(weight_box, dtype),
        ),
        TensorDescriptor.from_tensor(x, x_box, x_layout),
        TensorDescriptor.from_tensor(tokens, x_box, x_layout),
        out,
        plan.order,
        out if pair_weights is None else pair_weights,
        plan.tiles,
        plan.tiles.shape[1],
        triton.cdiv(depth, BLOCK_D),
        width // 8,
        x.shape[0],
        tokens.shape[0],
        EXPERT_ROWS=expert_rows,
        OUTPUT_TILES=output_tiles,
        BLOCK_D=BLOCK_D,
        STAGES=STAGES,
        SWIGLU=swiglu,
        AFTER_PLAN=swiglu,
        num_warps=4,
        maxnreg=128,
        launch_pdl=True,
    )
    return out
