"""MLA decode on Hopper: which kernel for which shape, its sizes, and the launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from codegen.kernels.sm_90.mla_decode import mla_decode_narrow
from codegen.kernels.sm_90.mla_decode_wide import mla_decode_wide
from codegen.kernels.sm_90.mla_merge import mla_merge

SHARED_BYTES = 227 * 1024  # what one program can have on Hopper
TILE = 64


@dataclass(frozen=True)
class Narrow:
    """Sizes of the transposed kernel: `groups` warp groups of `rows` query rows, boxes of `width` latent columns."""

    groups: int
    rows: int
    width: int
    rope_slots: int = 3

    @property
    def tile_rows(self) -> int:
        return self.groups * self.rows


@dataclass(frozen=True)
class Wide:
    """Sizes of the 64-row kernel with two value groups of `registers` registers a thread."""

    width: int
    rope_slots: int = 2
    registers: int = 176

    @property
    def tile_rows(self) -> int:
        return 64


Form = Narrow | Wide


def pow2(n: int) -> int:
    return triton.next_power_of_2(n)


def slots(form: Form, rank: int, rope: int) -> int:
    """Boxes of latent columns that fit beside the query, the rope ring and the scratch."""
    row_bytes = 2 * (rank + rope)
    fixed = form.tile_rows * row_bytes + form.rope_slots * TILE * rope * 2 + TILE * form.tile_rows * 2 + 2048
    return (SHARED_BYTES - fixed) // (TILE * form.width * 2)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _rows(x: Tensor, height: int, width: int) -> TensorDescriptor:
    """A descriptor of x [..., columns] as rows, in boxes of height × width."""
    flat = x.reshape(-1, x.shape[-1])
    layout = gl.NVMMASharedLayout.get_default_for([height, width], gl.bfloat16)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [height, width], layout)


def choose(rows: int, requests: int, tokens: int, sms: int) -> Form:
    if rows <= 16:
        return Narrow(1, max(8, pow2(rows)), 128)
    if rows <= 32:
        return Narrow(2, pow2(rows) // 2, 128)
    return Wide(128)


def decode(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope_key: Tensor, positions: Tensor, scale: float,
    table: Tensor | None = None, form: Form | None = None, programs: int | None = None, merge: bool = True,
) -> Tensor:  # fmt: skip
    """latent [B, T, C] and rope_key [B, T, R], or pages [pages, 64, ·] with table [B, max_pages] int32."""
    requests, queries, heads, rank = q_latent.shape
    rope = rope_key.shape[-1]
    rows = queries * heads
    sms = multiprocessors(q_latent.device)
    form = form or choose(rows, requests, 0, sms)
    row_tiles = triton.cdiv(rows, form.tile_rows)
    programs = programs or max(1, sms // row_tiles)
    box = pow2(max(rope, 16))
    tile = form.rows if isinstance(form, Narrow) else 64
    out = torch.empty_like(q_latent)
    parts = torch.empty((programs, 2, rows, rank), dtype=torch.float32, device=out.device)
    stats = torch.empty((programs, 2, rows, 2), dtype=torch.float32, device=out.device)
    arguments = (
        _rows(q_latent, tile, form.width), _rows(q_rope, tile, box), _rows(latent, TILE, form.width),
        _rows(rope_key, TILE, box), positions, positions if table is None else table, out, parts, stats, requests,
        latent.shape[1] if table is None else table.stride(0),
    )  # fmt: skip
    common = dict(
        scale=scale, QUERIES=queries, HEADS=heads, REQUESTS=pow2(requests), PAGED=table is not None,
        UNITS=rank // form.width, WIDTH=form.width, SLOTS=slots(form, rank, box), ROPE_SLOTS=form.rope_slots,
    )  # fmt: skip
    grid = (programs, row_tiles)
    if isinstance(form, Narrow):
        mla_decode_narrow[grid](
            *arguments, **common, GROUPS=form.groups, ROWS=form.rows, GROUP_REGISTERS=208,
            num_warps=4, maxnreg=128 if form.groups == 1 else 168,
        )  # fmt: skip
    else:
        mla_decode_wide[grid](*arguments, **common, VALUE_REGISTERS=form.registers, num_warps=4, maxnreg=128)
    if not merge:
        return out
    width = 128 if rank % 128 == 0 else 64
    mla_merge[(requests, max(1, min(rows * (rank // width), 4 * sms // requests)))](
        positions, parts, stats, out, requests, programs, QUERIES=queries, TOTAL=rows, RANK=rank,
        REQUESTS=pow2(requests), PARTS=max(4, min(64, pow2(programs // requests + 1))), WIDTH=width,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return out
