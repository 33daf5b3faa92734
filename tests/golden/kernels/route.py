"""route for sm_80, cut from codegen/kernels/route.py.

Inputs: float32, float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def expect(**constants: tuple[object, object]) -> None:
    """These kernels serve the constants that they were cut for: given value, value cut for."""
    for name, (given, cut_for) in constants.items():
        if given != cut_for:
            raise ValueError(f"{name} is {given!r}; this kernel was written for {cut_for!r}")


def packed(x: Tensor) -> Tensor:
    """x itself if neighbours on its last axis are neighbours in memory, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def route_kernel(
    logits,
    bias,
    indices,
    weights,
    logits_stride,
):
    GROUPS: tl.constexpr = 3
    TOP_GROUPS: tl.constexpr = 2
    MASKED: tl.constexpr = float("-inf")
    EPSILON: tl.constexpr = 1e-20
    SCALE: tl.constexpr = 2.5
    E: tl.constexpr = 6
    K: tl.constexpr = 2
    ALWAYS: tl.constexpr = 0
    BLOCK_G: tl.constexpr = 4
    BLOCK_SIZE: tl.constexpr = 2
    BLOCK_K: tl.constexpr = 2
    # The experts lie in a tile of groups × members, so that group scores are reductions along one axis.
    SIZE: tl.constexpr = E // GROUPS
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    member = tl.arange(0, BLOCK_SIZE)
    valid = (group < GROUPS)[:, None] & (member < SIZE)[None, :]
    expert = group[:, None] * SIZE + member[None, :]
    logit = tl.load(logits + token * logits_stride + expert, mask=valid, other=-float("inf")).to(tl.float32)
    score = tl.sigmoid(logit)
    choice = score
    choice += tl.load(bias + expert, mask=valid, other=0.0).to(tl.float32)
    choice = tl.where(valid, choice, -float("inf"))

    group_value, at = tl.max(choice, 1, return_indices=True)
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
    weight = weight / (tl.sum(weight) + EPSILON)
    weight *= SCALE
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
    expect(
        SCORING=(scoring, "sigmoid"),
        BIASED=(bias is not None, True),
        GROUPS=(groups, 3),
        TOP_GROUPS=(top_groups, 2),
        TOP2=(group_score == "top2", True),
        MASKED=(masked, float("-inf")),
        NORMALISE=(normalise, True),
        EPSILON=(epsilon, 1e-20),
        SCALE=(scale, 2.5),
        E=(experts, 6),
        K=(top_k, 2),
        ALWAYS=(always, 0),
    )
    route_kernel[(tokens,)](
        logits,
        None if bias is None else packed(bias),
        indices,
        weights,
        logits.stride(0),
        num_warps=1,
    )
    return indices, weights
