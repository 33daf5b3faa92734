"""Routing as other people write it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from passes.fuse_routing import FuseRouting
from tests.passes.harness import certified, count, untouched
from tests.passes.test_fuse_routing import attributes, routing_graph

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

K = 3


def deepseeks_own(logits, bias):
    """deepseek-ai/DeepSeek-V3, inference/model.py: the mask is true outside the best groups."""
    original = scores = logits.sigmoid()
    grouped = (scores + bias).view(logits.shape[0], 4, -1)
    best = grouped.topk(2, dim=-1)[0].sum(-1).topk(2, dim=-1)[1]
    mask = grouped.new_ones(logits.shape[0], 4, dtype=torch.bool).scatter_(1, best, False)
    masked = grouped.masked_fill_(mask.unsqueeze(-1), -math.inf).flatten(1)
    indices = torch.topk(masked, K, dim=-1)[1]
    weights = original.gather(1, indices)
    weights /= weights.sum(dim=-1, keepdim=True)
    weights *= 2.5
    return indices, weights


def softmax_then_renormalise(logits, bias):
    weights, indices = F.softmax(logits, dim=1, dtype=torch.float32).topk(K, dim=-1)
    return indices, weights / weights.sum(-1, keepdim=True)


def sigmoid_without_bias(logits, bias):
    scores = logits.sigmoid()
    indices = scores.topk(K, sorted=False).indices
    weights = scores.gather(-1, indices)
    return indices, weights / (weights.sum(-1, keepdim=True) + 1e-20)


def read_by_row_and_column(logits, bias):
    scores = logits.sigmoid()
    indices = (scores + bias).topk(K).indices
    return indices, scores[torch.arange(scores.shape[0])[:, None], indices] * 1.5


@pytest.mark.parametrize(
    ("routing", "expected"),
    [
        (deepseeks_own, dict(scoring="sigmoid", groups=4, top_groups=2, group_score="top2", normalise=True, scale=2.5)),
        (softmax_then_renormalise, dict(scoring="softmax", bias=None, groups=1, normalise=True, scale=1.0)),
        (sigmoid_without_bias, dict(scoring="sigmoid", bias=None, normalise=True, epsilon=1e-20)),
        (read_by_row_and_column, dict(scoring="sigmoid", normalise=False, scale=1.5)),
    ],
)
def test_variants_fire(routing, expected):
    graph = routing_graph(routing, 12)
    outcome = certified(FuseRouting(), graph)
    assert len(outcome.matches) == 1 and not outcome.refusals
    assert count(graph, aten.topk, aten.gather, aten.index, aten.scatter) == 0
    found = attributes(graph)
    assert {name: found[name] for name in expected} == expected


def softmax_of_the_chosen(logits, bias):
    values, indices = logits.topk(K, -1)
    order, _ = dsv3.sort_pairs(indices, 12)
    return order, indices, values.softmax(-1)


def test_a_softmax_over_the_chosen_logits_is_a_renormalised_one_over_all():
    graph = routing_graph(softmax_of_the_chosen, 12)
    assert len(certified(FuseRouting(), graph).matches) == 1
    found = attributes(graph)
    assert (found["scoring"], found["normalise"], found["epsilon"]) == ("softmax", True, 0.0)


def sampled(logits, bias):
    values, indices = logits.topk(K, -1)
    return indices, values.softmax(-1)


def of_the_smallest(logits, bias):
    values, indices = logits.topk(K, -1, largest=False)
    order, _ = dsv3.sort_pairs(indices, 12)
    return order, values.softmax(-1)


def in_bfloat16(logits, bias):
    scores = logits.to(torch.bfloat16).sigmoid()
    indices = (scores + bias.to(torch.bfloat16)).topk(K).indices
    return indices, scores.gather(1, indices).float()


def biased_weights(logits, bias):
    weights, indices = (logits.sigmoid() + bias).topk(K)
    return indices, weights


def rows_of_another_order(logits, bias):
    scores = logits.sigmoid()
    indices = (scores + bias).topk(K).indices
    return indices, scores[torch.arange(scores.shape[0]).flip(0)[:, None], indices]


@pytest.mark.parametrize(
    ("routing", "reason"),
    [
        (sampled, ""),
        (of_the_smallest, "topk does not choose the largest of the last axis"),
        (in_bfloat16, "sigmoid is rounded to torch.bfloat16, which changes the chosen experts"),
        (biased_weights, "the weights getitem are scores with the bias bias in them"),
        (rows_of_another_order, "the scores of the chosen experts are not read"),
    ],
)
def test_near_misses(routing, reason):
    assert untouched(FuseRouting(), routing_graph(routing, 12)) == reason


def test_what_divides_a_softmax_over_the_chosen_logits_is_one_and_epsilon():
    def routing(logits, bias):
        order, indices, weights = softmax_of_the_chosen(logits, bias)
        return order, indices, weights / (weights.sum(-1, keepdim=True) + 0.25) * 3.0

    graph = routing_graph(routing, 12)
    assert len(certified(FuseRouting(), graph).matches) == 1
    assert attributes(graph)["scale"] == pytest.approx(3.0 / 1.25)


def test_scores_gathered_along_the_tokens_are_no_weights():
    def routing(logits, bias):
        scores = logits.sigmoid()
        indices = (scores + bias).topk(K).indices
        return indices, scores.gather(0, indices)

    assert untouched(FuseRouting(), routing_graph(routing, 12)) == "the scores of the chosen experts are not read"
