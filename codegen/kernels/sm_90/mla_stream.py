"""The latent cache as a stream: a ring of tiles in shared memory that one warp keeps full through the copy engine.

A tile is 64 cached positions. Its latent columns travel as UNITS boxes of WIDTH columns through one ring, its rope key
as one box through another; every slot of a ring has a barrier for "full" and one for "empty".
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from codegen.kernels.sm_90.mla_schedule import request_reach
from codegen.kernels.sm_90.rings import advance, make_barriers


@gluon.jit
def make_ring(desc, SLOTS: gl.constexpr, CONSUMERS: gl.constexpr):
    """(buffers, full, empty) for boxes of a descriptor; a slot is empty again once CONSUMERS have released it."""
    buffers = gl.allocate_shared_memory(desc.dtype, [SLOTS] + desc.block_type.shape, desc.layout)
    return buffers, make_barriers(SLOTS, 1), make_barriers(SLOTS, CONSUMERS)


@gluon.jit
def _first_row(table_ptr, request, request_stride, tile, PAGED: gl.constexpr):
    if PAGED:
        return gl.load(table_ptr + request * request_stride + tile) * 64
    else:
        return request * request_stride + tile * 64


@gluon.jit
def _copy(ring, desc, row, column, slot):
    buffers, full, _ = ring
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [row, column], full.index(slot), buffers.index(slot))


@gluon.jit
def _fill(ring, desc, row, column, slot, phase):
    mbarrier.wait(ring[2].index(slot), phase ^ 1)
    _copy(ring, desc, row, column, slot)


@gluon.jit
def load_first_tile(
    latents, ropes, latent_desc, rope_desc, table_ptr, schedule, request_stride, PAGED: gl.constexpr,
    UNITS: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Asks for the first tile of the program's range, before the warps part."""
    begin, end, request, origin = schedule
    if begin < end:
        row = _first_row(table_ptr, request, request_stride, begin - origin, PAGED)
        for unit in gl.static_range(UNITS):
            _copy(latents, latent_desc, row, unit * WIDTH, unit)
        _copy(ropes, rope_desc, row, 0, 0)


@gluon.jit
def load_cache(
    latents, ropes, latent_desc, rope_desc, positions_ptr, table_ptr, schedule, queries, request_stride,
    TILE_ROWS: gl.constexpr, HEADS: gl.constexpr, SPAN: gl.constexpr, PAGED: gl.constexpr, UNITS: gl.constexpr,
    WIDTH: gl.constexpr, SLOTS: gl.constexpr, ROPE_SLOTS: gl.constexpr,
):  # fmt: skip
    """The loading warp: streams all tiles of the program's range but the first, without a pause where a request ends.

    request_stride is the distance between requests in cache rows, or in table entries where the cache is paged.
    """
    begin, end, request, origin = schedule
    first = gl.program_id(0) * TILE_ROWS // HEADS
    slot = gl.to_tensor(UNITS)
    phase = gl.to_tensor(0)
    rope_slot = gl.to_tensor(1)
    rope_phase = gl.to_tensor(0)
    unasked = begin + 1
    while begin < end:
        nearest, furthest = request_reach(positions_ptr, request, queries, first, SPAN)
        tiles = furthest // 64 + 1
        stop = gl.minimum(end, origin + tiles)
        for tile in range(unasked - origin, stop - origin):
            row = _first_row(table_ptr, request, request_stride, tile, PAGED)
            for unit in gl.static_range(UNITS):
                _fill(latents, latent_desc, row, unit * WIDTH, slot, phase)
                slot, phase = advance(slot, phase, SLOTS)
            _fill(ropes, rope_desc, row, 0, rope_slot, rope_phase)
            rope_slot, rope_phase = advance(rope_slot, rope_phase, ROPE_SLOTS)
        begin = stop
        unasked = stop
        origin += tiles
        request += 1


@gluon.jit
def make_query(q_latent_desc, q_rope_desc, UNITS: gl.constexpr):
    """(latent boxes, rope box, barrier) for the query rows that one warp group works on."""
    latent_smem = gl.allocate_shared_memory(
        q_latent_desc.dtype, [UNITS] + q_latent_desc.block_type.shape, q_latent_desc.layout
    )
    rope_smem = gl.allocate_shared_memory(q_rope_desc.dtype, q_rope_desc.block_type.shape, q_rope_desc.layout)
    return latent_smem, rope_smem, make_barriers(1, 1).index(0)


@gluon.jit
def load_query(query, q_latent_desc, q_rope_desc, row, UNITS: gl.constexpr, WIDTH: gl.constexpr):
    """Starts copying the query rows of one request from `row` on."""
    latent_smem, rope_smem, full = query
    mbarrier.expect(full, UNITS * q_latent_desc.block_type.nbytes + q_rope_desc.block_type.nbytes)
    for unit in gl.static_range(UNITS):
        tma.async_copy_global_to_shared(q_latent_desc, [row, unit * WIDTH], full, latent_smem.index(unit))
    tma.async_copy_global_to_shared(q_rope_desc, [row, 0], full, rope_smem)


@gluon.jit
def clear_hidden(buffer, first, furthest, WIDTH: gl.constexpr):
    """Zero the rows of a box that lie behind position `furthest`: they may hold anything, and 0 · NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    visible = first + gl.arange(0, 64, layout=gl.SliceLayout(1, layout)) <= furthest
    for column in gl.static_range(0, WIDTH, 64):
        part = buffer.slice(column, 64, dim=1)
        part.store(gl.where(visible[:, None], part.load(layout), 0.0))
    fence_async_shared()
