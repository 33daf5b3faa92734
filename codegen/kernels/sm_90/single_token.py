"""Experts of a single token: matrix-vector products that stream each chosen expert once, without sorting."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def single_gate_up_kernel(
    x_ptr,
    indices_ptr,
    gate_up_ptr,
    hidden_ptr,
    depth,
    width,
    TOP_K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    pair = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    column = tl.arange(0, BLOCK_D)
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(indices_ptr + pair).to(tl.int64)
    gate_ptr = gate_up_ptr + (expert * 2 * width + row)[:, None] * depth + column[None, :]
    up_ptr = gate_ptr + width.to(tl.int64) * depth
    x_ptr += (pair // TOP_K).to(tl.int64) * depth
    gate = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    up = tl.zeros((BLOCK_I, BLOCK_D), tl.float32)
    for start in range(0, depth, BLOCK_D):
        inside = start + column < depth
        read = (row < width)[:, None] & inside[None, :]
        x = tl.load(x_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(gate_ptr + start, mask=read, other=0.0, eviction_policy="evict_first")
        other = tl.load(up_ptr + start, mask=read, other=0.0, eviction_policy="evict_first")
        gate += weight.to(tl.float32) * x[None, :]
        up += other.to(tl.float32) * x[None, :]
    gated = tl.sum(gate, 1)
    hidden = gated / (1.0 + tl.exp(-gated)) * tl.sum(up, 1)
    tl.store(hidden_ptr + pair * width + row, hidden.to(hidden_ptr.dtype.element_ty), mask=row < width)


@triton.jit
def single_down_kernel(
    hidden_ptr,
    indices_ptr,
    weights_ptr,
    down_ptr,
    residual_ptr,
    out_ptr,
    depth,
    width,
    TOP_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    """The weighted sum over the experts of a token is part of the reduction: nothing is left to combine."""
    token = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    column = tl.arange(0, BLOCK_I)
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for pair in range(token * TOP_K, token * TOP_K + TOP_K):
        expert = tl.load(indices_ptr + pair).to(tl.int64)
        pair_weight = tl.load(weights_ptr + pair).to(tl.float32)
        row_ptr = down_ptr + (expert * depth + row)[:, None] * width + column[None, :]
        for start in range(0, width, BLOCK_I):
            inside = start + column < width
            read = (row < depth)[:, None] & inside[None, :]
            hidden = tl.load(hidden_ptr + pair * width + start + column, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(row_ptr + start, mask=read, other=0.0, eviction_policy="evict_first")
            total += weight.to(tl.float32) * (hidden * pair_weight)[None, :]
    out = tl.sum(total, 1)
    place = token.to(tl.int64) * depth + row
    if ADD:
        out += tl.load(residual_ptr + place, mask=row < depth, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=row < depth)


def swiglu_of_pairs(x: Tensor, indices: Tensor, gate_up: Tensor, block: tuple[int, int], warps: int) -> Tensor:
    """x [N, D], indices [N, K], gate_up [E, 2I, D] → swiglu of every pair's product [N·K, I]."""
    tokens, top_k = indices.shape
    width, depth = gate_up.shape[1] // 2, gate_up.shape[2]
    hidden = torch.empty((tokens * top_k, width), dtype=x.dtype, device=x.device)
    single_gate_up_kernel[(triton.cdiv(width, block[0]), tokens * top_k)](
        x,
        indices,
        gate_up,
        hidden,
        depth,
        width,
        TOP_K=top_k,
        BLOCK_I=block[0],
        BLOCK_D=block[1],
        num_warps=warps,
        OVERLAPPED=x.is_cuda,
        launch_pdl=x.is_cuda,
    )
    return hidden


def weighted_down(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    down: Tensor,
    block: tuple[int, int],
    warps: int,
    residual: Tensor | None = None,
) -> Tensor:
    """hidden [N·K, I], indices and weights [N, K], down [E, D, I] → the weighted sum over K, plus residual, [N, D]."""
    tokens, top_k = indices.shape
    depth, width = down.shape[1:]
    out = torch.empty((tokens, depth), dtype=hidden.dtype, device=hidden.device)
    single_down_kernel[(triton.cdiv(depth, block[0]), tokens)](
        hidden,
        indices,
        weights,
        down,
        residual,
        out,
        depth,
        width,
        TOP_K=top_k,
        BLOCK_O=block[0],
        BLOCK_I=block[1],
        ADD=residual is not None,
        num_warps=warps,
        OVERLAPPED=hidden.is_cuda,
        launch_pdl=hidden.is_cuda,
    )
    return out
