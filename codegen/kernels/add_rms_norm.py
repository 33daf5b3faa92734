"""Residual sum and its RMSNorm in one pass over memory."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from codegen.kernels.layout import as_rows, packed
from codegen.kernels.rms_norm import rms_norm_kernel


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [.., D], weight [D] → (rms_norm(sum), sum), both [.., D]."""
    x_rows, residual_rows = as_rows(x), as_rows(residual)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    BLOCK_D = triton.next_power_of_2(x.shape[-1])
    rms_norm_kernel[(x_rows.shape[0],)](
        x_rows,
        residual_rows,
        packed(weight),
        normed,
        total,
        x_rows.stride(0),
        residual_rows.stride(0),
        EPS=eps,
        ADD=True,
        D=x.shape[-1],
        BLOCK_D=BLOCK_D,
        num_warps=max(1, min(8, BLOCK_D // 512)),
    )
    return normed, total
