"""Choosing experts in one launch: a warp per token, the whole selection in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from codegen.kernels.layout import cdiv, next_power_of_2, packed
from codegen.kernels.route import root_of_softplus

_LOWEST = tl.constexpr(-(2**31))
_BEHIND = tl.constexpr(2**31 - 1)


@triton.jit
def _sortable(values):
    """Integers that compare like the floats: a warp reduces int32 in one instruction, floats in ten."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _floats(keys):
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def route_kernel(
    logits_ptr,
    bias_ptr,
    indices_ptr,
    weights_ptr,
    tokens,
    masked: tl.constexpr,
    epsilon: tl.constexpr,
    scale: tl.constexpr,
    STRIDE: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ALWAYS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOP2: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPPED: tl.constexpr,
):
    # A row of the tile is a token; its columns are the experts, each group padded to a power of two.
    GROUP_SIZE: tl.constexpr = EXPERTS // GROUPS
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_G * BLOCK_S)
    group = column // BLOCK_S
    member = column % BLOCK_S
    is_expert = (group < GROUPS) & (member < GROUP_SIZE)
    expert = tl.where(is_expert, group * GROUP_SIZE + member, _BEHIND)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert, mask=is_expert, other=0.0).to(tl.float32)
    if OVERLAPPED:
        # The experts of a single token begin with weights that need no routing; those of more wait for a plan.
        if tokens == 1:
            gdc_launch_dependents()
        gdc_wait()
        gdc_launch_dependents()
    inside = (row < tokens)[:, None] & is_expert[None, :]
    logits = tl.load(logits_ptr + row[:, None] * STRIDE + expert[None, :], mask=inside, other=0.0).to(tl.float32)
    if SCORING == "sqrtsoftplus":
        scores = root_of_softplus(logits)
    elif SCORING == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        largest = tl.max(tl.where(is_expert[None, :], logits, float("-inf")), 1)
        raised = tl.where(is_expert[None, :], tl.exp(logits - largest[:, None]), 0.0)
        total = tl.sum(raised, 1)
        scores = raised / total[:, None]
    choice = scores
    if HAS_BIAS:
        choice += bias[None, :]

    key = tl.where(is_expert[None, :], _sortable(choice), _LOWEST)
    if TOP_GROUPS < GROUPS:
        grouped = tl.reshape(key, (BLOCK_N, BLOCK_G, BLOCK_S))
        best = tl.max(grouped, 2)
        value = _floats(best)
        if TOP2 and GROUP_SIZE > 1:
            place = tl.arange(0, BLOCK_S)[None, None, :]
            first = tl.min(tl.where(grouped == best[:, :, None], place, BLOCK_S), 2)
            value += _floats(tl.max(tl.where(place == first[:, :, None], _LOWEST, grouped), 2))
        number = tl.arange(0, BLOCK_G)[None, :]
        group_key = tl.where(number < GROUPS, _sortable(value), _LOWEST)
        dropped = number < GROUPS
        for _ in tl.static_range(TOP_GROUPS):
            best = tl.max(group_key, 1)
            kept = tl.min(tl.where((group_key == best[:, None]) & dropped, number, BLOCK_G), 1)
            dropped = dropped & (number != kept[:, None])
            group_key = tl.where(number == kept[:, None], _LOWEST, group_key)
        masked_key = _sortable(tl.full((BLOCK_N, BLOCK_G, BLOCK_S), masked, tl.float32))
        limited = tl.where(dropped[:, :, None], masked_key, grouped)
        key = tl.where(is_expert[None, :], tl.reshape(limited, (BLOCK_N, BLOCK_G * BLOCK_S)), _LOWEST)

    slot = tl.arange(0, BLOCK_K)[None, :]
    chosen_experts = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.max(key, 1)
        index = tl.min(tl.where(key == best[:, None], expert[None, :], _BEHIND), 1)
        chosen_experts = tl.where(slot == k, index[:, None], chosen_experts)
        key = tl.where(expert[None, :] == index[:, None], _LOWEST, key)
    # Reading the chosen logits again is one cached load; carrying their scores would be a reduction each.
    written = (row < tokens)[:, None] & (slot < TOP_K)
    chosen_ptr = logits_ptr + row[:, None] * STRIDE + chosen_experts
    chosen_logits = tl.load(chosen_ptr, mask=written, other=float("-inf")).to(tl.float32)
    if SCORING == "sqrtsoftplus":
        weights = root_of_softplus(chosen_logits)
    elif SCORING == "sigmoid":
        weights = 1.0 / (1.0 + tl.exp(-chosen_logits))
    else:
        weights = tl.exp(chosen_logits - largest[:, None]) / total[:, None]
    if NORMALISE:
        weights = weights / (tl.sum(weights, 1) + epsilon)[:, None]
    weights = weights * scale
    if ALWAYS > 0:
        chosen_experts = tl.where(slot < TOP_K, chosen_experts, EXPERTS + slot - TOP_K)
        weights = tl.where(slot < TOP_K, weights, 1.0)
        written = (row < tokens)[:, None] & (slot < TOP_K + ALWAYS)
    place = row[:, None] * (TOP_K + ALWAYS) + slot
    tl.store(indices_ptr + place, chosen_experts.to(tl.int64), mask=written)
    tl.store(weights_ptr + place, weights, mask=written)


def route(
    logits: Tensor,
    bias: Tensor | None,
    scoring: str,
    top_k: int,
    groups: int,
    top_groups: int,
    group_score: str,
    masked: float,
    normalise: bool,
    epsilon: float,
    scale: float,
    always: int = 0,
) -> tuple[Tensor, Tensor]:
    """Kernel of the op `route`: logits [N, E], bias [E] or None → (indices [N, K] int64, weights [N, K] fp32).

    always: experts behind the E that every token gets with weight 1 (shared ones), listed last: K + always columns.
    Any number of experts and groups; ties go to the lowest index. One warp per program: every reduction stays
    inside it.
    """
    tokens, experts = logits.shape
    logits = packed(logits)
    indices = torch.empty((tokens, top_k + always), dtype=torch.int64, device=logits.device)
    weights = torch.empty((tokens, top_k + always), dtype=torch.float32, device=logits.device)
    if tokens == 0:
        return indices, weights
    block_n = 2 if tokens > 1 else 1
    route_kernel[(cdiv(tokens, block_n),)](
        logits,
        None if bias is None else packed(bias),
        indices,
        weights,
        tokens,
        masked=masked,
        epsilon=epsilon,
        scale=scale,
        STRIDE=logits.stride(0),
        EXPERTS=experts,
        TOP_K=top_k,
        ALWAYS=always,
        GROUPS=groups,
        TOP_GROUPS=top_groups,
        SCORING=scoring,
        HAS_BIAS=bias is not None,
        TOP2=group_score == "top2",
        NORMALISE=normalise,
        BLOCK_N=block_n,
        BLOCK_G=next_power_of_2(groups),
        BLOCK_S=next_power_of_2(experts // groups),
        BLOCK_K=next_power_of_2(top_k + always),
        num_warps=1,
        OVERLAPPED=logits.is_cuda,
        launch_pdl=logits.is_cuda,
    )
    return indices, weights
