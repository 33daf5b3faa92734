"""SwiGLU of rows that hold gate and up side by side."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.layout import as_rows, cdiv, started_early

BLOCK_I = 1024


@triton.jit
def limited(gate, up, LIMIT: tl.constexpr):
    """Gates up to LIMIT and ups within ± LIMIT, if there is one; what is no number stays none."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate, up


@triton.jit
def gated(gate, up, LIMIT: tl.constexpr):
    gate, up = limited(gate, up, LIMIT)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def swiglu_kernel(
    gate_up,
    out,
    stride,
    LIMIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_I: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = column < WIDTH
    if OVERLAPPED:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, gated(gate, up, LIMIT).to(out.dtype.element_ty), mask=inside)


def gated_rows(gate_up: Tensor, limit: float | None, overlapped: bool = False) -> Tensor:
    """gate_up [.., 2I] → [.., I]; overlapped: with programmatic dependent launch."""
    rows = as_rows(gate_up)
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    swiglu_kernel[(rows.shape[0], cdiv(width, BLOCK_I))](
        rows,
        out,
        rows.stride(0),
        LIMIT=limit,
        WIDTH=width,
        BLOCK_I=BLOCK_I,
        OVERLAPPED=overlapped,
        num_warps=4,
        **started_early(overlapped),
    )
    return out


def swiglu(gate_up: Tensor, limit: float | None = None) -> Tensor:
    """gate_up [.., 2I] → [.., I]."""
    return gated_rows(gate_up, limit)
