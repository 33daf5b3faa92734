"""The plain-Triton parts of the Hopper expert layer, in the interpreter: run by test_moe.py."""

import math

import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.routed_swiglu import combine
from codegen.kernels.sm_90.plan_experts import plan_experts
from codegen.kernels.sm_90.route import route
from tests.codegen.calls import SCORINGS, SIGMOID


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """torch.empty gives NaN or a huge integer: what a kernel leaves unwritten shows."""
    empty = torch.empty

    def filled(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max)

    monkeypatch.setattr(torch, "empty", filled)


def both_routes(logits, bias, top_k, groups, top_groups, settings):
    scoring, group_score, masked, normalise = settings
    arguments = (logits, bias, scoring, top_k, groups, top_groups, group_score, masked, normalise, 1e-20, 2.5)
    return route(*arguments), torch.ops.dsv3.route(*arguments)


@SCORINGS
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    "tokens, experts, top_k, groups, top_groups",
    [(1, 1, 1, 1, 1), (3, 7, 3, 1, 1), (4, 15, 4, 5, 2), (2, 60, 6, 3, 2), (3, 6, 2, 6, 3), (2, 16, 8, 4, 4)],
)
def test_routes_agree(tokens, experts, top_k, groups, top_groups, biased, settings):
    bias = torch.randn(experts) if biased else None
    found, expected = both_routes(torch.randn(tokens, experts), bias, top_k, groups, top_groups, settings)
    torch.testing.assert_close(found, expected)


def test_logits_are_columns_of_a_wider_product():
    wide = torch.randn(5, 19)
    found, expected = both_routes(wide[:, 4:16], torch.randn(12), 3, 4, 2, SIGMOID)
    torch.testing.assert_close(found, expected)


@SCORINGS
def test_lowest_index_wins_ties(settings):
    logits = torch.randint(-1, 2, (16, 12)).float()
    found, expected = both_routes(logits, None, 5, 4, 2, settings)
    assert torch.equal(found[0], expected[0])


def test_dropped_groups_are_chosen_lowest_first_when_too_few_are_left():
    found, expected = both_routes(torch.randn(3, 12), torch.randn(12) - 1, 7, 6, 2, SIGMOID)
    torch.testing.assert_close(found, expected)


def test_minus_zero_ties_with_zero():
    found, expected = both_routes(torch.zeros(1, 4), torch.tensor([-0.5, -0.5, -0.5, -0.7]), 2, 1, 1, SIGMOID)
    assert torch.equal(found[0], expected[0])


def draw_pairs(tokens, top_k, experts):
    return torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])


@pytest.mark.parametrize(
    "tokens, top_k, experts, rows, width",
    [(1, 4, 9, 8, 40), (5, 3, 11, 2, 40), (64, 8, 30, 16, 40), (700, 8, 20, 64, 40), (1402, 3, 130, 64, 520)],
)
def test_a_plan_holds_every_pair_once_in_sorted_order(tokens, top_k, experts, rows, width):
    x, indices = torch.randn(tokens, width), draw_pairs(tokens, top_k, experts)
    plan = plan_experts(x, indices, experts, rows)
    order = indices.flatten().argsort(stable=True)
    assert torch.equal(plan.order.long(), order)
    assert torch.equal(plan.gathered, x[order // top_k])


@pytest.mark.parametrize(
    "tokens, top_k, experts, rows, unit",
    [
        (5, 3, 11, 2, 1),
        (40, 2, 3, 20, 1),
        (90, 3, 4, 12, 4),
        (700, 8, 20, 192, 64),
        (1201, 4, 70, 36, 12),
    ],
)
def test_tiles_cover_every_run_with_the_fewest_equal_parts(tokens, top_k, experts, rows, unit):
    indices = draw_pairs(tokens, top_k, experts)
    plan = plan_experts(torch.randn(tokens, 8), indices, experts, rows, unit)
    expected, begin = [], 0
    for expert, count in enumerate(torch.bincount(indices.flatten(), minlength=experts).tolist()):
        units = math.ceil(count / unit)
        size = math.ceil(units / math.ceil(count / rows)) * unit if count else 1
        expected += [(expert, first, min(first + size, begin + count)) for first in range(begin, begin + count, size)]
        begin += count
    used = int(plan.tiles[3, 0])
    assert [tuple(tile) for tile in plan.tiles[:3, :used].T.tolist()] == expected
    assert plan.tiles[3, 1] == 0 and plan.tiles[4, :used].eq(0).all()


def tiles_of(plan):
    return {tuple(tile) for tile in plan.tiles[:3, : int(plan.tiles[3, 0])].T.tolist()}


# The first are few tokens in several blocks of columns.
@pytest.mark.parametrize(
    "tokens, top_k, routed, shared, width",
    [(33, 6, 9, 2, 1100), (700, 6, 30, 2, 40), (1201, 3, 20, 1, 40), (2100, 2, 5, 3, 40)],
)
def test_tokens_of_shared_experts_are_not_copied(tokens, top_k, routed, shared, width):
    last = torch.arange(routed, routed + shared).expand(tokens, shared)
    indices, x = torch.cat([draw_pairs(tokens, top_k, routed), last], 1), torch.randn(tokens, width)
    plan = plan_experts(x, indices, routed + shared, 64, 16, shared)
    every = plan_experts(x, indices, routed + shared, 64, 16)
    used = int(plan.tiles[3, 0])
    assert tiles_of(plan) == tiles_of(every)
    assert all(expert >= routed for expert, *_ in plan.tiles[:3, : plan.early].T.tolist())
    assert all(expert < routed for expert, *_ in plan.tiles[:3, plan.early : used].T.tolist())
    assert plan.tiles[3, 1] == 0 and plan.tiles[4, :used].eq(0).all()
    assert torch.equal(plan.order, every.order)
    assert torch.equal(plan.gathered, every.gathered[: tokens * top_k])
    assert torch.equal(every.gathered[tokens * top_k :], torch.cat([x] * shared))


def test_shared_experts_are_listed_last_with_weight_one():
    logits = torch.randn(3, 12)
    indices, weights = route(logits, None, "softmax", 4, 1, 1, "max", 0.0, False, 0.0, 1.0, always=2)
    expected = torch.ops.dsv3.route(logits, None, "softmax", 4, 1, 1, "max", 0.0, False, 0.0, 1.0)
    torch.testing.assert_close((indices[:, :4], weights[:, :4]), expected)
    assert indices[:, 4:].tolist() == [[12, 13]] * 3
    assert weights[:, 4:].tolist() == [[1.0, 1.0]] * 3


def test_combine_sums_the_pairs_of_a_token():
    y, weights, residual = torch.randn(5 * 3, 1030), torch.rand(5, 3), torch.randn(5, 1030)
    pairs = y.view(5, 3, -1)
    torch.testing.assert_close(combine(y, weights), (pairs * weights[..., None]).sum(1))
    torch.testing.assert_close(combine(y, weights, weighted=True), pairs.sum(1))
    torch.testing.assert_close(combine(y, weights, residual, weighted=True), pairs.sum(1) + residual)
