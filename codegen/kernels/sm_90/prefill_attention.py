"""Prefill attention on Hopper: two warp groups of 64 queries each compute, one warp loads, as in FlashAttention-3.

    group 0, 1      S = Q Kᵀ [64, KEYS], softmax, O += P V [64, V]; P stays in registers
    loading warp    the queries once, then tiles of keys and values through a ring each

A program is a tile of queries of one head. It walks from its last tile of keys to the first, so that only the tiles it
begins with need a mask; where those lie is read from the positions, which may be any. Queries and keys come in up to
three parts of 32 to 256 columns, whose products add up: what a head has of its own, which is cut in two where its width
is no power of two, and a rope part. Heads may share the keys, the values, or the rope part.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.sm_90.rings import advance, make_barriers

GROUP_ROWS = 64  # of one wgmma
TILE_ROWS = 2 * GROUP_ROWS
STAGES = 2


@gluon.jit
def _allocate(desc, SLOTS: gl.constexpr):
    return gl.allocate_shared_memory(desc.dtype, [SLOTS] + desc.block_type.shape, desc.layout)


@gluon.jit
def _matrix(boxes, slot, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """A box [1, ROWS, 1, WIDTH] as [ROWS, WIDTH]."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, WIDTH], boxes.dtype)
    return boxes.index(slot)._reinterpret(boxes.dtype, [ROWS, WIDTH], layout)


