"""Both grouped products of an expert layer on Hopper, for many tokens, in one launch: three warp groups multiply, one
warp loads, one tells other programs what has been stored.

    group 0, 1, 2   64 tokens times two halves of 128 weight rows each
    loading warp    four boxes of 64 weight rows and up to three of 64 tokens per step
    signals         one per item of the wide product

192 tokens times 256 weight rows are the largest tile whose sums fit into registers, and so read the least. Then the
matrix units are the limit, at a clock that the chip lowers for its power: fetching each box of tokens once for two
multiprocessors (multicast) was tried and gained nothing. Tokens stand on the M side: groups without tokens multiply
nothing, and at most 63 rows of a tile are empty. On the N side hardly one would be. That was tried twice, with widths
that are powers of two, as gluon's tensors are, and with wgmma written out for every multiple of 16 (192 weight rows by
up to 224 tokens). The second was 3 % faster for 2048 tokens that choose all experts alike, and 4 to 10 % slower where
they prefer some, or are 8192.

Where an item ends, nothing waits that need not. Its halves of 128 weight rows, each with gate and up of the same
columns, end apart: SwiGLU and stores of the first are done under the last products of the second, those of the second
under the first products of the next item. The loading warp tells groups what an item is, pairs and their weights are
asked for before the products, and no group waits until what it stored can be seen elsewhere.

Programs take items as they get free, first those of the wide product (gate and up): shared experts', for which nothing
needs to be planned, while the plan of the others is still being made, then the others', expert by expert. Items of the
narrow product (down) fill what the wide ones leave uneven. Mixing shared experts' items evenly with the others', which
read more, was tried and is slower. An item of the narrow product waits until its tile has been through the wide one.
Whoever is waited for has been taken before, so by a program that runs: nobody waits for one that has not begun, and no
group keeps a wide item's second half for a narrow one that may have to wait.
"""

from __future__ import annotations

import torch
import triton.language as tl
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

from codegen.kernels.layout import cdiv
from codegen.kernels.sm_90.boxes import in_boxes, matrix_of
from codegen.kernels.sm_90.letters import hear, tell
from codegen.kernels.sm_90.plan_experts import ExpertPlan
from codegen.kernels.sm_90.rings import advance, await_signals, make_barriers, order_for_copies
from codegen.kernels.swiglu import limited

GROUP_ROWS = 64  # of one wgmma
TILE_ROWS = 3 * GROUP_ROWS
BLOCK_D = 64
STAGES = 4
MAIL = 2  # items that the loading warp is ahead by

NOTHING = gl.constexpr(0)  # kinds of items
WIDE = gl.constexpr(1)
NARROW = gl.constexpr(2)


@gluon.jit
def _tile_of(tiles_ptr, max_tiles, tile):
    """(expert, first row, end)"""
    at = tiles_ptr + tile
    return gl.load(at), gl.load(at + max_tiles), gl.load(at + 2 * max_tiles)


