"""RMSNorm and the router's product: in one launch for a handful of tokens, one after the other for more."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.layout import as_rows, cdiv, next_power_of_2, packed
from codegen.kernels.rms_norm import rms_norm
from codegen.kernels.sm_90.linear import exact_product

BLOCK_E = 2
BLOCK_D = 1024
NUM_WARPS = 4
# Every token reads the router's weight again, from the second-level cache; beyond this a product of its own pays.
MOST_TOKENS = 16


@triton.jit
def norm_router_kernel(
    x,
    norm_weight,
    weight,
    normed,
    logits,
    EPS: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    token = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    every = tl.arange(0, BLOCK_ROW)
    rows = weight + expert[:, None] * D
    # Weights do not depend on the kernel before: the first of them are under way while it still drains.
    ahead = tl.load(rows + column[None, :], mask=(expert < E)[:, None] & (column < D)[None, :], other=0.0)
    if OVERLAPPED:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(x + token * D + every, mask=every < D, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(row * row) / D + EPS)
    total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = start + column < D
        current = ahead
        following = (expert < E)[:, None] & (start + BLOCK_D + column < D)[None, :]
        ahead = tl.load(rows + (start + BLOCK_D + column)[None, :], mask=following, other=0.0)
        scale = tl.load(norm_weight + start + column, mask=inside, other=0.0).to(tl.float32)
        part = tl.load(x + token * D + start + column, mask=inside, other=0.0).to(tl.float32)
        value = (part * inverse * scale).to(normed.dtype.element_ty)
        if tl.program_id(0) == 0:
            tl.store(normed + token * D + start + column, value, mask=inside)
        total += current.to(tl.float32) * value.to(tl.float32)[None, :]
    tl.store(logits + token * E + expert, tl.sum(total, 1), mask=expert < E)


def norm_router(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel of the op `norm_router`: x [.., D], norm_weight [D], weight [E, D] → (rms_norm(x) [.., D] in the dtype of
    x, its product with weight [.., E] in fp32)."""
    experts, width = weight.shape
    lead, rows = x.shape[:-1], as_rows(x)
    tokens = rows.shape[0]
    if tokens > MOST_TOKENS:
        normed = rms_norm(rows, norm_weight, eps)
        logits = exact_product(normed, weight)
    else:
        rows = rows.contiguous()
        normed = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
        logits = torch.empty((tokens, experts), dtype=torch.float32, device=x.device)
        norm_router_kernel[(cdiv(experts, BLOCK_E), tokens)](
            rows,
            packed(norm_weight),
            weight.contiguous(),
            normed,
            logits,
            EPS=eps,
            E=experts,
            D=width,
            BLOCK_E=BLOCK_E,
            BLOCK_D=BLOCK_D,
            BLOCK_ROW=next_power_of_2(width),
            OVERLAPPED=x.is_cuda,
            num_warps=NUM_WARPS,
            launch_pdl=x.is_cuda,
        )
    return normed.view(*lead, width), logits.view(*lead, experts)
