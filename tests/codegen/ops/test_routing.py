"""route: the two published test vectors, ties, masking, and the untouched weights."""

import math

import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3

LOGITS = torch.tensor([[0.5, -1, 2, 0, -0.5, 1, 0.25, -2]])
BIAS = torch.tensor([0, 0, -0.6, 0, 0.3, -0.1, 0.1, 0.5])


def v3(logits, bias, top_k=3, groups=4, top_groups=2):
    return torch.ops.dsv3.route(logits, bias, "sigmoid", top_k, groups, top_groups, "top2", -math.inf, True, 1e-20, 2.5)


def test_sigmoid_routing_with_a_bias():
    indices, weights = v3(LOGITS, BIAS)
    assert indices.tolist() == [[4, 6, 5]]
    torch.testing.assert_close(weights, torch.tensor([[0.564918, 0.841191, 1.093891]]), atol=2e-6, rtol=0)


def test_sigmoid_routing_without_bias():
    assert v3(LOGITS, None)[0].tolist() == [[2, 5, 3]]


def test_routing_by_the_root_of_softplus():
    indices, weights = torch.ops.dsv3.route(LOGITS, BIAS, "sqrtsoftplus", 3, 1, 1, "max", 0.0, False, 0.0, 1.0)
    assert indices.tolist() == [[5, 6, 4]]
    expected = [math.sqrt(math.log1p(math.exp(logit))) for logit in (1, 0.25, -0.5)]
    torch.testing.assert_close(weights, torch.tensor([expected]))


def test_softmax_routing_by_the_best_of_each_group():
    indices, weights = torch.ops.dsv3.route(LOGITS, None, "softmax", 3, 4, 2, "max", 0.0, False, 0.0, 16.0)
    assert indices.tolist() == [[2, 5, 3]]
    torch.testing.assert_close(weights, torch.tensor([[7.803711, 2.870825, 1.056117]]), atol=2e-6, rtol=0)


def test_lowest_index_wins_ties_among_experts_and_groups():
    indices, _ = v3(torch.zeros(5, 12), None, top_k=4, groups=4, top_groups=2)
    assert indices.tolist() == [[0, 1, 2, 3]] * 5


def test_masking_with_minus_infinity_keeps_dropped_groups_out_when_scores_are_negative():
    indices, _ = v3(LOGITS, BIAS - 1.0)
    assert indices.tolist() == [[4, 6, 5]]


def test_bias_never_enters_the_weights():
    indices, weights = v3(LOGITS, torch.full((8,), 5.0))
    same_indices, same_weights = v3(LOGITS, None)
    assert torch.equal(indices, same_indices) and torch.equal(weights, same_weights)


def test_half_precision_logits_are_scored_in_float32():
    assert v3(LOGITS.half(), None)[1].dtype == torch.float32


def test_unknown_scoring_is_named():
    with pytest.raises(ValueError, match="scoring is 'tanh'; accepted: 'sigmoid', 'softmax', 'sqrtsoftplus'"):
        torch.ops.dsv3.route(LOGITS, None, "tanh", 3, 4, 2, "max", 0.0, False, 0.0, 16.0)
