"""Choosing experts: scores, selection bias, group limit, top-k, weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from codegen.ops.registry import composite, compute_dtype

SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


def _first_k(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of the last axis, falling; the lowest index wins ties, unlike topk."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _chosen(
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
    tokens, experts = logits.shape
    columns = top_k + always
    indices = logits.new_empty((tokens, columns if always else experts), dtype=torch.int64)
    return indices[:, :columns], logits.new_empty((tokens, columns), dtype=compute_dtype(logits))


@composite(
    "route(Tensor logits, Tensor? bias, str scoring, int top_k, int groups, int top_groups, str group_score, "
    "float masked, bool normalise, float epsilon, float scale, int always=0) -> (Tensor indices, Tensor weights)",
    _chosen,
)
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
    """logits [N, E], bias [E] or None → (indices [N, K] int64, weights [N, K] fp32, or fp64 of fp64 logits).

    scores = sigmoid or softmax of the logits, or the root of their softplus. Selection looks at scores + bias: the
    `top_groups` of `groups` equal runs of experts with the largest group score ("max", or "top2": sum of the two
    largest) keep theirs, the others are set to `masked`; the `top_k` largest are chosen, in falling order, the lowest
    index on ties. Weights are the scores without bias, divided by (their sum + `epsilon`) if `normalise`, times
    `scale`.
    The `always` experts behind the E, which no score chooses, follow with weight 1: K + always columns.
    DeepSeek-V2 report (max, masked 0) and DeepSeek-V3 report (top2, masked -inf), section 2.1 of each; DeepSeek-V4
    scores by "sqrtsoftplus".
    """
    if scoring not in SCORES:
        raise ValueError(f"route: scoring is {scoring!r}; accepted: {', '.join(map(repr, SCORES))}")
    if group_score not in ("max", "top2"):
        raise ValueError(f"route: group_score is {group_score!r}; accepted: 'max', 'top2'")
    wide = logits.to(compute_dtype(logits))
    scores = SCORES[scoring](wide)
    choice = scores if bias is None else scores + bias.to(wide.dtype)
    if top_groups < groups:
        grouped = choice.unflatten(-1, (groups, -1))
        best = 1 if group_score == "max" else min(2, grouped.shape[-1])
        group_values = grouped.topk(best, -1).values.sum(-1)
        kept = torch.zeros_like(group_values, dtype=torch.bool)
        kept = kept.scatter(-1, _first_k(group_values, top_groups), True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), masked).flatten(-2)
    indices = _first_k(choice, top_k)
    weights = scores.gather(-1, indices)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + epsilon)
    weights = weights * scale
    if always:
        experts, shape = logits.shape[-1], (indices.shape[0], always)
        shared = torch.arange(experts, experts + always, device=indices.device).expand(shape)
        indices, weights = torch.cat((indices, shared), -1), torch.cat((weights, weights.new_ones(shape)), -1)
    return indices, weights
