"""Sorting (token, expert) pairs by expert: one program per expert, no atomics, no scratch memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.layout import started_early

BLOCK_M_FEW = 128
BLOCK_M_MANY = 1024


@triton.jit
def sort_pairs_kernel(
    indices,
    order,
    offsets,
    pairs,
    BLOCK_M: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    if OVERLAPPED:
        gdc_wait()
        gdc_launch_dependents()
    # Every program reads all indices twice; they are few against the weights and stay in the L2 cache.
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK_M)
    before = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(0, pairs, BLOCK_M):
        index = tl.load(indices + first + lane, mask=first + lane < pairs, other=2**31 - 1)
        before += (index < expert).to(tl.int32)
    start = tl.sum(before)
    for first in range(0, pairs, BLOCK_M):
        index = tl.load(indices + first + lane, mask=first + lane < pairs, other=2**31 - 1)
        mine = (index == expert).to(tl.int32)
        place = start + tl.cumsum(mine, 0) - 1
        tl.store(order + place, (first + lane).to(tl.int64), mask=mine != 0)
        start += tl.sum(mine)
    tl.store(offsets + expert, start)


def sort_pairs(indices: Tensor, experts: int, overlapped: bool = False) -> tuple[Tensor, Tensor]:
    """indices [N, K] int64 → (order [M] int64, offsets [E] int32).

    overlapped: with programmatic dependent launch, which is Hopper's and later ones'.
    """
    pairs = indices.shape[0] * indices.shape[1]
    order = torch.empty((pairs,), dtype=torch.int64, device=indices.device)
    offsets = torch.empty((experts,), dtype=torch.int32, device=indices.device)
    sort_pairs_kernel[(experts,)](
        indices.contiguous(),
        order,
        offsets,
        pairs,
        BLOCK_M=BLOCK_M_FEW if pairs <= BLOCK_M_FEW else BLOCK_M_MANY,
        OVERLAPPED=overlapped,
        num_warps=4,
        **started_early(overlapped),
    )
    return order, offsets
