"""Products with weights and what can go into the same launch: a norm before, a residual sum after, one per head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from codegen.ops.norm import rms_norm
from codegen.ops.registry import composite, compute_dtype


@composite("linear(Tensor x, Tensor weight, float? eps=None, Tensor? residual=None) -> Tensor")
def linear(x: Tensor, weight: Tensor, eps: float | None = None, residual: Tensor | None = None) -> Tensor:
    """x [.., D], weight [O, D], residual [.., O] → x · weightᵀ, with eps over sqrt(mean(x²) + eps), plus residual,
    [.., O], rounded once.

    With eps it is the product of an RMSNorm whose own weight has been multiplied into `weight`.
    """
    wide = x.to(compute_dtype(x))
    product = F.linear(wide, weight.to(wide.dtype))
    if eps is not None:
        product = product * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if residual is not None:
        product = product + residual.to(wide.dtype)
    return product.to(x.dtype)


@composite("norm_router(Tensor x, Tensor norm_weight, float eps, Tensor weight) -> (Tensor normed, Tensor logits)")
def norm_router(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., D], norm_weight [D], weight [E, D] → (rms_norm(x) [.., D], its product with weight [.., E]).

    The product sees the rounded norm, and is fp32 (fp64 of fp64 x).
    """
    normed = rms_norm(x, norm_weight, eps)
    wide = normed.to(compute_dtype(x))
    return normed, F.linear(wide, weight.to(wide.dtype))


@composite("head_linear(Tensor x, Tensor weight) -> Tensor")
def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [.., H, D], weight [H, O, D] → [.., H, O]: weight[h] · x[.., h]."""
    return torch.einsum("...hd,hod->...ho", x, weight)