@gluon.jit
def _load(
    q_desc, q_more_desc, q_rope_desc, k_desc, k_more_desc, k_rope_desc, v_desc, queries, keys, values, item,
    KEYS: gl.constexpr, MORE: gl.constexpr, ROPE: gl.constexpr, K_SHARE: gl.constexpr, ROPE_SHARE: gl.constexpr,
    V_SHARE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: values follow one tile of keys behind, in the order in which they are needed."""
    batch, first, head, tiles, _ = item
    q_smem, q_more_smem, q_rope_smem, q_full = queries
    k_smem, k_more_smem, k_rope_smem, k_full, k_empty = keys
    v_smem, v_full, v_empty = values
    COLUMNS: gl.constexpr = q_desc.block_type.shape[3] + MORE + ROPE
    COLUMN_BYTES: gl.constexpr = v_desc.block_type.nbytes // v_desc.block_type.shape[3] // KEYS
    KEY_BYTES: gl.constexpr = KEYS * COLUMNS * COLUMN_BYTES
    QUERY_BYTES: gl.constexpr = 64 * COLUMNS * COLUMN_BYTES
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    v_slot = gl.to_tensor(0)
    v_phase = gl.to_tensor(0)
    for step in range(tiles + 1):
        row = (tiles - 1 - step) * KEYS
        if step < tiles:
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            full = k_full.index(slot)
            mbarrier.expect(full, KEY_BYTES)
            where = [batch, row, head // K_SHARE, 0]
            tma.async_copy_global_to_shared(k_desc, where, full, k_smem.index(slot))
            if MORE:
                tma.async_copy_global_to_shared(k_more_desc, where, full, k_more_smem.index(slot))
            if ROPE:
                where = [batch, row, head // ROPE_SHARE, 0]
                tma.async_copy_global_to_shared(k_rope_desc, where, full, k_rope_smem.index(slot))
            slot, phase = advance(slot, phase, STAGES)
        if step == 0:
            for group in gl.static_range(2):
                full = q_full.index(group)
                mbarrier.expect(full, QUERY_BYTES)
                where = [batch, first + group * 64, head, 0]
                tma.async_copy_global_to_shared(q_desc, where, full, q_smem.index(group))
                if MORE:
                    tma.async_copy_global_to_shared(q_more_desc, where, full, q_more_smem.index(group))
                if ROPE:
                    tma.async_copy_global_to_shared(q_rope_desc, where, full, q_rope_smem.index(group))
        else:
            mbarrier.wait(v_empty.index(v_slot), v_phase ^ 1)
            full = v_full.index(v_slot)
            mbarrier.expect(full, v_desc.block_type.nbytes)
            where = [batch, row + KEYS, head // V_SHARE, 0]
            tma.async_copy_global_to_shared(v_desc, where, full, v_smem.index(v_slot))
            v_slot, v_phase = advance(v_slot, v_phase, STAGES)


@gluon.jit
def _multiply_keys(
    queries, keys, slot, phase, GROUP: gl.constexpr, KEYS: gl.constexpr, WIDTH: gl.constexpr, MORE: gl.constexpr,
    ROPE: gl.constexpr,
):  # fmt: skip
    """Q Kᵀ of the tile in a slot, under way."""
    q_smem, q_more_smem, q_rope_smem, _ = queries
    k_smem, k_more_smem, k_rope_smem, k_full, _ = keys
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    mbarrier.wait(k_full.index(slot), phase)
    scores = gl.zeros([64, KEYS], gl.float32, layout=mma)
    q, k = _matrix(q_smem, GROUP, 64, WIDTH), _matrix(k_smem, slot, KEYS, WIDTH)
    scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
    if MORE:
        q, k = _matrix(q_more_smem, GROUP, 64, MORE), _matrix(k_more_smem, slot, KEYS, MORE)
        scores = warpgroup_mma(q, k.permute((1, 0)), scores, is_async=True)
    if ROPE:
        q, k = _matrix(q_rope_smem, GROUP, 64, ROPE), _matrix(k_rope_smem, slot, KEYS, ROPE)
        scores = warpgroup_mma(q, k.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _softmax(
    scores, highest, weight, tile, position, KEYS: gl.constexpr, LOG2_SCALE: gl.constexpr, MASKED: gl.constexpr
):
    """One step of the running softmax → P, what the sums so far fade to, and the new maximum and sum of each row."""
    if MASKED:
        across: gl.constexpr = gl.SliceLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16]))
        key = tile * KEYS + gl.arange(0, KEYS, layout=across)
        scores = gl.where(key[None, :] <= position[:, None], scores, float("-inf"))
    raised = gl.maximum(highest, gl.max(scores, 1) * LOG2_SCALE)
    fade = gl.exp2(highest - raised)
    p = gl.exp2(scores * LOG2_SCALE - raised[:, None])
    return p, fade, raised, weight * fade + gl.sum(p, 1)


@gluon.jit
def _mix(p, fade, mixed, values, slot, phase, KEYS: gl.constexpr, V: gl.constexpr):
    """fade · O + P V, under way, and P as it is being read."""
    v_smem, v_full, _ = values
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    mixed = mixed * gl.convert_layout(fade, gl.SliceLayout(1, mma))[:, None]
    p = gl.convert_layout(p.to(v_smem.dtype), gl.DotOperandLayout(0, mma, 2))
    mbarrier.wait(v_full.index(slot), phase)
    return p, warpgroup_mma(p, _matrix(v_smem, slot, KEYS, V), mixed, is_async=True)


@gluon.jit
def _clear_hidden(values, first, furthest, KEYS: gl.constexpr, V: gl.constexpr):
    """Zero the values of the first tile that lie behind every query: they may hold anything, and 0 · NaN is NaN."""
    v_smem, v_full, _ = values
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    visible = first + gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout)) <= furthest
    mbarrier.wait(v_full.index(0), 0)
    matrix = _matrix(v_smem, 0, KEYS, V)
    for column in gl.static_range(0, V, 64):
        part = matrix.slice(column, 64, dim=1)
        part.store(gl.where(visible[:, None], part.load(layout), 0.0))
    fence_async_shared()
    tl.debug_barrier()


@gluon.jit
def _store(values, out_ptr, row, rows, distance, V: gl.constexpr):
    """values [64, V] → rows from `row` on, while inside, that are `distance` apart.

    16 bytes of a row per thread, 64 in a row, where the products leave 4 and 16; exchanging one bit of the lane's
    number at a time keeps this within registers.
    """
    WIDER: gl.constexpr = [[0, 32]] + ([[0, 64]] if V > 64 else []) + ([[0, 128]] if V > 128 else [])
    halfway: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16]] + WIDER, [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
        [64, V],
    )  # fmt: skip
    stored: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0]] + WIDER, [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
        [64, V],
    )  # fmt: skip
    values = gl.convert_layout(gl.convert_layout(values.to(out_ptr.dtype.element_ty), halfway), stored)
    line = gl.arange(0, 64, layout=gl.SliceLayout(1, stored))
    column = gl.arange(0, V, layout=gl.SliceLayout(0, stored))
    where = gl.to_tensor(row).to(gl.int64) * distance + line[:, None] * distance + column[None, :]
    gl.store(out_ptr + where, values, mask=(row + line < rows)[:, None])


@gluon.jit
def _attend(
    queries, keys, values, positions_ptr, out_ptr, item, heads, rows,
    GROUP: gl.constexpr, KEYS: gl.constexpr, WIDTH: gl.constexpr, MORE: gl.constexpr, ROPE: gl.constexpr,
    V: gl.constexpr, LOG2_SCALE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A computing group: the GROUP-th 64 queries of the program's tile."""
    batch, first, head, tiles, furthest = item
    k_empty, v_empty = keys[4], values[2]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    out_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    down: gl.constexpr = gl.SliceLayout(1, mma)
    row = first + GROUP * 64
    # Rows of padding follow the last query, so that they ask for no mask of their own.
    asking = gl.minimum(row + gl.arange(0, 64, layout=down), rows - 1)
    position = gl.load(positions_ptr + asking).to(gl.int32)
    unmasked = (gl.min(position, 0) + 1) // KEYS  # tiles that all of this group's queries see whole

    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    v_slot = gl.to_tensor(0)
    v_phase = gl.to_tensor(0)
    highest = gl.full([64], -1.0e30, gl.float32, layout=down)  # finite, for rows that see nothing of a tile
    weight = gl.zeros([64], gl.float32, layout=down)
    mixed = gl.zeros([64, V], gl.float32, layout=out_mma)
    mbarrier.wait(queries[3].index(GROUP), 0)
    if tiles * KEYS - 1 > furthest:
        _clear_hidden(values, (tiles - 1) * KEYS, furthest, KEYS, V)
    scores = _multiply_keys(queries, keys, slot, phase, GROUP, KEYS, WIDTH, MORE, ROPE)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(slot))
    slot, phase = advance(slot, phase, STAGES)
    for masked in gl.static_range(1, -1, -1):
        begin = tiles - 1 if masked else gl.minimum(tiles, unmasked) - 1
        end = gl.maximum(unmasked, 1) if masked else 1
        for step in range(begin - end + 1):
            # The next scores are under way during this tile's softmax.
            following = _multiply_keys(queries, keys, slot, phase, GROUP, KEYS, WIDTH, MORE, ROPE)
            p, fade, highest, weight = _softmax(
                scores, highest, weight, begin - step, position, KEYS, LOG2_SCALE, masked == 1
            )
            p, mixed = _mix(p, fade, mixed, values, v_slot, v_phase, KEYS, V)
            scores = warpgroup_mma_wait(1, deps=[following])
            mbarrier.arrive(k_empty.index(slot))
            slot, phase = advance(slot, phase, STAGES)
            mixed, _ = warpgroup_mma_wait(0, deps=(mixed, p))
            mbarrier.arrive(v_empty.index(v_slot))
            v_slot, v_phase = advance(v_slot, v_phase, STAGES)
    if unmasked > 0:
        p, fade, highest, weight = _softmax(scores, highest, weight, 0, position, KEYS, LOG2_SCALE, False)
    else:
        p, fade, highest, weight = _softmax(scores, highest, weight, 0, position, KEYS, LOG2_SCALE, True)
    p, mixed = _mix(p, fade, mixed, values, v_slot, v_phase, KEYS, V)
    mixed = warpgroup_mma_wait(0, deps=[mixed])
    mixed = mixed * gl.convert_layout(1.0 / weight, gl.SliceLayout(1, out_mma))[:, None]
    _store(mixed, out_ptr, row, rows, heads * V, V)


@gluon.jit
def prefill_attention_kernel(
    q_desc, q_more_desc, q_rope_desc, k_desc, k_more_desc, k_rope_desc, v_desc, positions_ptr, out_ptr, rows, row_tiles,
    heads, lines, together,
    LOG2_SCALE: gl.constexpr, KEYS: gl.constexpr, WIDTH: gl.constexpr, MORE: gl.constexpr, ROPE: gl.constexpr,
    V: gl.constexpr, K_SHARE: gl.constexpr, ROPE_SHARE: gl.constexpr, V_SHARE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid: (row tiles · lines,), the lines being the heads of all requests.

    Of `together` lines at a time the last tiles, which are the longest, come first. MORE and ROPE are 0 where a head
    has no such part.
    """
    gdc_launch_dependents()
    item = gl.program_id(0)
    first_line = item // (together * row_tiles) * together
    item -= first_line * row_tiles
    beside = gl.minimum(together, lines - first_line)
    first = (row_tiles - 1 - item // beside) * 128
    batch = (first_line + item % beside) // heads
    head = (first_line + item % beside) % heads

    queries = (
        _allocate(q_desc, 2),
        _allocate(q_more_desc, 2) if MORE else 0,
        _allocate(q_rope_desc, 2) if ROPE else 0,
        make_barriers(2, 1),
    )
    keys = (
        _allocate(k_desc, STAGES),
        _allocate(k_more_desc, STAGES) if MORE else 0,
        _allocate(k_rope_desc, STAGES) if ROPE else 0,
        make_barriers(STAGES, 1),
        make_barriers(STAGES, 2),
    )
    values = (_allocate(v_desc, STAGES), make_barriers(STAGES, 1), make_barriers(STAGES, 2))
    fence_async_shared()
    gdc_wait()
    line = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    asking = gl.minimum(first + line, rows - 1)
    before = gl.to_tensor(batch).to(gl.int64) * rows  # rows of earlier requests
    positions_ptr += before
    out_ptr += (before * heads + head) * V
    furthest = gl.max(gl.load(positions_ptr + asking).to(gl.int32), 0)
    tiles = furthest // KEYS + 1
    heads = gl.to_tensor(heads)
    rows = gl.to_tensor(rows)
    item = (batch, first, head, tiles, furthest)
    gl.warp_specialize(
        [
            (_attend, (queries, keys, values, positions_ptr, out_ptr, item, heads, rows, 0, KEYS, WIDTH, MORE, ROPE,
                       V, LOG2_SCALE, STAGES)),
            (_attend, (queries, keys, values, positions_ptr, out_ptr, item, heads, rows, 1, KEYS, WIDTH, MORE, ROPE,
                       V, LOG2_SCALE, STAGES)),
            (_load, (q_desc, q_more_desc, q_rope_desc, k_desc, k_more_desc, k_rope_desc, v_desc, queries, keys, values,
                     item, KEYS, MORE, ROPE, K_SHARE, ROPE_SHARE, V_SHARE, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
