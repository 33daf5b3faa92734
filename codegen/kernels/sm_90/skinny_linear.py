"""A product with few rows on Hopper: every weight passes through shared memory once, through a TMA ring.

wgmma wants 64 weight rows at a time, too many to occupy the chip where the weight has few. So a tile may be 64/SLICES
weight rows, each cut into SLICES parts along the reduction; the tokens are cut the same way, and of the product of
all parts with all parts the matching ones are summed. Products cost nothing here; reading does.
"""

from __future__ import annotations

import torch
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

from codegen.kernels.layout import cdiv, next_power_of_2
from codegen.kernels.sm_90.boxes import described, starts_aligned
from codegen.kernels.sm_90.rings import advance, make_barriers

BLOCK_D = 64
MOST_ROWS = 64
RING_BYTES = 100 * 1024  # two programs share a multiprocessor
PROGRAMS = 2  # per multiprocessor


@gluon.jit
def _load_tile(weight_desc, second_desc, first_items, item, step, full, slot, smem, fresh, OUTPUTS: gl.constexpr,
               BLOCK_D: gl.constexpr, PAIR: gl.constexpr):  # fmt: skip
    """A step of a tile of rows: of the first weight, or of the second one behind it."""
    if PAIR:
        own = item < first_items
        tma.async_copy_global_to_shared(
            weight_desc, [item * OUTPUTS, 0, step * BLOCK_D], full.index(slot), smem.index(slot), pred=fresh & own
        )
        tma.async_copy_global_to_shared(
            second_desc, [(item - first_items) * OUTPUTS, 0, step * BLOCK_D], full.index(slot), smem.index(slot),
            pred=fresh & (item >= first_items),
        )  # fmt: skip
    else:
        tma.async_copy_global_to_shared(
            weight_desc, [item * OUTPUTS, 0, step * BLOCK_D], full.index(slot), smem.index(slot), pred=fresh
        )


@gluon.jit
def _load_slices(
    weight_desc,
    second_desc,
    x_desc,
    items,
    first_items,
    steps,
    weight_smem,
    x_smem,
    full,
    empty,
    OUTPUTS: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    STEP_BYTES: gl.constexpr,
    PAIR: gl.constexpr,
):
    first = gl.program_id(0)
    # Weights do not depend on the kernel before: the first ring of them is under way while it still drains.
    ahead = gl.where(first < items, gl.minimum(steps, STAGES), 0)
    for slot in range(ahead):
        mbarrier.expect(full.index(slot), STEP_BYTES)
        _load_tile(weight_desc, second_desc, first_items, first, slot, full, slot, weight_smem, True, OUTPUTS,
                   BLOCK_D, PAIR)  # fmt: skip
    gdc_wait()
    count = 0
    slot = 0
    phase = 1
    for item in range(first, items, gl.num_programs(0)):
        for step in range(steps):
            mbarrier.wait(empty.index(slot), phase)
            fresh = count >= ahead
            mbarrier.expect(full.index(slot), STEP_BYTES, pred=fresh)
            _load_tile(weight_desc, second_desc, first_items, item, step, full, slot, weight_smem, fresh, OUTPUTS,
                       BLOCK_D, PAIR)  # fmt: skip
            tma.async_copy_global_to_shared(x_desc, [0, 0, step * BLOCK_D], full.index(slot), x_smem.index(slot))
            count += 1
            slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _multiply_slices(
    out_ptr,
    residual_ptr,
    rows,
    depth,
    width,
    items,
    steps,
    weight_smem,
    x_smem,
    full,
    empty,
    SLICES: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    NORM: gl.constexpr,
    EPS: gl.constexpr,
    ADD: gl.constexpr,
):
    OUTPUTS: gl.constexpr = 64 // SLICES
    COLUMNS: gl.constexpr = ROWS * SLICES
    dtype: gl.constexpr = weight_smem.dtype
    weight_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLUMNS, BLOCK_D], dtype)
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    stored: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1])
    read: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    slot = 0
    phase = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        total = gl.zeros((64, COLUMNS), gl.float32, products)
        squares = gl.zeros((COLUMNS, BLOCK_D), gl.float32, read)
        for step in range(steps):
            mbarrier.wait(full.index(slot), phase)
            weight = weight_smem.index(slot)._reinterpret(dtype, [64, BLOCK_D], weight_layout)
            x = x_smem.index(slot)._reinterpret(dtype, [COLUMNS, BLOCK_D], x_layout)
            total = warpgroup_mma(weight, x.permute((1, 0)), total, is_async=True)
            if NORM:
                wide = x.load(read).to(gl.float32)
                squares += wide * wide
            # One step stays in flight; the step before it has been read.
            total = warpgroup_mma_wait(1, deps=(total,))
            mbarrier.arrive(empty.index(gl.where(slot == 0, STAGES - 1, slot - 1)), pred=step > 0)
            slot, phase = advance(slot, phase, STAGES)
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index(gl.where(slot == 0, STAGES - 1, slot - 1)))
        if SLICES > 1:
            part = gl.arange(0, 64, gl.SliceLayout(1, products)) % SLICES
            other = gl.arange(0, COLUMNS, gl.SliceLayout(0, products)) % SLICES
            matching = gl.where(part[:, None] == other[None, :], total, 0.0)
            by_column = gl.sum(gl.reshape(matching, (OUTPUTS, SLICES, COLUMNS)), 1)
            result = gl.sum(gl.reshape(by_column, (OUTPUTS, ROWS, SLICES)), 2)
        else:
            result = total
        values = gl.convert_layout(result, stored)
        output = item * OUTPUTS + gl.arange(0, OUTPUTS, gl.SliceLayout(1, stored))
        row = gl.arange(0, ROWS, gl.SliceLayout(0, stored))
        written = (output < width)[:, None] & (row < rows)[None, :]
        place = row[None, :] * width + output[:, None]
        if NORM:
            square = gl.sum(gl.reshape(gl.sum(squares, 1), (ROWS, SLICES)), 1)
            inverse = gl.rsqrt(square / depth + EPS)
            values *= gl.convert_layout(inverse, gl.SliceLayout(0, stored))[None, :]
        if ADD:
            values += gl.load(residual_ptr + place, mask=written, other=0.0).to(gl.float32)
        gl.store(out_ptr + place, values.to(out_ptr.dtype.element_ty), mask=written)


