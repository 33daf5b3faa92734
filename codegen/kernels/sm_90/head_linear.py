"""A product of its own per head: the absorbed up-projections of a decode step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.layout import cdiv, next_power_of_2, packed

BLOCK_N = 16
NUM_WARPS = 4


@triton.jit
def head_linear_kernel(
    x,
    weight,
    out,
    tokens,
    x_token_stride,
    x_head_stride,
    # Constants, so that machine code made ahead of time knows along which axis the weight is contiguous.
    WEIGHT_HEAD_STRIDE: tl.constexpr,
    WEIGHT_OUT_STRIDE: tl.constexpr,
    WEIGHT_IN_STRIDE: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    head = tl.program_id(0)
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    token = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_D)
    weight_row = weight + head.to(tl.int64) * WEIGHT_HEAD_STRIDE + output[:, None] * WEIGHT_OUT_STRIDE
    x_row = x + token.to(tl.int64)[:, None] * x_token_stride + head * x_head_stride
    total = tl.zeros((BLOCK_O, BLOCK_N), tl.float32)
    # Weights do not depend on the kernel before: the first of them are under way while it still drains.
    wanted = (output < WIDTH)[:, None] & (depth < D)[None, :]
    a = tl.load(weight_row + depth[None, :] * WEIGHT_IN_STRIDE, mask=wanted, other=0.0)
    if OVERLAPPED:
        gdc_launch_dependents()
        gdc_wait()
    for start in tl.static_range(0, D, BLOCK_D):
        if start > 0:
            wanted = (output < WIDTH)[:, None] & (start + depth < D)[None, :]
            a = tl.load(weight_row + (start + depth)[None, :] * WEIGHT_IN_STRIDE, mask=wanted, other=0.0)
        inside = (token < tokens)[:, None] & (start + depth < D)[None, :]
        b = tl.load(x_row + (start + depth)[None, :], mask=inside, other=0.0)
        total = tl.dot(a, b.T, total, input_precision="ieee")
    place = out + (token.to(tl.int64)[:, None] * tl.num_programs(0) + head) * WIDTH + output[None, :]
    tl.store(place, total.T.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (output < WIDTH)[None, :])


def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Kernel of the op `head_linear`: x [.., H, D], weight [H, O, D] in any order of its axes → weight[h] · x[.., h],
    [.., H, O]."""
    heads, width, depth = weight.shape
    lead, x = x.shape[:-2], packed(x).reshape(-1, heads, depth)
    tokens = x.shape[0]
    out = torch.empty((tokens, heads, width), dtype=x.dtype, device=x.device)
    block_o = 32 if heads * width >= 4096 else 16
    head_linear_kernel[(heads, cdiv(width, block_o), cdiv(tokens, BLOCK_N))](
        x,
        weight,
        out,
        tokens,
        x.stride(0),
        x.stride(1),
        WEIGHT_HEAD_STRIDE=weight.stride(0),
        WEIGHT_OUT_STRIDE=weight.stride(1),
        WEIGHT_IN_STRIDE=weight.stride(2),
        D=depth,
        WIDTH=width,
        BLOCK_N=BLOCK_N,
        BLOCK_O=block_o,
        BLOCK_D=min(512, next_power_of_2(depth)),
        OVERLAPPED=x.is_cuda,
        num_warps=NUM_WARPS,
        launch_pdl=x.is_cuda,
    )
    return out.view(*lead, heads, width)