@gluon.jit
def _load_item(
    first_desc, second_desc, x_desc, ring, weight_row, row, groups, steps, slot, phase,
    BOX_APART: gl.constexpr, HALF_APART: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All steps of one item: two boxes of weights for each half, a box of tokens for each group."""
    weights_smem, x_smem, full, empty = ring
    WEIGHT_BYTES: gl.constexpr = 4 * first_desc.block_type.nbytes
    X_BYTES: gl.constexpr = x_desc.block_type.nbytes
    for step in range(steps):
        column = step * BLOCK_D
        mbarrier.wait(empty.index(slot), phase ^ 1)
        for used in gl.static_range(1, 4):
            mbarrier.expect(full.index(slot), WEIGHT_BYTES + used * X_BYTES, pred=groups == used)
        for half in gl.static_range(2):
            first_row = weight_row + half * HALF_APART
            both_smem = weights_smem.index(slot * 2 + half)
            tma.async_copy_global_to_shared(first_desc, [first_row, column], full.index(slot), both_smem.slice(0, 64))
            tma.async_copy_global_to_shared(
                second_desc, [first_row + BOX_APART, column], full.index(slot), both_smem.slice(64, 64)
            )
        for group in gl.static_range(3):
            tma.async_copy_global_to_shared(
                x_desc, [row + group * 64, column], full.index(slot), x_smem.index(slot * 3 + group),
                pred=group < groups,
            )  # fmt: skip
        slot, phase = advance(slot, phase, STAGES)
    return slot, phase


@gluon.jit
def _load(
    gate_desc, up_desc, gathered_desc, tokens_desc, down_desc, hidden_desc, tiles_ptr, max_tiles, early, gathered,
    tokens, depth_steps, inner_steps, ring, mail,
    EXPERT_ROWS: gl.constexpr, INNER: gl.constexpr, DOWN_ROWS: gl.constexpr, WIDTH: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, MAIL: gl.constexpr,
):  # fmt: skip
    """The loading warp: takes items, and never waits for one to end, so reading goes on across items.

    Rows behind the gathered ones are the tokens themselves, over and over. Their tiles come first: all that they need
    is there before the kernel starts, while other tokens are still being copied.
    """
    WIDE_TILES: gl.constexpr = (INNER + 127) // 128
    NARROW_TILES: gl.constexpr = (WIDTH + 255) // 256
    next_ptr = tiles_ptr + 3 * max_tiles + 1
    done_ptr = tiles_ptr + 4 * max_tiles
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    letter = gl.to_tensor(0)
    letter_phase = gl.to_tensor(0)
    if early == 0:
        gdc_wait()
    item = gl.atomic_add(next_ptr, 1, sem="relaxed", scope="gpu")
    while item < early * WIDE_TILES:
        tile = item // WIDE_TILES
        part = item % WIDE_TILES
        expert, row, end = _tile_of(tiles_ptr, max_tiles, tile)
        tell(mail, WIDE, tile, part, row, end, letter, letter_phase)
        slot, phase = _load_item(
            gate_desc, up_desc, tokens_desc, ring, expert * EXPERT_ROWS + part * 128, (row - gathered) % tokens,
            (end - row + 63) // 64, depth_steps, slot, phase, 0, 64, BLOCK_D, STAGES,
        )  # fmt: skip
        letter, letter_phase = advance(letter, letter_phase, MAIL)
        item = gl.atomic_add(next_ptr, 1, sem="relaxed", scope="gpu")
    gdc_wait()
    tiles = gl.load(tiles_ptr + 3 * max_tiles)
    wide_items = tiles * WIDE_TILES
    items = wide_items + tiles * NARROW_TILES
    while item < items:
        if item < wide_items:
            tile = item // WIDE_TILES
            part = item % WIDE_TILES
            expert, row, end = _tile_of(tiles_ptr, max_tiles, tile)
            tell(mail, WIDE, tile, part, row, end, letter, letter_phase)
            slot, phase = _load_item(
                gate_desc, up_desc, gathered_desc, ring, expert * EXPERT_ROWS + part * 128, row,
                (end - row + 63) // 64, depth_steps, slot, phase, 0, 64, BLOCK_D, STAGES,
            )  # fmt: skip
        else:
            tile = (item - wide_items) // NARROW_TILES
            part = (item - wide_items) % NARROW_TILES
            expert, row, end = _tile_of(tiles_ptr, max_tiles, tile)
            tell(mail, NARROW, tile, part, row, end, letter, letter_phase)
            await_signals(done_ptr + tile, WIDE_TILES)
            slot, phase = _load_item(
                down_desc, down_desc, hidden_desc, ring, expert * DOWN_ROWS + part * 256, row,
                (end - row + 63) // 64, inner_steps, slot, phase, 64, 128, BLOCK_D, STAGES,
            )  # fmt: skip
        letter, letter_phase = advance(letter, letter_phase, MAIL)
        item = gl.atomic_add(next_ptr, 1, sem="relaxed", scope="gpu")
    tell(mail, NOTHING, 0, 0, 0, 0, letter, letter_phase)


@gluon.jit
def _swiglu(gate, up):
    """gate / (1 + exp(-gate)) * up, two at a time: 1/a and 1/b are b and a times 1/(a b), one reciprocal for both.

    What ends an item keeps the matrix units waiting, and the unit for exponentials and reciprocals takes longest of it.
    Gates below -43 give a number of less than 1e-18 of theirs, so that the product of two sums stays finite.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 a, b, r;
        mul.f32 a, $2, 0fBFB8AA3B;      // -1 / ln 2
        mul.f32 b, $3, 0fBFB8AA3B;
        min.f32 a, a, 0f42780000;       // 62
        min.f32 b, b, 0f42780000;
        ex2.approx.ftz.f32 a, a;
        ex2.approx.ftz.f32 b, b;
        add.f32 a, a, 0f3F800000;       // 1
        add.f32 b, b, 0f3F800000;
        mul.f32 r, a, b;
        rcp.approx.ftz.f32 r, r;
        mul.f32 b, b, r;
        mul.f32 a, a, r;
        mul.f32 b, b, $2;
        mul.f32 a, a, $3;
        mul.f32 $0, b, $4;
        mul.f32 $1, a, $5;
        }""",
        "=f,=f,f,f,f,f",
        [gate, up],
        dtype=gl.float32,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _store(values, out_ptr, out_row, inside, column, width):
    """values [64, 64 or 128] → the first of `column` and its neighbours of each row that is inside.

    Neighbouring lanes trade columns, so that a row's four write 32 bytes together and no shared memory is needed.
    """
    COLUMNS: gl.constexpr = values.shape[1]
    MORE: gl.constexpr = [[0, 64]] if COLUMNS == 128 else []
    stored: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [0, 16], [0, 32]] + MORE,
        lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, COLUMNS],
    )
    rows: gl.constexpr = gl.SliceLayout(1, stored)
    output = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, stored))
    written = gl.convert_layout(inside, rows)[:, None] & (output < width)[None, :]
    first = gl.convert_layout(out_row, rows).to(gl.int64) * width
    values = gl.convert_layout(values.to(out_ptr.dtype.element_ty), stored)
    gl.store(out_ptr + first[:, None] + output[None, :], values, mask=written)


@gluon.jit
def _end_half(
    sums, half, out_ptr, part, begin, pair, weight, end,
    WIDE_ITEM: gl.constexpr, LIMIT: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """What follows the sums [64, 128] of a half: SwiGLU, in sorted order, or the pair's weight, scattered to pair
    order."""
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    row = begin + gl.arange(0, 64, gl.SliceLayout(1, products))
    if WIDE_ITEM:
        gate, up = gl.split(gl.permute(gl.reshape(sums, [64, 2, 64]), [0, 2, 1]))
        gate, up = limited(gate, up, LIMIT)
        _store(_swiglu(gate, up), out_ptr, row, row < end, part * 128 + half * 64, WIDTH)
        tl.debug_barrier()  # the first thread's arrival stands for all
    else:
        _store(sums * weight[:, None], out_ptr, pair, row < end, part * 256 + half * 128, WIDTH)


@gluon.jit
def _multiply_half(ring, slot, sums, use_acc, GROUP: gl.constexpr, HALF: gl.constexpr):
    """One step's products of a half, under way."""
    weights_smem, x_smem, _, _ = ring
    weights = weights_smem.index(slot * 2 + HALF).permute((1, 0))
    return warpgroup_mma(x_smem.index(slot * 3 + GROUP), weights, sums, use_acc=use_acc, is_async=True)


