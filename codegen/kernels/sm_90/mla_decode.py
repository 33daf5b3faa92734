"""MLA decode for few query rows: everything transposed, so that heads sit on the narrow side of the wgmma.

    Sᵀ = K Qᵀ        [64 positions, ROWS]        K: 64 cached positions of latent and rope key
    Oᵀ += Vᵀ Pᵀ      [rank, ROWS]                V: the same latent tile, read from shared memory a second time

Bound by the cache's bytes: one warp streams tiles through the copy engine, GROUPS warp groups of ROWS rows each consume
them. A query row is a (position, head) pair: row = position · HEADS + head.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.sm_90.mla_schedule import load_reaches, program_range, request_reach
from codegen.kernels.sm_90.mla_stream import (
    clear_hidden,
    load_cache,
    load_first_tile,
    load_query,
    make_query,
    make_ring,
)
from codegen.kernels.sm_90.rings import advance


@gluon.jit
def _store_output(
    out_ptr, acc, weight, line, first_row, total, UNITS: gl.constexpr, WIDTH: gl.constexpr, ROWS: gl.constexpr
):  # fmt: skip
    """A request that one program did alone, from out's row `line` on."""
    # Four neighbours of a row per thread, 16 in a row, where the products leave one and 8. Exchanging one bit of the
    # lane's number at a time keeps this within registers.
    MORE: gl.constexpr = ([[0, 8]] if ROWS == 16 else []) + [[64, 0], [128, 0]][: 2 if WIDTH == 256 else WIDTH // 128]
    halfway: gl.constexpr = gl.DistributedLinearLayout(
        [[1, 0], [0, 1]] + MORE, [[0, 2], [0, 4], [8, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [WIDTH, ROWS]
    )
    stored: gl.constexpr = gl.DistributedLinearLayout(
        [[1, 0], [2, 0]] + MORE, [[0, 2], [0, 4], [8, 0], [0, 1], [4, 0]], [[16, 0], [32, 0]], [], [WIDTH, ROWS]
    )
    sums = gl.sum(weight, 0)
    inverse = 1.0 / gl.where(sums > 0, sums, 1.0)  # a row of the tile may be no query
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(0, stored))
    for unit in gl.static_range(UNITS):
        values = gl.convert_layout(gl.convert_layout(acc[unit] * inverse[None, :], halfway), stored)
        column = unit * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(1, stored))
        at = (line + row)[None, :] * (UNITS * WIDTH) + column[:, None]
        gl.store(out_ptr + at, values.to(out_ptr.dtype.element_ty), mask=(row < total)[None, :])


@gluon.jit
def _store_part(
    part_ptr, stat_ptr, acc, weight, highest, line, first_row, total,
    UNITS: gl.constexpr, WIDTH: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """A part of a request, from row `line` of the parts on: all programs do this last, and the merge waits for it.

    Hence no exchange between threads. Columns lie as the products leave them, WIDTH / 32 neighbours of a row per
    thread, and each warp leaves a sum of its own: mla_merge puts columns in order and adds up. Nor a trip to memory:
    the next call writes the same lines, so they are to outlive the cache's stream in L2, and whole sectors of it are
    written, since what is missing in one would have to be read.
    """
    NEAR: gl.constexpr = WIDTH // 32
    near: gl.constexpr = gl.DistributedLinearLayout(
        [[1, 0], [2, 0], [4, 0]][: 3 if WIDTH == 256 else WIDTH // 64]
        + [[0, 1]] + ([[0, 8]] if ROWS == 16 else []),
        [[0, 2], [0, 4], [NEAR, 0], [2 * NEAR, 0], [4 * NEAR, 0]],
        [[8 * NEAR, 0], [16 * NEAR, 0]],
        [],
        [WIDTH, ROWS],
    )  # fmt: skip
    sums: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1]] + ([[0, 8]] if ROWS == 16 else []), [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]], [[1, 0], [2, 0]], [],
        [4, ROWS],
    )  # fmt: skip
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(0, near))
    for unit in gl.static_range(UNITS):
        values = acc[unit].to(part_ptr.dtype.element_ty).reshape([WIDTH // 64, 4, 2, 8, ROWS])
        values = values.permute([1, 3, 0, 2, 4]).reshape([WIDTH, ROWS])
        column = unit * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(1, near))
        at = (line + row)[None, :] * (UNITS * WIDTH) + column[:, None]
        gl.store(
            part_ptr + at, gl.convert_layout(values, near), mask=(row < total)[None, :], eviction_policy="evict_last"
        )
    warp = gl.arange(0, 4, layout=gl.SliceLayout(1, sums))
    stat_row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(0, sums))
    at = (line + stat_row)[None, :] * 8 + warp[:, None]
    known = (stat_row < total)[None, :]
    peak = gl.convert_layout(highest, gl.SliceLayout(0, sums))[None, :] + gl.zeros([4, ROWS], gl.float32, layout=sums)
    gl.store(stat_ptr + at, peak, mask=known, eviction_policy="evict_last")
    summed = gl.convert_layout(gl.sum(weight.reshape([4, 16, ROWS]), 1), sums)
    gl.store(stat_ptr + at + 4, summed, mask=known, eviction_policy="evict_last")


