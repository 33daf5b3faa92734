"""Sharing a ragged batch out among the programs of a decode kernel, on the device and without a host round trip.

The cached rows of a request are cut into tiles of 64 positions, as many as the queries of a row tile attend to. All
tiles of the batch form one line, request after request; program c takes the tiles [c·quota, (c+1)·quota). A program
therefore meets at most two requests that it shares with others, one at each end of its range.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TILE = 64


@gluon.jit
def _add(left, right):
    return left + right


@gluon.jit
def request_reach(positions_ptr, request, queries, first, SPAN: gl.constexpr):
    """The nearest and the furthest position that the SPAN queries from `first` on attend to in one request."""
    nearest = gl.maximum(gl.load(positions_ptr + request * queries + first).to(gl.int32), 0)
    furthest = nearest
    for s in gl.static_range(1, SPAN):
        query = request * queries + gl.minimum(first + s, queries - 1)
        position = gl.maximum(gl.load(positions_ptr + query).to(gl.int32), 0)
        nearest = gl.minimum(nearest, position)
        furthest = gl.maximum(furthest, position)
    return nearest, furthest


@gluon.jit
def load_reaches(positions_ptr, requests, queries, first, SPAN: gl.constexpr, REQUESTS: gl.constexpr):
    """The furthest position of those queries in every request of the padded batch, and -1 behind its end."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    request = gl.arange(0, REQUESTS, layout=layout)
    furthest = gl.where(request < requests, 0, -1)
    for s in gl.static_range(SPAN):
        query = request * queries + gl.minimum(first + s, queries - 1)
        position = gl.load(positions_ptr + query, mask=request < requests, other=-1)
        furthest = gl.maximum(furthest, position.to(gl.int32))
    return furthest


@gluon.jit
def _share(reaches, requests, programs):
    """(tiles of each request, where each ends in the line, the line's length, tiles per program).

    Equal requests are not cut where whole ones load the programs about as evenly.
    """
    tiles = (reaches + 64) // 64
    ends = gl.associative_scan(tiles, 0, _add)
    total = gl.sum(tiles, 0)
    longest = gl.max(tiles, 0)
    quota = (total + programs - 1) // programs
    whole = (quota + longest - 1) // longest * longest
    uniform = (longest * requests == total) & (whole * 16 <= quota * 17)
    return tiles, ends, total, gl.where(uniform, whole, quota)


@gluon.jit
def program_range(reaches, requests, program, programs):
    """Tile range of a program, the request in which it begins, and that request's place in the line."""
    tiles, ends, total, quota = _share(reaches, requests, programs)
    begin = gl.minimum(program * quota, total)
    passed = (ends <= begin) & (tiles > 0)
    first = gl.sum(gl.where(passed, 1, 0), 0)
    origin = gl.max(gl.where(passed, ends, 0), 0)
    return begin, gl.minimum(begin + quota, total), first, origin


@gluon.jit
def request_programs(reaches, requests, request, programs, REQUESTS: gl.constexpr):
    """The first and the last program that work on a request, its place in the line, and the tiles per program."""
    tiles, ends, total, quota = _share(reaches, requests, programs)
    number = gl.arange(0, REQUESTS, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    end = gl.max(gl.where(number <= request, ends, 0), 0)
    origin = gl.max(gl.where(number < request, ends, 0), 0)
    return origin // quota, (end - 1) // quota, origin, quota