@gluon.jit
def _accumulate(ring, slot, phase, first, second, steps, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """An item's products from the second half of its first step on; the last of that half are left under way."""
    full, empty = ring[2], ring[3]
    second = _multiply_half(ring, slot, second, False, GROUP, 1)
    second = warpgroup_mma_wait(1, deps=(second,))  # waits for nothing
    slot, phase = advance(slot, phase, STAGES)
    for _ in range(steps - 1):
        mbarrier.wait(full.index(slot), phase)
        first = _multiply_half(ring, slot, first, True, GROUP, 0)
        second = _multiply_half(ring, slot, second, True, GROUP, 1)
        # One step stays in flight; the step before it has been read.
        first, second = warpgroup_mma_wait(2, deps=(first, second))
        mbarrier.arrive(empty.index(gl.where(slot == 0, STAGES - 1, slot - 1)))
        slot, phase = advance(slot, phase, STAGES)
    first, second = warpgroup_mma_wait(1, deps=(first, second))
    return first, second, slot, phase


@gluon.jit
def _next_item(mail, letter, phase, GROUP: gl.constexpr, MAIL: gl.constexpr):
    """The next letter, and what it says to a group: kind, part, and its rows' begin and end."""
    letter, phase = advance(letter, phase, MAIL)
    kind, _, part, begin, end = hear(mail, letter, phase)
    mbarrier.arrive(mail[2].index(letter))
    return letter, phase, (kind, part, begin + GROUP * 64, end)


@gluon.jit
def _pairs_of(order_ptr, pair_weights_ptr, begin, end):
    """Of a group's rows: their pairs and these pairs' weights, asked for and not waited for."""
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    row = begin + gl.arange(0, 64, gl.SliceLayout(1, products))
    pair = gl.load(order_ptr + row, mask=row < end, other=0)
    return pair, gl.load(pair_weights_ptr + pair).to(gl.float32)


@gluon.jit
def _multiply_items(
    out_ptr, order_ptr, pair_weights_ptr, steps, ring, mail, slot, phase, letter, letter_phase, item,
    WIDE_ITEM: gl.constexpr, GROUP: gl.constexpr, LIMIT: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
    MAIL: gl.constexpr,
):  # fmt: skip
    """A group's share of all items of a kind.

    What ends a half is done while products of another are under way: the first half's under the last of the second,
    the second half's under the first of the next item.
    """
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    KIND: gl.constexpr = WIDE if WIDE_ITEM else NARROW
    full, empty = ring[2], ring[3]
    stored = mail[3]
    kind, part, begin, end = item
    first = gl.zeros((64, 128), gl.float32, products)
    second = gl.zeros((64, 128), gl.float32, products)
    pair = gl.arange(0, 64, gl.SliceLayout(1, products))
    weight = gl.zeros([64], gl.float32, gl.SliceLayout(1, products))
    while kind == KIND:
        if begin < end:
            if not WIDE_ITEM:
                pair, weight = _pairs_of(order_ptr, pair_weights_ptr, begin, end)
            mbarrier.wait(full.index(slot), phase)
            first = _multiply_half(ring, slot, first, False, GROUP, 0)
            first = warpgroup_mma_wait(0, deps=(first,))
            following = gl.to_tensor(True)
            while following:
                first, second, slot, phase = _accumulate(ring, slot, phase, first, second, steps, GROUP, STAGES)
                _end_half(first, 0, out_ptr, part, begin, pair, weight, end, WIDE_ITEM, LIMIT, WIDTH)
                first, second = warpgroup_mma_wait(0, deps=(first, second))
                mbarrier.arrive(empty.index(gl.where(slot == 0, STAGES - 1, slot - 1)))
                old_part, old_begin, old_end, old_letter = part, begin, end, letter
                old_pair, old_weight = pair, weight
                letter, letter_phase, item = _next_item(mail, letter, letter_phase, GROUP, MAIL)
                kind, part, begin, end = item
                following = (kind == KIND) & (begin < end)
                if not WIDE_ITEM:
                    pair, weight = _pairs_of(order_ptr, pair_weights_ptr, begin, end)
                mbarrier.wait(full.index(slot), phase, pred=following)
                # Where nothing follows these are products of anything, for nobody.
                first = _multiply_half(ring, slot, first, False, GROUP, 0)
                # Waits for nothing: without a loop in between, ptxas would put these products behind the SwiGLU.
                mbarrier.wait(full.index(slot), phase, pred=following)
                _end_half(
                    second, 1, out_ptr, old_part, old_begin, old_pair, old_weight, old_end, WIDE_ITEM, LIMIT, WIDTH
                )
                mbarrier.arrive(stored.index(old_letter))
                first = warpgroup_mma_wait(0, deps=(first,))
        else:
            # Without tokens it still follows the ring: a barrier tells one lap from the next, not from the one after.
            for _ in range(steps):
                mbarrier.wait(full.index(slot), phase)
                mbarrier.arrive(empty.index(slot))
                slot, phase = advance(slot, phase, STAGES)
            mbarrier.arrive(stored.index(letter))
            letter, letter_phase, item = _next_item(mail, letter, letter_phase, GROUP, MAIL)
            kind, part, begin, end = item
    return slot, phase, letter, letter_phase, (kind, part, begin, end)


@gluon.jit
def _multiply(
    hidden_ptr, out_ptr, order_ptr, pair_weights_ptr, depth_steps, inner_steps, ring, mail,
    GROUP: gl.constexpr, LIMIT: gl.constexpr, INNER: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
    MAIL: gl.constexpr,
):  # fmt: skip
    """A multiplying group: the GROUP-th 64 tokens of every tile."""
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    # One before the first.
    letter, letter_phase, item = _next_item(mail, gl.to_tensor(MAIL - 1), gl.to_tensor(1), GROUP, MAIL)
    slot, phase, letter, letter_phase, item = _multiply_items(
        hidden_ptr, order_ptr, pair_weights_ptr, depth_steps, ring, mail, slot, phase, letter, letter_phase, item,
        True, GROUP, LIMIT, INNER, STAGES, MAIL,
    )  # fmt: skip
    slot, phase, letter, letter_phase, item = _multiply_items(
        out_ptr, order_ptr, pair_weights_ptr, inner_steps, ring, mail, slot, phase, letter, letter_phase, item,
        False, GROUP, LIMIT, WIDTH, STAGES, MAIL,
    )  # fmt: skip
    mbarrier.arrive(mail[3].index(letter))


@gluon.jit
def _signal(tiles_ptr, max_tiles, mail, MAIL: gl.constexpr):
    """The signalling warp: tells other programs what the groups have stored. They need not wait for it to be seen."""
    heard, stored = mail[2], mail[3]
    letter = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    working = gl.to_tensor(True)
    while working:
        kind, tile, _, _, _ = hear(mail, letter, phase)
        mbarrier.wait(stored.index(letter), phase)
        mbarrier.arrive(heard.index(letter))
        if kind == WIDE:
            order_for_copies()
            gl.atomic_add(tiles_ptr + 4 * max_tiles + tile, 1, sem="release", scope="gpu")
        working = kind != NOTHING
        letter, phase = advance(letter, phase, MAIL)


@gluon.jit
def prefill_products_kernel(
    gate_desc, up_desc, gathered_desc, tokens_desc, down_desc, hidden_desc, hidden_ptr, out_ptr, order_ptr,
    pair_weights_ptr, tiles_ptr, max_tiles, early, gathered, tokens, depth_steps, inner_steps,
    LIMIT: gl.constexpr, EXPERT_ROWS: gl.constexpr, INNER: gl.constexpr, DOWN_ROWS: gl.constexpr, WIDTH: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, MAIL: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = gate_desc.dtype
    weights_smem = gl.allocate_shared_memory(dtype, [STAGES * 2, 128, BLOCK_D], gate_desc.layout)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES * 3, 64, BLOCK_D], gathered_desc.layout)
    ring = (weights_smem, x_smem, make_barriers(STAGES, 1), make_barriers(STAGES, 3))
    letters = gl.allocate_shared_memory(gl.int32, [MAIL * 8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    mail = (letters, make_barriers(MAIL, 1), make_barriers(MAIL, 4), make_barriers(MAIL, 3))
    gdc_launch_dependents()  # the loading warp waits
    gl.warp_specialize(
        [
            (_multiply, (
                hidden_ptr, out_ptr, order_ptr, pair_weights_ptr, depth_steps, inner_steps, ring, mail,
                0, LIMIT, INNER, WIDTH, STAGES, MAIL,
            )),
            (_multiply, (
                hidden_ptr, out_ptr, order_ptr, pair_weights_ptr, depth_steps, inner_steps, ring, mail,
                1, LIMIT, INNER, WIDTH, STAGES, MAIL,
            )),
            (_multiply, (
                hidden_ptr, out_ptr, order_ptr, pair_weights_ptr, depth_steps, inner_steps, ring, mail,
                2, LIMIT, INNER, WIDTH, STAGES, MAIL,
            )),
            (_load, (
                gate_desc, up_desc, gathered_desc, tokens_desc, down_desc, hidden_desc, tiles_ptr, max_tiles, early,
                gathered, tokens, depth_steps, inner_steps, ring, mail,
                EXPERT_ROWS, INNER, DOWN_ROWS, WIDTH, BLOCK_D, STAGES, MAIL,
            )),
            (_signal, (tiles_ptr, max_tiles, mail, MAIL)),
        ],
        [4, 4, 1, 1],
        [160, 160, 32, 32],
    )  # fmt: skip


def prefill_products(
    plan: ExpertPlan, gate: Tensor, up: Tensor, down: Tensor, pair_weights: Tensor, limit: float | None = None
) -> Tensor:
    """Both products over the tiles of `plan`, made for TILE_ROWS in units of GROUP_ROWS, of M pairs.

    gate and up [E, I, D], down [E, O, I], pair_weights [M] in pair order → [M, O] in pair order, weighted.
    """
    _, inner, depth = gate.shape
    width = down.shape[1]
    pairs, device = plan.order.shape[0], gate.device
    (gates, expert_rows), (ups, _), (downs, down_rows) = (matrix_of(stack) for stack in (gate, up, down))
    hidden = torch.empty((pairs, inner), dtype=gate.dtype, device=device)
    out = torch.empty((pairs, width), dtype=gate.dtype, device=device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    prefill_products_kernel[(processors,)](
        in_boxes(gates, 64, BLOCK_D),
        in_boxes(ups, 64, BLOCK_D),
        in_boxes(plan.gathered, GROUP_ROWS, BLOCK_D),
        in_boxes(plan.tokens, GROUP_ROWS, BLOCK_D),
        in_boxes(downs, 64, BLOCK_D),
        in_boxes(hidden, GROUP_ROWS, BLOCK_D),
        hidden,
        out,
        plan.order,
        pair_weights,
        plan.tiles,
        plan.tiles.shape[1],
        plan.early,
        plan.gathered.shape[0],
        plan.tokens.shape[0],
        cdiv(depth, BLOCK_D),
        cdiv(inner, BLOCK_D),
        LIMIT=limit,
        EXPERT_ROWS=expert_rows,
        INNER=inner,
        DOWN_ROWS=down_rows,
        WIDTH=width,
        BLOCK_D=BLOCK_D,
        STAGES=STAGES,
        MAIL=MAIL,
        num_warps=4,
        maxnreg=128,
        launch_pdl=True,
    )
    return out
