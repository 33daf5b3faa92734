"""MLA decode for many query rows: 64 rows per program, one warp group for the scores and two for the values.

    score group     S = Q Kᵀ [64, 64 positions], softmax, P → shared memory
    value groups    O += P V [64, rank], each owns half of the columns
    loading warp    K = V = the latent tile, and the rope key

Bound by the matrix units; the float32 accumulators of 64 rows are half of a multiprocessor's registers, hence two value
groups. A query row is a (position, head) pair: row = position · HEADS + head.
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
from codegen.kernels.sm_90.rings import advance, make_barriers


@gluon.jit
def _score(
    latents, ropes, query, exchange, done, q_latent_desc, q_rope_desc, positions_ptr, stat_ptr,
    schedule, queries, scale: gl.constexpr, SPAN: gl.constexpr, HEADS: gl.constexpr,
    UNITS: gl.constexpr, WIDTH: gl.constexpr, SLOTS: gl.constexpr, ROPE_SLOTS: gl.constexpr,
):  # fmt: skip
    """The score group: leaves P and the decay of the sums so far for the value groups, tile after tile."""
    latent_ring, latent_full, latent_empty = latents
    rope_ring, rope_full, rope_empty = ropes
    q_latent_smem, q_rope_smem, q_full = query
    p_smem, decay_smem, p_full, p_empty = exchange
    inverse_smem, done_full, done_empty = done
    begin, end, request, origin = schedule
    first_row = gl.program_id(0) * 64
    first = first_row // HEADS
    total = queries * HEADS
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    across: gl.constexpr = gl.SliceLayout(0, mma)
    down: gl.constexpr = gl.SliceLayout(1, mma)
    LOG2_SCALE: gl.constexpr = scale * 1.4426950408889634  # scores in units of log 2

    row = first_row + gl.arange(0, 64, layout=down)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    rope_slot = gl.to_tensor(0)
    rope_phase = gl.to_tensor(0)
    q_phase = gl.to_tensor(0)
    p_phase = gl.to_tensor(0)
    done_phase = gl.to_tensor(0)
    start = begin
    if begin < end:
        load_query(query, q_latent_desc, q_rope_desc, request * total + first_row, UNITS, WIDTH)
    while begin < end:
        nearest, furthest = request_reach(positions_ptr, request, queries, first, SPAN)
        tiles = furthest // 64 + 1
        stop = gl.minimum(end, origin + tiles)
        highest = gl.full([64], -1.0e30, gl.float32, layout=down)
        weight = gl.zeros([64], gl.float32, layout=down)
        mbarrier.wait(q_full, q_phase)
        q_phase ^= 1
        for tile in range(begin - origin, stop - origin):
            scores = gl.zeros([64, 64], gl.float32, layout=mma)
            first_slot = slot
            first_phase = phase
            for unit in gl.static_range(UNITS):
                mbarrier.wait(latent_full.index(slot), phase)
                scores = warpgroup_mma(
                    q_latent_smem.index(unit), latent_ring.index(slot).permute((1, 0)), scores,
                    use_acc=unit > 0, is_async=True,
                )  # fmt: skip
                slot, phase = advance(slot, phase, SLOTS)
            mbarrier.wait(rope_full.index(rope_slot), rope_phase)
            scores = warpgroup_mma(q_rope_smem, rope_ring.index(rope_slot).permute((1, 0)), scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(rope_empty.index(rope_slot))
            rope_slot, rope_phase = advance(rope_slot, rope_phase, ROPE_SLOTS)

            if tile * 64 + 63 > nearest:
                asking = gl.minimum(row // HEADS, queries - 1)
                position = gl.load(positions_ptr + request * queries + asking).to(gl.int32)
                cached = tile * 64 + gl.arange(0, 64, layout=across)
                scores = gl.where(cached[None, :] <= position[:, None], scores, float("-inf"))
            if tile * 64 + 63 > furthest:
                for _ in gl.static_range(UNITS):
                    clear_hidden(latent_ring.index(first_slot), tile * 64, furthest, WIDTH)
                    first_slot, first_phase = advance(first_slot, first_phase, SLOTS)
            raised = gl.maximum(highest, gl.max(scores, 1) * LOG2_SCALE)
            decay = gl.exp2(highest - raised)
            highest = raised
            p = gl.exp2(scores * LOG2_SCALE - raised[:, None])
            weight = weight * decay + gl.sum(p, 1)
            mbarrier.wait(p_empty, p_phase ^ 1)
            p_phase ^= 1
            p_smem.store(p.to(gl.bfloat16))
            decay_smem.store(decay)
            fence_async_shared()
            mbarrier.arrive(p_full)

        whole = (begin == origin) & (stop == origin + tiles)
        piece = gl.program_id(1) * 2 + gl.where(begin == start, 0, 1)
        begin = stop
        origin += tiles
        request += 1
        if begin < end:
            load_query(query, q_latent_desc, q_rope_desc, request * total + first_row, UNITS, WIDTH)
        mbarrier.wait(done_empty, done_phase ^ 1)
        done_phase ^= 1
        inverse_smem.store(1.0 / gl.where(whole & (weight > 0), weight, 1.0))  # a row of the tile may be no query
        mbarrier.arrive(done_full)
        if not whole:
            at = stat_ptr + (piece * total + row) * 2
            gl.store(at, highest, mask=row < total)
            gl.store(at + 1, weight, mask=row < total)


@gluon.jit
def _wrap(slot, SLOTS: gl.constexpr):
    return gl.where(slot < SLOTS, slot, slot - SLOTS)


@gluon.jit
def _value(
    latents, exchange, done, positions_ptr, out_ptr, part_ptr, schedule, queries,
    SIDE: gl.constexpr, SPAN: gl.constexpr, HEADS: gl.constexpr, UNITS: gl.constexpr, WIDTH: gl.constexpr,
    SLOTS: gl.constexpr,
):  # fmt: skip
    """A value group: the latent boxes of its side times P, and at the end of a request its half of the output."""
    latent_ring, latent_full, latent_empty = latents
    p_smem, decay_smem, p_full, p_empty = exchange
    inverse_smem, done_full, done_empty = done
    begin, end, request, origin = schedule
    first_row = gl.program_id(0) * 64
    first = first_row // HEADS
    total = queries * HEADS
    LEFT: gl.constexpr = (UNITS + 1) // 2
    FIRST: gl.constexpr = LEFT * SIDE
    OWN: gl.constexpr = UNITS - LEFT if SIDE else LEFT
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    down: gl.constexpr = gl.SliceLayout(1, mma)
    RANK: gl.constexpr = UNITS * WIDTH
    # 16 bytes of a row per thread, 64 in a row, where the products leave 4 and 16. Exchanging one bit of the lane's
    # number at a time keeps this within registers.
    MORE: gl.constexpr = [[0, 32], [0, 64]] if WIDTH == 128 else [[0, 32]]
    halfway: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16]] + MORE, [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
        [64, WIDTH],
    )  # fmt: skip
    stored: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0]] + MORE, [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
        [64, WIDTH],
    )  # fmt: skip

    base = gl.to_tensor(0)  # ring slot of the tile's first box
    p_phase = gl.to_tensor(0)
    done_phase = gl.to_tensor(0)
    start = begin
    while begin < end:
        nearest, furthest = request_reach(positions_ptr, request, queries, first, SPAN)
        tiles = furthest // 64 + 1
        stop = gl.minimum(end, origin + tiles)
        acc = ()
        for _ in gl.static_range(OWN):
            acc = acc + (gl.zeros([64, WIDTH], gl.float32, layout=mma),)
        for _ in range(begin - origin, stop - origin):
            mbarrier.wait(p_full, p_phase)
            p_phase ^= 1
            decay = decay_smem.load(down)
            decayed = ()
            for unit in gl.static_range(OWN):
                decayed = decayed + (acc[unit] * decay[:, None],)
            acc = ()
            for unit in gl.static_range(OWN):
                box = latent_ring.index(_wrap(base + FIRST + unit, SLOTS))
                acc = acc + (warpgroup_mma(p_smem, box, decayed[unit], is_async=True),)
            for unit in gl.static_range(OWN):
                # Release each box as soon as its product is done: the ring holds hardly two tiles.
                if OWN == 1:
                    acc = (warpgroup_mma_wait(0, deps=acc),)
                else:
                    acc = warpgroup_mma_wait(OWN - 1 - unit, deps=acc)
                mbarrier.arrive(latent_empty.index(_wrap(base + FIRST + unit, SLOTS)))
            mbarrier.arrive(p_empty)
            base = _wrap(base + UNITS, SLOTS)

        whole = (begin == origin) & (stop == origin + tiles)
        piece = gl.program_id(1) * 2 + gl.where(begin == start, 0, 1)
        line = gl.where(whole, request, piece) * total
        target_ptr = gl.where(whole, out_ptr, part_ptr)
        begin = stop
        origin += tiles
        request += 1
        mbarrier.wait(done_full, done_phase)
        done_phase ^= 1
        inverse = inverse_smem.load(down)
        mbarrier.arrive(done_empty)
        row = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, stored))
        for unit in gl.static_range(OWN):
            column = (FIRST + unit) * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, stored))
            at = (line + row)[:, None] * RANK + column[None, :]
            values = (acc[unit] * inverse[:, None]).to(target_ptr.dtype.element_ty)
            values = gl.convert_layout(gl.convert_layout(values, halfway), stored)
            gl.store(target_ptr + at, values, mask=(row < total)[:, None])


@gluon.jit
def mla_decode_wide(
    q_latent_desc, q_rope_desc, latent_desc, rope_desc, positions_ptr, table_ptr, out_ptr, part_ptr, stat_ptr,
    requests, queries, request_stride,
    scale: gl.constexpr, SPAN: gl.constexpr, HEADS: gl.constexpr, REQUESTS: gl.constexpr, PAGED: gl.constexpr,
    UNITS: gl.constexpr, WIDTH: gl.constexpr, SLOTS: gl.constexpr, ROPE_SLOTS: gl.constexpr,
):  # fmt: skip
    """Grid (row tiles of 64, programs). Split requests leave parts for mla_merge; whole ones go to out."""
    gdc_launch_dependents()
    gdc_wait()
    reaches = load_reaches(positions_ptr, requests, queries, gl.program_id(0) * 64 // HEADS, SPAN, REQUESTS)
    # While positions are on their way:
    latents = make_ring(latent_desc, SLOTS, 1)
    ropes = make_ring(rope_desc, ROPE_SLOTS, 1)
    query = make_query(q_latent_desc, q_rope_desc, UNITS)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    p_smem = gl.allocate_shared_memory(gl.bfloat16, [64, 64], p_layout)
    decay_smem = gl.allocate_shared_memory(gl.float32, [64], flat)
    exchange = (p_smem, decay_smem, make_barriers(1, 1).index(0), make_barriers(1, 2).index(0))
    inverse_smem = gl.allocate_shared_memory(gl.float32, [64], flat)
    done = (inverse_smem, make_barriers(1, 1).index(0), make_barriers(1, 2).index(0))
    fence_async_shared()
    schedule = program_range(reaches, requests, gl.program_id(1), gl.num_programs(1))
    queries = gl.to_tensor(queries)
    request_stride = gl.to_tensor(request_stride)
    load_first_tile(latents, ropes, latent_desc, rope_desc, table_ptr, schedule, request_stride, PAGED, UNITS, WIDTH)
    gl.warp_specialize(
        [
            (_score, (latents, ropes, query, exchange, done, q_latent_desc, q_rope_desc, positions_ptr, stat_ptr,
                      schedule, queries, scale, SPAN, HEADS, UNITS, WIDTH, SLOTS, ROPE_SLOTS)),
            (_value, (latents, exchange, done, positions_ptr, out_ptr, part_ptr, schedule, queries,
                      0, SPAN, HEADS, UNITS, WIDTH, SLOTS)),
            (_value, (latents, exchange, done, positions_ptr, out_ptr, part_ptr, schedule, queries,
                      1, SPAN, HEADS, UNITS, WIDTH, SLOTS)),
            (load_cache, (latents, ropes, latent_desc, rope_desc, positions_ptr, table_ptr, schedule, queries,
                          request_stride, 64, HEADS, SPAN, PAGED, UNITS, WIDTH, SLOTS, ROPE_SLOTS)),
        ],
        [4, 4, 1],
        [176, 176, 24],
    )  # fmt: skip