@gluon.jit
def _too_high(above, ROWS: gl.constexpr):
    """Per warp, 1 if a score lies so many powers of two above the row's reference that the sums should move on.

    Looks at a thread's own elements first, as the products lay them out: of the other threads' it costs one REDUX.
    """
    RISE: gl.constexpr = 16
    own = gl.max(gl.max(gl.max(above.reshape([4, 2, 8, ROWS // 8, 4, 2]), 5), 3), 1)
    return gl.max((own > RISE).to(gl.int32).reshape([4, 32]), 1)


@gluon.jit
def _consume(
    latents, ropes, query, p_smem, flag_smem, q_latent_desc, q_rope_desc, positions_ptr, out_ptr, part_ptr, stat_ptr,
    schedule, queries, scale: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, SPAN: gl.constexpr,
    HEADS: gl.constexpr, ROWS: gl.constexpr, UNITS: gl.constexpr, WIDTH: gl.constexpr, SLOTS: gl.constexpr,
    ROPE_SLOTS: gl.constexpr,
):  # fmt: skip
    latent_ring, latent_full, latent_empty = latents
    rope_ring, rope_full, rope_empty = ropes
    q_latent_smem, q_rope_smem, q_full = query
    begin, end, request, origin = schedule
    first_row = (gl.program_id(0) * GROUPS + GROUP) * ROWS
    first = gl.program_id(0) * (GROUPS * ROWS) // HEADS
    total = queries * HEADS
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    across: gl.constexpr = gl.SliceLayout(0, mma)
    down: gl.constexpr = gl.SliceLayout(1, mma)
    LOG2_SCALE: gl.constexpr = scale * 1.4426950408889634  # scores in units of log 2

    # Sums of a row stay relative to `highest`, its largest score in the first tile, until a score is much larger. The
    # largest over all warps takes longer to find than the rest of the softmax, and the formats have room for more.
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    rope_slot = gl.to_tensor(0)
    rope_phase = gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    start = begin
    if begin < end:
        load_query(query, q_latent_desc, q_rope_desc, request * total + first_row, UNITS, WIDTH)
    while begin < end:
        nearest, furthest = request_reach(positions_ptr, request, queries, first, SPAN)
        tiles = furthest // 64 + 1
        stop = gl.minimum(end, origin + tiles)
        highest = gl.full([ROWS], -1.0e30, gl.float32, layout=across)
        weight = gl.zeros([64, ROWS], gl.float32, layout=mma)
        acc = ()
        for _ in gl.static_range(UNITS):
            acc = acc + (gl.zeros([WIDTH, ROWS], gl.float32, layout=mma),)
        mbarrier.wait(q_full, q_phase)
        q_phase ^= 1
        for tile in range(begin - origin, stop - origin):
            scores = gl.zeros([64, ROWS], gl.float32, layout=mma)
            s_slot = slot
            s_phase = phase
            for unit in gl.static_range(UNITS):
                mbarrier.wait(latent_full.index(s_slot), s_phase)
                scores = warpgroup_mma(
                    latent_ring.index(s_slot), q_latent_smem.index(unit).permute((1, 0)), scores,
                    use_acc=unit > 0, is_async=True,
                )  # fmt: skip
                s_slot, s_phase = advance(s_slot, s_phase, SLOTS)
            mbarrier.wait(rope_full.index(rope_slot), rope_phase)
            scores = warpgroup_mma(rope_ring.index(rope_slot), q_rope_smem.permute((1, 0)), scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(rope_empty.index(rope_slot))
            rope_slot, rope_phase = advance(rope_slot, rope_phase, ROPE_SLOTS)

            if tile * 64 + 63 > nearest:
                asking = gl.minimum((first_row + gl.arange(0, ROWS, layout=across)) // HEADS, queries - 1)
                position = gl.load(positions_ptr + request * queries + asking).to(gl.int32)
                cached = tile * 64 + gl.arange(0, 64, layout=down)
                scores = gl.where(cached[:, None] <= position[None, :], scores, float("-inf"))
            above = scores * LOG2_SCALE - highest[None, :]
            p = gl.exp2(above)
            p_smem.store(p.to(gl.bfloat16))
            flag_smem.store(_too_high(above, ROWS))
            if tile * 64 + 63 > furthest:
                z_slot = slot
                z_phase = phase
                for _ in gl.static_range(UNITS):
                    clear_hidden(latent_ring.index(z_slot), tile * 64, furthest, WIDTH)
                    z_slot, z_phase = advance(z_slot, z_phase, SLOTS)
            fence_async_shared()
            if gl.max(flag_smem.load(gl.BlockedLayout([4], [32], [4], [0])), 0) > 0:
                raised = gl.maximum(highest, gl.max(scores, 0) * LOG2_SCALE)
                decay = gl.exp2(highest - raised)
                highest = raised
                p = gl.exp2(scores * LOG2_SCALE - raised[None, :])
                p_smem.store(p.to(gl.bfloat16))
                fence_async_shared()
                weight = weight * decay[None, :]
                decayed = ()
                for unit in gl.static_range(UNITS):
                    decayed = decayed + (acc[unit] * decay[None, :],)
                acc = decayed
            weight = weight + p

            o_slot = slot
            o_phase = phase
            summed = ()
            for unit in gl.static_range(UNITS):
                box = latent_ring.index(o_slot).permute((1, 0))
                summed = summed + (warpgroup_mma(box, p_smem, acc[unit], is_async=True),)
                o_slot, o_phase = advance(o_slot, o_phase, SLOTS)
            if UNITS == 1:
                acc = (warpgroup_mma_wait(0, deps=summed),)
            else:
                acc = warpgroup_mma_wait(0, deps=summed)
            for _ in gl.static_range(UNITS):
                mbarrier.arrive(latent_empty.index(slot))
                slot, phase = advance(slot, phase, SLOTS)

        whole = (begin == origin) & (stop == origin + tiles)
        piece = gl.program_id(1) * 2 + gl.where(begin == start, 0, 1)
        out_line = request * total
        begin = stop
        origin += tiles
        request += 1
        if begin < end:
            load_query(query, q_latent_desc, q_rope_desc, request * total + first_row, UNITS, WIDTH)
        if whole:
            _store_output(out_ptr, acc, weight, out_line, first_row, total, UNITS, WIDTH, ROWS)
        else:
            line = piece * total
            _store_part(part_ptr, stat_ptr, acc, weight, highest, line, first_row, total, UNITS, WIDTH, ROWS)


@gluon.jit
def mla_decode_narrow(
    q_latent_desc, q_rope_desc, latent_desc, rope_desc, positions_ptr, table_ptr, out_ptr, part_ptr, stat_ptr,
    requests, queries, request_stride,
    scale: gl.constexpr, SPAN: gl.constexpr, HEADS: gl.constexpr, REQUESTS: gl.constexpr, PAGED: gl.constexpr,
    GROUPS: gl.constexpr, ROWS: gl.constexpr, UNITS: gl.constexpr, WIDTH: gl.constexpr,
    SLOTS: gl.constexpr, ROPE_SLOTS: gl.constexpr,
):  # fmt: skip
    """Grid (row tiles of GROUPS · ROWS, programs). Split requests leave parts for mla_merge; whole ones go to out."""
    gdc_launch_dependents()
    gdc_wait()
    first = gl.program_id(0) * (GROUPS * ROWS) // HEADS
    reaches = load_reaches(positions_ptr, requests, queries, first, SPAN, REQUESTS)
    # While positions are on their way:
    latents = make_ring(latent_desc, SLOTS, GROUPS)
    ropes = make_ring(rope_desc, ROPE_SLOTS, GROUPS)
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, ROWS], gl.bfloat16)
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [GROUPS, 64, ROWS], p_layout)
    flag_smem = gl.allocate_shared_memory(gl.int32, [GROUPS, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    query = make_query(q_latent_desc, q_rope_desc, UNITS)
    second = query
    if GROUPS == 2:
        second = make_query(q_latent_desc, q_rope_desc, UNITS)
    fence_async_shared()
    schedule = program_range(reaches, requests, gl.program_id(1), gl.num_programs(1))
    queries = gl.to_tensor(queries)
    request_stride = gl.to_tensor(request_stride)
    load_first_tile(latents, ropes, latent_desc, rope_desc, table_ptr, schedule, request_stride, PAGED, UNITS, WIDTH)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_consume, (latents, ropes, query, p_smem.index(0), flag_smem.index(0), q_latent_desc, q_rope_desc,
                            positions_ptr, out_ptr, part_ptr, stat_ptr, schedule, queries, scale, 0, GROUPS, SPAN,
                            HEADS, ROWS, UNITS, WIDTH, SLOTS, ROPE_SLOTS)),
                (load_cache, (latents, ropes, latent_desc, rope_desc, positions_ptr, table_ptr, schedule,
                              queries, request_stride, GROUPS * ROWS, HEADS, SPAN, PAGED, UNITS, WIDTH, SLOTS,
                              ROPE_SLOTS)),
            ],
            [1],
            [40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (latents, ropes, query, p_smem.index(0), flag_smem.index(0), q_latent_desc, q_rope_desc,
                            positions_ptr, out_ptr, part_ptr, stat_ptr, schedule, queries, scale, 0, GROUPS, SPAN,
                            HEADS, ROWS, UNITS, WIDTH, SLOTS, ROPE_SLOTS)),
                (_consume, (latents, ropes, second, p_smem.index(1), flag_smem.index(1), q_latent_desc, q_rope_desc,
                            positions_ptr, out_ptr, part_ptr, stat_ptr, schedule, queries, scale, 1, GROUPS, SPAN,
                            HEADS, ROWS, UNITS, WIDTH, SLOTS, ROPE_SLOTS)),
                (load_cache, (latents, ropes, latent_desc, rope_desc, positions_ptr, table_ptr, schedule,
                              queries, request_stride, GROUPS * ROWS, HEADS, SPAN, PAGED, UNITS, WIDTH, SLOTS,
                              ROPE_SLOTS)),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip
