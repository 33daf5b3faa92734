"""Running the chosen experts only: sort the (token, expert) pairs, grouped products, weighted un-sort."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codegen.ops.norm import swiglu
from codegen.ops.registry import composite, compute_dtype, opaque


def _order_and_offsets(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    pairs = indices.shape[0] * indices.shape[1]
    return indices.new_empty(pairs), indices.new_empty(experts, dtype=torch.int32)


@opaque("sort_pairs(Tensor indices, int experts) -> (Tensor order, Tensor offsets)", fake=_order_and_offsets)
def sort_pairs(indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """indices [N, K] int64 below `experts` → (order [M] int64, offsets [E] int32), M = N·K.

    order: pair numbers n·K + k, stably sorted by expert. offsets: the end of each expert's run in it.
    """
    flat = indices.flatten()
    offsets = torch.bincount(flat, minlength=experts).cumsum(0).to(torch.int32)
    return flat.argsort(stable=True), offsets


def _rows_out(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


def _row_flops(x: Sequence[Any], weight: Sequence[Any], *rest: Any, **_: Any) -> Any:
    return 2 * x[0] * x[1] * weight[1]


@opaque("grouped_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor", fake=_rows_out, flops=_row_flops)
def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [M, D], weight [E, O, D], offsets [E] int32 → [M, O]: rows of expert e's run times weight[e]ᵀ."""
    out, start = x.new_empty((x.shape[0], weight.shape[1])), 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[expert].T, out=out[start:end])
        start = end
    return out


def _row_per_token(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    return y.new_empty((weights.shape[0], y.shape[1]))


@composite("combine_pairs(Tensor y, Tensor order, Tensor weights) -> Tensor", _row_per_token)
def combine_pairs(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """y [M, O] in sorted order, order [M], weights [N, K] → [N, O]: Σ_k weights[n, k] · y of pair n·K + k."""
    pairs = torch.empty_like(y).index_copy(0, order, y).unflatten(0, weights.shape)
    wide = compute_dtype(y)
    return (pairs.to(wide) * weights.to(wide).unsqueeze(-1)).sum(1).to(y.dtype)


def _like_tokens(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor | None = None,
    always: int = 0,
    up: Tensor | None = None,
    limit: float | None = None,
) -> Tensor:
    return x.new_empty((x.shape[0], down.shape[1]))


def _pair_flops(
    x: Sequence[Any], indices: Sequence[Any], weights: Any, gate_up: Any, down: Sequence[Any], *_: Any, **__: Any
) -> Any:
    (tokens, hidden), top_k, width = x, indices[1], down[2]
    return 6 * tokens * top_k * hidden * width


@opaque(
    "routed_swiglu(Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, Tensor? residual=None, "
    "int always=0, Tensor? up=None, float? limit=None) -> Tensor",
    fake=_like_tokens,
    flops=_pair_flops,
)
def routed_swiglu(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor | None = None,
    always: int = 0,
    up: Tensor | None = None,
    limit: float | None = None,
) -> Tensor:
    """x [N, D], indices and weights [N, K], gate_up [E, 2I, D], down [E, D, I] → [N, D].

    Σ_k weights[n, k] · down[e] · swiglu(gate_up[e] · x[n]), e = indices[n, k], plus residual [N, D]. Products
    accumulate in at least fp32 and are rounded to the dtype of x; the sum is rounded once. Weights of experts
    that nobody chose are not read. The last `always` columns of indices are the last experts in every row, which lets
    a kernel read them before it is told: ValueError if they are not. With up [E, I, D], which somebody keeps in a stack
    of its own, gate_up [E, I, D] is the gates alone. With a limit, gates and ups are kept within it, as `swiglu` does.
    """
    experts = gate_up.shape[0]
    if always and (indices[:, -always:] != torch.arange(experts - always, experts, device=indices.device)).any():
        raise ValueError(f"the last {always} columns of indices are not the last {always} of {experts} experts")
    # One loop per product, and what stands between them on all pairs at once: of a decode step's few pairs, small
    # operations for every expert would cost as much as the products.
    order, offsets = sort_pairs(indices, gate_up.shape[0])
    rows = x[order // indices.shape[1]]
    products = [grouped_linear(rows, stack, offsets) for stack in (gate_up, up) if stack is not None]
    hidden = swiglu(torch.cat(products, -1), limit)
    wide = compute_dtype(x)
    total = combine_pairs(grouped_linear(hidden, down, offsets).to(wide), order, weights)
    return (total if residual is None else total + residual.to(wide)).to(x.dtype)
