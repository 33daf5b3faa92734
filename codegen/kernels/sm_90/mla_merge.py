"""Joining the parts of requests that several programs of a decode kernel worked on.

Part i of a query row is a number mᵢ about as large as its largest score, the sum lᵢ of p = 2^(score − mᵢ) over the
part's positions, and the sum Oᵢ of p · latent. The whole is Σ wᵢ Oᵢ / Σ wᵢ lᵢ with wᵢ = 2^(mᵢ − max m).

A launch of its own, because what was tried in its place is worse in general. One cluster of programs per request,
joined through its shared memory, wins where requests are equally long and loses more where they are not; and the chip
fits fewer clusters of eight than its multiprocessors would allow. Programs of the decode kernel that wait for each
other, each joining a share, save the launch and still take 0.5 µs longer for 16 requests of 4096 and up to 5 µs for
others, even where a number that no product has tells what is not there yet, so that waiting needs no fence or counter.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.sm_90.mla_schedule import load_reaches, request_programs


@gluon.jit
def mla_merge(
    positions_ptr, part_ptr, stat_ptr, out_ptr, requests, queries, programs,
    TILE_ROWS: gl.constexpr, HEADS: gl.constexpr, SPAN: gl.constexpr, RANK: gl.constexpr, REQUESTS: gl.constexpr,
    PARTS: gl.constexpr, WIDTH: gl.constexpr, SPREAD: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """Grid (requests, row tiles, programs for each). A step joins PARTS parts of WIDTH columns of one row.

    The warps share the parts of a step where SPREAD is set, its columns where it is not. Launched while the decode
    kernel still runs; a request that one program did alone is already in out. Row by row, stat holds mᵢ and lᵢ. UNIT,
    for parts of mla_decode_narrow: how many columns lie together in the order in which it has them in registers; then
    stat holds eight numbers, mᵢ four times and four that add up to lᵢ.
    """
    STATS: gl.constexpr = 8 if UNIT > 0 else 2
    request = gl.program_id(0)
    first_row = gl.program_id(1) * TILE_ROWS
    total = queries * HEADS
    reaches = load_reaches(positions_ptr, requests, queries, first_row // HEADS, SPAN, REQUESTS)
    first, last, origin, quota = request_programs(reaches, requests, request, programs, REQUESTS)
    warps: gl.constexpr = [gl.num_warps(), 1] if SPREAD else [1, gl.num_warps()]
    lanes: gl.constexpr = [1, 32] if WIDTH >= 256 else [256 // WIDTH, WIDTH // 8]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], lanes, warps, [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, layout)
    across: gl.constexpr = gl.SliceLayout(0, layout)
    # Four sums have a part per lane: those of every part in every thread would take too many registers.
    narrow: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], warps, [1, 0])
    lane: gl.constexpr = gl.SliceLayout(1, narrow)
    number = gl.arange(0, 4, layout=gl.SliceLayout(0, narrow))
    gdc_launch_dependents()
    gdc_wait()
    if first < last:
        rows = gl.minimum(total - first_row, TILE_ROWS)
        for step in range(gl.program_id(2), rows * (RANK // WIDTH), gl.num_programs(2)):
            row = first_row + step // (RANK // WIDTH)
            column = step % (RANK // WIDTH) * WIDTH + gl.arange(0, WIDTH, layout=across)
            highest = gl.to_tensor(-1.0e30)
            weight = gl.to_tensor(0.0)
            acc = gl.zeros([WIDTH], gl.float32, layout=across)
            for start in range(first, last + 1, PARTS):
                inside = start + gl.arange(0, PARTS, layout=down) <= last
                part = _part(start + gl.arange(0, PARTS, layout=down), quota, origin) * total + row
                values = gl.load(part_ptr + part[:, None] * RANK + column[None, :], mask=inside[:, None], other=0.0)
                peak = gl.load(stat_ptr + part * STATS, mask=inside, other=-1.0e30)
                raised = gl.maximum(highest, gl.max(peak, 0))
                decay = gl.exp2(highest - raised)
                if UNIT > 0:
                    inside = start + gl.arange(0, PARTS, layout=lane) <= last
                    stat = (_part(start + gl.arange(0, PARTS, layout=lane), quota, origin) * total + row) * STATS
                    own_peak = gl.load(stat_ptr + stat, mask=inside, other=-1.0e30)
                    sums = gl.load(stat_ptr + stat[:, None] + 4 + number[None, :], mask=inside[:, None], other=0.0)
                    added = gl.sum(gl.exp2(own_peak - raised) * gl.sum(sums, 1), 0)
                else:
                    sums = gl.load(stat_ptr + part * STATS + 1, mask=inside, other=0.0)
                    added = gl.sum(gl.exp2(peak - raised) * sums, 0)
                weight = weight * decay + added
                share = gl.exp2(peak - raised)
                acc = acc * decay + gl.sum(values.to(gl.float32) * share[:, None], 0)
                highest = raised
            if UNIT > 0:
                # Per row, a thread of a warp group holds UNIT / 32 neighbours: two in each block of 64 columns.
                NEAR: gl.constexpr = UNIT // 32
                thread, value = column % UNIT // NEAR, column % NEAR
                column += value // 2 * 64 + thread // 8 * 16 + value % 2 * 8 + thread % 8 - column % UNIT
            # Read by the next kernel and written again by the next call: not worth a trip to memory.
            at = (request * total + row) * RANK + column
            gl.store(out_ptr + at, (acc / weight).to(gl.bfloat16), eviction_policy="evict_last")


@gluon.jit
def _part(program, quota, origin):
    """Where a program's part lies: the request is its first one unless it begins in the middle of its range."""
    return program * 2 + gl.where(program * quota < origin, 1, 0)