@gluon.jit
def skinny_linear_kernel(
    weight_desc,
    second_desc,
    x_desc,
    out_ptr,
    residual_ptr,
    rows,
    depth,
    width,
    items,
    first_items,
    steps,
    SLICES: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    NORM: gl.constexpr,
    EPS: gl.constexpr,
    ADD: gl.constexpr,
    PAIR: gl.constexpr,
):
    dtype: gl.constexpr = weight_desc.dtype
    OUTPUTS: gl.constexpr = 64 // SLICES
    weight_smem = gl.allocate_shared_memory(dtype, [STAGES, OUTPUTS, SLICES, BLOCK_D], weight_desc.layout)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES, ROWS, SLICES, BLOCK_D], x_desc.layout)
    full, empty = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    gdc_launch_dependents()
    STEP_BYTES: gl.constexpr = (64 + ROWS * SLICES) * BLOCK_D * (dtype.primitive_bitwidth // 8)
    gl.warp_specialize(
        [
            (_multiply_slices, (
                out_ptr, residual_ptr, rows, depth, width, items, steps, weight_smem, x_smem, full, empty,
                SLICES, ROWS, BLOCK_D, STAGES, NORM, EPS, ADD,
            )),
            (_load_slices, (
                weight_desc, second_desc, x_desc, items, first_items, steps, weight_smem, x_smem, full, empty,
                OUTPUTS, BLOCK_D, STAGES, STEP_BYTES, PAIR,
            )),
        ],
        [1],
        [40],
    )  # fmt: skip


def _boxes(x: Tensor, slices: int, *box: int) -> TensorDescriptor:
    """A descriptor of x [rows, D] as [rows, slices, D/slices], in boxes."""
    rows, depth = x.shape
    return described(x, (rows, slices, depth // slices), (x.stride(0), depth // slices, 1), box)


def slices_for(width: int, rows: int) -> int:
    """Enough tiles for the chip, and no more: every tile reads the tokens again."""
    if rows > 16:
        return 1
    return 2 if width >= 100 * 32 else 4 if width >= 50 * 16 else 8


def balanced_slices(width: int, depth: int, processors: int) -> int:
    """The slices with which the busiest multiprocessor has the fewest rows; the fewest of those."""

    def most_rows(slices: int) -> int:
        return cdiv(cdiv(width * slices, 64), processors) * (64 // slices)

    return min((slices for slices in (1, 2, 4, 8) if depth % (8 * slices) == 0), key=most_rows)


def why_not_skinny(x: Tensor, weight: Tensor) -> str | None:
    """None, or the reason why another product must be used."""
    if x.dtype not in (torch.bfloat16, torch.float16) or x.dtype != weight.dtype:
        return f"{x.dtype} times {weight.dtype}: tensor copies and products want one 16-bit float"
    if x.shape[0] == 0:
        return "no rows"
    if x.shape[0] > MOST_ROWS:
        return f"{x.shape[0]} rows; reading weights is not what limits a product of more than {MOST_ROWS}"
    if weight.shape[1] % (8 * slices_for(weight.shape[0], x.shape[0])):
        return f"rows of {weight.shape[1]} elements cannot be cut into parts of a multiple of 16 bytes"
    if not starts_aligned(weight):
        return "the weight does not start at a multiple of 16 bytes"
    return None


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    eps: float | None = None,
    residual: Tensor | None = None,
    slices: int | None = None,
    second: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """x [N, D], weight [O, D] → x · weightᵀ, [N, O] in the dtype of x, for N up to 64; accumulates in fp32, and stays
    there where `exact`. With a second weight [P, D] → [N, O+P], for O a multiple of 64.

    With eps the product is divided by sqrt(mean(x²) + eps): the product of an RMSNorm whose weight has been multiplied
    into `weight`. residual [N, O] is added last.
    """
    rows, depth = x.shape
    width = weight.shape[0] + (0 if second is None else second.shape[0])
    slices = slices or slices_for(width, rows)
    tile = max(8, next_power_of_2(rows))
    out = torch.empty((rows, width), dtype=torch.float32 if exact else x.dtype, device=x.device)
    items = cdiv(width, 64 // slices)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    skinny_linear_kernel[(min(items, PROGRAMS * processors),)](
        _boxes(weight, slices, 64 // slices, slices, BLOCK_D),
        _boxes(weight if second is None else second, slices, 64 // slices, slices, BLOCK_D),
        _boxes(x, slices, tile, slices, BLOCK_D),
        out,
        out if residual is None else residual,
        rows,
        depth,
        width,
        items,
        weight.shape[0] // (64 // slices),
        cdiv(depth // slices, BLOCK_D),
        SLICES=slices,
        ROWS=tile,
        BLOCK_D=BLOCK_D,
        STAGES=RING_BYTES // ((64 + tile * slices) * BLOCK_D * 2),
        NORM=eps is not None,
        EPS=eps or 0.0,
        ADD=residual is not None,
        PAIR=second is not None,
        num_warps=4,
        maxnreg=128,
        launch_pdl=True,
    )
    return out
