"""Sharing a ragged batch out among the programs of a decode kernel, on the device and without a host round trip.

The cached rows of a request are cut into tiles of 64 positions. All tiles of the batch form one line, request after
request; program c takes the tiles [c·quota, (c+1)·quota). A program therefore meets at most two requests that it
shares with others, one at each end of its range.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TILE = 64


@gluon.jit
def _add(left, right):
    return left + right


@gluon.jit
def request_reach(positions_ptr, request, QUERIES: gl.constexpr):
    """The nearest and the furthest position that the queries of one request attend to."""
    nearest = gl.maximum(gl.load(positions_ptr + request * QUERIES).to(gl.int32), 0)
    furthest = nearest
    for s in gl.static_range(1, QUERIES):
        position = gl.maximum(gl.load(positions_ptr + request * QUERIES + s).to(gl.int32), 0)
        nearest = gl.minimum(nearest, position)
        furthest = gl.maximum(furthest, position)
    return nearest, furthest


@gluon.jit
def _all_tiles(positions_ptr, requests, QUERIES: gl.constexpr, REQUESTS: gl.constexpr):
    """Tiles of every request and where each request ends in the line, as vectors over the padded batch."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    request = gl.arange(0, REQUESTS, layout=layout)
    inside = request < requests
    furthest = gl.zeros([REQUESTS], gl.int32, layout=layout)
    for s in gl.static_range(QUERIES):
        position = gl.load(positions_ptr + request * QUERIES + s, mask=inside, other=0)
        furthest = gl.maximum(furthest, position.to(gl.int32))
    tiles = gl.where(inside, furthest // 64 + 1, 0)
    return tiles, gl.associative_scan(tiles, 0, _add)


@gluon.jit
def _quota(total, longest, requests, programs):
    """Tiles per program. Equal requests are not cut where whole ones load the programs about as evenly."""
    quota = (total + programs - 1) // programs
    whole = (quota + longest - 1) // longest * longest
    uniform = (longest * requests == total) & (whole * 16 <= quota * 17)
    return gl.where(uniform, whole, quota)


@gluon.jit
def program_range(positions_ptr, requests, program, programs, QUERIES: gl.constexpr, REQUESTS: gl.constexpr):
    """Tile range of a program, the request in which it begins, and that request's place in the line."""
    if REQUESTS == 1:
        nearest, furthest = request_reach(positions_ptr, 0, QUERIES)
        total = furthest // 64 + 1
        quota = _quota(total, total, 1, programs)
        begin = gl.minimum(program * quota, total)
        return begin, gl.minimum(begin + quota, total), 0, 0
    tiles, ends = _all_tiles(positions_ptr, requests, QUERIES, REQUESTS)
    total = gl.sum(tiles, 0)
    quota = _quota(total, gl.max(tiles, 0), requests, programs)
    begin = gl.minimum(program * quota, total)
    passed = ends <= begin
    first = gl.sum(gl.where(passed & (tiles > 0), 1, 0), 0)
    origin = gl.max(gl.where(passed, ends, 0), 0)
    return begin, gl.minimum(begin + quota, total), first, origin


@gluon.jit
def request_programs(positions_ptr, requests, request, programs, QUERIES: gl.constexpr, REQUESTS: gl.constexpr):
    """The first and the last program that work on a request, its place in the line, and the tiles per program."""
    if REQUESTS == 1:
        nearest, furthest = request_reach(positions_ptr, 0, QUERIES)
        total = furthest // 64 + 1
        quota = _quota(total, total, 1, programs)
        return 0, (total - 1) // quota, 0, quota
    tiles, ends = _all_tiles(positions_ptr, requests, QUERIES, REQUESTS)
    quota = _quota(gl.sum(tiles, 0), gl.max(tiles, 0), requests, programs)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    before = gl.arange(0, REQUESTS, layout=layout) < request
    origin = gl.max(gl.where(before, ends, 0), 0)
    end = gl.max(gl.where(gl.arange(0, REQUESTS, layout=layout) == request, ends, 0), 0)
    return origin // quota, (end - 1) // quota, origin, quota
