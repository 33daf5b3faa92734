"""RMSNorm, RMSNorm after a residual sum, SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from codegen.ops.registry import composite, compute_dtype


@composite("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [.., D], weight [D] → [.., D]: weight · x / sqrt(mean(x²) + eps), rounded once."""
    wide = x.to(compute_dtype(x))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * weight.to(wide.dtype)).to(x.dtype)


@composite("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor normed, Tensor sum)")
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [.., D], weight [D] → (rms_norm(sum), sum), both [.., D]; sum = x + residual,
    in the dtype of x."""
    total = x + residual
    return rms_norm(total, weight, eps), total


@composite("swiglu(Tensor gate_up) -> Tensor")
def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [.., 2I] → [.., I]: silu(first half) · second half, rounded once."""
    gate, up = gate_up.to(compute_dtype(gate_up)).chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)
