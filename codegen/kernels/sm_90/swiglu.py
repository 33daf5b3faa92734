"""SwiGLU on Hopper: it starts while the kernel before drains, and lets the product behind it read its weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.layout import as_rows
from codegen.kernels.swiglu import gated

BLOCK_I = 1024


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


def swiglu(gate_up: Tensor, limit: float | None = None) -> Tensor:
    """Kernel of the op `swiglu`: gate_up [.., 2I] → [.., I]."""
    rows = as_rows(gate_up)
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    swiglu_kernel[(rows.shape[0], triton.cdiv(width, BLOCK_I))](
        rows,
        out,
        rows.stride(0),
        LIMIT=limit,
        WIDTH=width,
        BLOCK_I=BLOCK_I,
        OVERLAPPED=gate_up.is_cuda,
        num_warps=4,
        launch_pdl=gate_up.is_cuda,
    )
    return out
