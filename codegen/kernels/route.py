"""Choosing experts, one program per token; every selection is exact, the lowest index wins ties."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from codegen.kernels.layout import next_power_of_2, packed


@triton.jit
def root_of_softplus(x):
    """sqrt(log(1 + exp(x))): exact in its last digits too where exp(x) is small beside 1.

    log(1 + e) = 2 artanh z = 2 (z + z³/3 + z⁵/5 + …) with z = e / (2 + e), at most 1/3.
    """
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)
    square = z * z
    series = square / 15 + 1 / 13
    series = series * square + 1 / 11
    series = series * square + 1 / 9
    series = series * square + 1 / 7
    series = series * square + 1 / 5
    series = series * square + 1 / 3
    series = series * square + 1
    return tl.sqrt(tl.maximum(x, 0.0) + 2 * z * series)


@triton.jit
def route_kernel(
    logits,
    bias,
    indices,
    weights,
    logits_stride,
    SCORING: tl.constexpr,
    BIASED: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
    MASKED: tl.constexpr,
    NORMALISE: tl.constexpr,
    EPSILON: tl.constexpr,
    SCALE: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    ALWAYS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The experts lie in a tile of groups × members, so that group scores are reductions along one axis.
    SIZE: tl.constexpr = E // GROUPS
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    member = tl.arange(0, BLOCK_SIZE)
    valid = (group < GROUPS)[:, None] & (member < SIZE)[None, :]
    expert = group[:, None] * SIZE + member[None, :]
    logit = tl.load(logits + token * logits_stride + expert, mask=valid, other=-float("inf")).to(tl.float32)
    if SCORING == "sigmoid":
        score = tl.sigmoid(logit)
    elif SCORING == "sqrtsoftplus":
        score = root_of_softplus(logit)
    else:
        raised = tl.exp(logit - tl.max(logit))
        score = raised / tl.sum(raised)
    choice = score
    if BIASED:
        choice += tl.load(bias + expert, mask=valid, other=0.0).to(tl.float32)
    choice = tl.where(valid, choice, -float("inf"))

    if TOP_GROUPS < GROUPS:
        group_value, at = tl.max(choice, 1, return_indices=True)
        if TOP2 and SIZE > 1:
            group_value += tl.max(tl.where(member[None, :] == at[:, None], -float("inf"), choice), 1)
        dropped = group < GROUPS
        for _ in range(TOP_GROUPS):
            largest = tl.max(tl.where(dropped, group_value, -float("inf")), 0)
            kept = tl.min(tl.where(dropped & (group_value == largest), group, BLOCK_G), 0)
            dropped = dropped & (group != kept)
        choice = tl.where(dropped[:, None] & valid, MASKED, choice)

    # What was chosen leaves the candidates rather than becoming -inf: experts of dropped groups are -inf already,
    # and they are chosen too, lowest index first, when fewer than K others are left.
    candidate = valid
    slot = tl.arange(0, BLOCK_K)
    chosen = tl.zeros((BLOCK_K,), tl.int64)
    weight = tl.zeros((BLOCK_K,), tl.float32)
    for k in range(K):
        largest = tl.max(tl.where(candidate, choice, -float("inf")))
        index = tl.min(tl.where(candidate & (choice == largest), expert, E))
        taken = expert == index
        value = tl.sum(tl.where(taken & valid, score, 0.0))
        candidate = candidate & (expert != index)
        chosen = tl.where(slot == k, index.to(tl.int64), chosen)
        weight = tl.where(slot == k, value, weight)
    if NORMALISE:
        weight = weight / (tl.sum(weight) + EPSILON)
    weight *= SCALE
    if ALWAYS > 0:
        chosen = tl.where(slot < K, chosen, E + slot - K)
        weight = tl.where(slot < K, weight, 1.0)
    tl.store(indices + token * (K + ALWAYS) + slot, chosen, mask=slot < K + ALWAYS)
    tl.store(weights + token * (K + ALWAYS) + slot, weight, mask=slot < K + ALWAYS)


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
    """logits [N, E], bias [E] or None → (indices [N, K + always] int64, weights [N, K + always] fp32)."""
    tokens, experts = logits.shape
    logits = packed(logits)
    indices = torch.empty((tokens, top_k + always), dtype=torch.int64, device=logits.device)
    weights = torch.empty((tokens, top_k + always), dtype=torch.float32, device=logits.device)
    route_kernel[(tokens,)](
        logits,
        None if bias is None else packed(bias),
        indices,
        weights,
        logits.stride(0),
        SCORING=scoring,
        BIASED=bias is not None,
        GROUPS=groups,
        TOP_GROUPS=top_groups,
        TOP2=group_score == "top2",
        MASKED=masked,
        NORMALISE=normalise,
        EPSILON=epsilon,
        SCALE=scale,
        E=experts,
        K=top_k,
        ALWAYS=always,
        BLOCK_G=next_power_of_2(groups),
        BLOCK_SIZE=next_power_of_2(experts // groups),
        BLOCK_K=next_power_of_2(top_k + always),
        num_warps=1,
    )
    return indices, weights
