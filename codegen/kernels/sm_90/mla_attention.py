"""MLA decode on Hopper: which kernel and which sizes for which shape, and the launches.

Few query rows are bound by the cache's bytes and go to the transposed kernel, many by the matrix units and go to the
64-row kernel. Sizes are the fastest measured on one H200.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from codegen.kernels.layout import cdiv, next_power_of_2
from codegen.kernels.sm_90.boxes import aligned, in_boxes, starts_aligned
from codegen.kernels.sm_90.mla_decode import mla_decode_narrow
from codegen.kernels.sm_90.mla_decode_wide import mla_decode_wide
from codegen.kernels.sm_90.mla_merge import mla_merge

SHARED_BYTES = 227 * 1024 - 2560  # what one program can have on Hopper, less barriers and the scratch of reductions
TILE = 64  # cached positions, and the page size
# Up to so many cached positions, for few enough rows, a row tile of 16 beats one of 64: having fewer parts to join
# outweighs reading the cache more often.
SHORT = 8192
SHORT_ROWS = 256
# Every form of up to 128 requests: decode kernels differ by `padded` and by contexts on both sides of SHORT, the merge
# also by how many programs a request may have. More requests are compiled when they come.
TRIED_SIZES = {"B": (1, 2, 3, 5, 8, 13, 23, 100), "T": (1, 300, 500, 700, 1500, 2100, 4099, 40009)}


@dataclass(frozen=True)
class Form:
    """How a call is cut: `groups` warp groups of `rows` query rows (0 groups: the 64-row kernel), boxes of `width`."""

    groups: int
    rows: int
    width: int
    rope_slots: int

    @property
    def tile_rows(self) -> int:
        return max(1, self.groups) * self.rows

    def span(self, heads: int) -> int:
        """Query positions that the rows of a tile can belong to."""
        aligned = heads % self.tile_rows == 0 or self.tile_rows % heads == 0
        return cdiv(self.tile_rows, heads) if aligned else (self.tile_rows - 2) // heads + 2

    def slots(self, rank: int, rope: int) -> int:
        """Boxes of latent columns that fit beside the query, the rope keys and the probabilities."""
        query, probabilities = self.tile_rows * (rank + rope) * 2, self.tile_rows * TILE * 2
        left = SHARED_BYTES - query - probabilities - self.rope_slots * TILE * rope * 2
        return min(16, left // (TILE * self.width * 2))


def choose_form(rows: int, rank: int, positions: int) -> Form:
    """rows = queries · heads of a request; positions = cached positions of all requests together, at most."""
    width = rank & -rank  # the largest power of two that divides it
    if rows <= 16 or (positions <= SHORT and rows <= SHORT_ROWS):
        return Form(1, min(16, max(8, next_power_of_2(rows))), min(256, width), 3)
    if rows <= 32:
        return Form(2, next_power_of_2(rows) // 2, min(256, width), 2)
    return Form(0, 64, 128 if rank % 256 == 0 else 64, 2)


def serves(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope_key: Tensor, positions: Tensor, scale: float
) -> str | None:
    """Why this form does not serve a call, or None."""
    if any(x.dtype != torch.bfloat16 for x in (q_latent, q_rope, latent, rope_key)):
        return "not all bfloat16"
    if latent.shape[-1] % 64 or not 128 <= latent.shape[-1] <= 512:
        return "rank is not a multiple of 64 from 128 to 512"
    if rope_key.shape[-1] % 8 or rope_key.shape[-1] > 128:
        return "rope size is not a multiple of 8 up to 128"
    if scale <= 0:
        return "scale is not positive"
    return None


def cache_view(x: Tensor) -> tuple[Tensor, int]:
    """x [B, T, D] as rows [N, D] without a copy where its strides allow, and the rows from one request to the next."""
    if x.stride(2) != 1 or x.stride(1) % 8 or x.stride(0) % x.stride(1) or not starts_aligned(x):
        x = x.clone(memory_format=torch.contiguous_format)
    step = x.stride(0) // x.stride(1)
    rows = (x.shape[0] - 1) * step + x.shape[1]
    return x.as_strided((rows, x.shape[2]), (x.stride(1), 1)), step


def mla_attention(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope_key: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """q_latent [B, S, H, C], q_rope [B, S, H, R], latent [B, T, C], rope_key [B, T, R], positions [B, S] int64
    → [B, S, H, C]; all bfloat16.
    """
    if q_latent.numel() == 0:
        return torch.empty_like(q_latent)
    latent_rows, step = cache_view(latent)
    rope_rows, rope_step = cache_view(rope_key)
    if step != rope_step:
        latent_rows, rope_rows, step = latent.flatten(0, 1), rope_key.flatten(0, 1), latent.shape[1]
    reach = latent.shape[0] * latent.shape[1]
    return decode(q_latent, q_rope, latent_rows, rope_rows, None, step, positions, scale, reach)


def paged_mla_attention(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope_key: Tensor, table: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """The same over pages: latent [pages, 64, C], rope_key [pages, 64, R], table [B, most pages] int32.

    Row t of request b lies in page table[b, t // 64] at t % 64.
    """
    if q_latent.numel() == 0:
        return torch.empty_like(q_latent)
    pages = (latent.reshape(-1, latent.shape[2]), rope_key.reshape(-1, rope_key.shape[2]))
    reach = table.shape[0] * table.shape[1] * TILE
    return decode(q_latent, q_rope, *pages, table, table.stride(0), positions, scale, reach)


def decode(
    q_latent: Tensor,
    q_rope: Tensor,
    latent_rows: Tensor,
    rope_rows: Tensor,
    table: Tensor | None,
    step: int,
    positions: Tensor,
    scale: float,
    reach: int,
) -> Tensor:
    """step: cache rows, or table entries, from one request to the next. reach: cached positions at most, in all."""
    requests, queries, heads, rank = q_latent.shape
    rows, rope = queries * heads, next_power_of_2(max(16, rope_rows.shape[1]))
    form = choose_form(rows, rank, reach)
    span = min(queries, form.span(heads))
    row_tiles = cdiv(rows, form.tile_rows)
    device = q_latent.device
    programs = max(1, torch.cuda.get_device_properties(device).multi_processor_count // row_tiles)
    out = torch.empty((requests, queries, heads, rank), dtype=q_latent.dtype, device=device)
    part_rows = rows if programs > 1 else 0
    # As exact as what they sum: weights in bfloat16.
    parts = torch.empty((programs, 2, part_rows, rank), dtype=q_latent.dtype, device=device)
    stats = torch.empty((programs, 2, part_rows, 8 if form.groups else 2), dtype=torch.float32, device=device)
    positions = positions.contiguous()
    padded = padded_requests(requests)
    arguments = (
        in_boxes(aligned(q_latent.reshape(-1, rank)), form.rows, form.width),
        in_boxes(aligned(q_rope.reshape(rows * requests, -1)), form.rows, rope),
        in_boxes(latent_rows, TILE, form.width),
        in_boxes(rope_rows, TILE, rope),
        positions,
        positions if table is None else table,
        out,
        parts,
        stats,
        requests,
        queries,
        step,
    )
    if form.groups:
        mla_decode_narrow[(row_tiles, programs)](
            *arguments,
            scale=scale,
            SPAN=span,
            HEADS=heads,
            REQUESTS=padded,
            PAGED=table is not None,
            GROUPS=form.groups,
            ROWS=form.rows,
            UNITS=rank // form.width,
            WIDTH=form.width,
            SLOTS=form.slots(rank, rope),
            ROPE_SLOTS=form.rope_slots,
            num_warps=4,
            maxnreg=168,
            launch_pdl=True,
        )
    else:
        mla_decode_wide[(row_tiles, programs)](
            *arguments,
            scale=scale,
            SPAN=span,
            HEADS=heads,
            REQUESTS=padded,
            PAGED=table is not None,
            UNITS=rank // form.width,
            WIDTH=form.width,
            SLOTS=form.slots(rank, rope),
            ROPE_SLOTS=form.rope_slots,
            num_warps=4,
            maxnreg=128,
            launch_pdl=True,
        )
    if programs > 1:
        most, width, spread, warps = joining(programs, requests, cdiv(reach, TILE), rank)
        steps = form.tile_rows * (rank // width)
        mla_merge[(requests, row_tiles, max(1, min(steps, 2048 // (requests * row_tiles))))](
            positions,
            parts,
            stats,
            out,
            requests,
            queries,
            programs,
            TILE_ROWS=form.tile_rows,
            HEADS=heads,
            SPAN=span,
            RANK=rank,
            REQUESTS=padded,
            PARTS=most,
            WIDTH=width,
            SPREAD=spread,
            UNIT=form.width if form.groups else 0,
            num_warps=warps,
            maxnreg=72 if spread and form.groups else None,  # so that its warps fit beside the decode kernel's
            launch_pdl=True,
        )
    return out


def padded_requests(requests: int) -> int:
    """For how many a schedule is compiled: one; a warp of them, which is then known to be the same in all threads and
    takes few registers; or four, in as few steps as two."""
    return 1 if requests == 1 else 32 if requests <= 32 else max(128, next_power_of_2(requests))


def joining(programs: int, requests: int, tiles: int, rank: int) -> tuple[int, int, bool, int]:
    """(parts at a time, columns at a time, whether warps share the parts, warps) for the merge.

    tiles: of all requests together, at most.
    """
    expected = cdiv(cdiv(tiles, cdiv(tiles, programs)), requests)
    if expected > 24:
        parts = 64 if expected <= 80 else 128
        return parts, 64, True, parts // 16
    width = min(512, rank & -rank)
    return max(4, next_power_of_2(expected)), width, False, max(1, width // 256)
