"""Products with weights and what can go into the same launch: a norm before, a residual sum after, one per head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from codegen.ops.norm import rms_norm
from codegen.ops.registry import composite, compute_dtype


def _product(
    x: Tensor, weight: Tensor, eps: float | None = None, residual: Tensor | None = None, exact: bool = False
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=compute_dtype(x) if exact else x.dtype)


@composite(
    "linear(Tensor x, Tensor weight, float? eps=None, Tensor? residual=None, bool exact=False) -> Tensor", _product
)
def linear(
    x: Tensor, weight: Tensor, eps: float | None = None, residual: Tensor | None = None, exact: bool = False
) -> Tensor:
    """x [.., D], weight [O, D], residual [.., O] → x · weightᵀ, with eps over sqrt(mean(x²) + eps), plus residual,
    [.., O], rounded once, or where `exact` not at all: then it is fp32 (fp64 of fp64 x).

    With eps it is the product of an RMSNorm whose own weight has been multiplied into `weight`.
    """
    wide = x.to(compute_dtype(x))
    product = F.linear(wide, weight.to(wide.dtype))
    if eps is not None:
        product = product * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if residual is not None:
        product = product + residual.to(wide.dtype)
    return product if exact else product.to(x.dtype)


def _both_products(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], first.shape[0] + second.shape[0]))


@composite("linear_pair(Tensor x, Tensor first, Tensor second) -> Tensor", _both_products)
def linear_pair(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """x [.., D], first [O, D], second [P, D] → [.., O+P]: the products with both weights, side by side."""
    return torch.cat([linear(x, weight) for weight in (first, second)], -1)


def _norm_and_logits(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=compute_dtype(x))


@composite(
    "norm_router(Tensor x, Tensor norm_weight, float eps, Tensor weight) -> (Tensor normed, Tensor logits)",
    _norm_and_logits,
)
def norm_router(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., D], norm_weight [D], weight [E, D] → (rms_norm(x) [.., D], its product with weight [.., E]).

    The product sees the rounded norm, and is fp32 (fp64 of fp64 x).
    """
    normed = rms_norm(x, norm_weight, eps)
    wide = normed.to(compute_dtype(x))
    return normed, F.linear(wide, weight.to(wide.dtype))


def _head_by_head(x: Tensor, weight: Tensor) -> Tensor:
    *rows, heads, _ = x.shape
    return x.new_empty((heads, *rows, weight.shape[1])).movedim(0, -2)


@composite("head_linear(Tensor x, Tensor weight) -> Tensor", _head_by_head)
def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [.., H, D], weight [H, O, D] → [.., H, O]: weight[h] · x[.., h]."""
    return torch.einsum("...hd,hod->...ho", x, weight)
