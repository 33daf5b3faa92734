"""Joining the parts of requests that several programs of a decode kernel worked on.

Part i of a query row is its output Oᵢ over the part's positions, its largest score mᵢ, and the sum lᵢ of
2^(score − mᵢ). The whole is Σ wᵢ Oᵢ / Σ wᵢ with wᵢ = lᵢ · 2^(mᵢ − max m).

A launch of its own, because what was tried in its place is worse in general. One cluster of programs per request,
joined through its shared memory, wins where requests are equally long and loses more where they are not; and the chip
fits fewer clusters of eight than its multiprocessors would allow. Parts that carry a mark, so that the programs of the
decode kernel can wait for each other's, cost more to write than the launch.
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
    PARTS: gl.constexpr, WIDTH: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """Grid (requests, row tiles, programs for each). A step joins PARTS parts of WIDTH columns of one row.

    The warps share the parts of a step where SPREAD is set, its columns where it is not. Launched while the decode
    kernel still runs; a request that one program did alone is already in out.
    """
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
                program = start + gl.arange(0, PARTS, layout=down)
                inside = program <= last
                # The request is a program's first one unless it begins in the middle of the program's range.
                part = (program * 2 + gl.where(program * quota < origin, 1, 0)) * total + row
                values = gl.load(part_ptr + part[:, None] * RANK + column[None, :], mask=inside[:, None], other=0.0)
                peak = gl.load(stat_ptr + part * 2, mask=inside, other=-1.0e30)
                sums = gl.load(stat_ptr + part * 2 + 1, mask=inside, other=0.0)
                raised = gl.maximum(highest, gl.max(peak, 0))
                share = gl.exp2(peak - raised) * sums
                decay = gl.exp2(highest - raised)
                weight = weight * decay + gl.sum(share, 0)
                acc = acc * decay + gl.sum(values.to(gl.float32) * share[:, None], 0)
                highest = raised
            gl.store(out_ptr + (request * total + row) * RANK + column, (acc / weight).to(gl.bfloat16))
