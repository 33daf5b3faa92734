"""RMSNorm, RMSNorm after a residual sum, SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from codegen.ops.registry import composite, compute_dtype


def _like_x(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@composite("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _like_x)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [.., D], weight [D] → [.., D]: weight · x / sqrt(mean(x²) + eps), rounded once."""
    wide = x.to(compute_dtype(x))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * weight.to(wide.dtype)).to(x.dtype)


def _like_sum(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return torch.empty_like(total), total


@composite(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor normed, Tensor sum)", _like_sum
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [.., D], weight [D] → (rms_norm(sum), sum), both [.., D]; sum = x + residual,
    in the dtype of x."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def _like_half(gate_up: Tensor, limit: float | None = None) -> Tensor:
    return torch.empty_like(gate_up[..., : gate_up.shape[-1] // 2])


@composite("swiglu(Tensor gate_up, float? limit=None) -> Tensor", _like_half)
def swiglu(gate_up: Tensor, limit: float | None = None) -> Tensor:
    """gate_up [.., 2I] → [.., I]: silu(first half) · second half, rounded once.

    With a limit, gates are at most that, and ups are within ± it (DeepSeek-V4's `swiglu_limit`).
    """
    gate, up = gate_up.to(compute_dtype(gate_up)).chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (F.silu(gate) * up).to(gate_up.dtype)
