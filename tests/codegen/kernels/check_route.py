import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.route import route
from tests.codegen.calls import SCORINGS, SIGMOID


def both(logits, bias, top_k, groups, top_groups, settings):
    scoring, group_score, masked, normalise = settings
    arguments = (logits, bias, scoring, top_k, groups, top_groups, group_score, masked, normalise, 1e-20, 2.5)
    return route(*arguments), torch.ops.dsv3.route(*arguments)


@SCORINGS
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    "tokens, experts, top_k, groups, top_groups",
    [(1, 1, 1, 1, 1), (3, 7, 3, 1, 1), (4, 15, 4, 5, 2), (2, 60, 6, 3, 2), (3, 6, 2, 6, 3), (2, 16, 8, 4, 4)],
)
def test_agrees(tokens, experts, top_k, groups, top_groups, biased, settings):
    bias = torch.randn(experts) if biased else None
    found, expected = both(torch.randn(tokens, experts), bias, top_k, groups, top_groups, settings)
    torch.testing.assert_close(found, expected)


def test_the_root_of_softplus_is_exact_at_both_ends():
    logits = torch.linspace(-80, 80, 321)[:, None]
    expected = torch.nn.functional.softplus(logits.double()).sqrt()
    found = route(logits, None, "sqrtsoftplus", 1, 1, 1, "max", 0.0, False, 0.0, 1.0)[1]
    torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=0)


@SCORINGS
def test_lowest_index_wins_ties(settings):
    logits = torch.randint(-1, 2, (16, 12)).float()
    found, expected = both(logits, None, 5, 4, 2, settings)
    assert torch.equal(found[0], expected[0])


def test_dropped_groups_are_chosen_lowest_first_when_too_few_are_left():
    found, expected = both(torch.randn(3, 12), torch.randn(12) - 1, 7, 6, 2, SIGMOID)
    torch.testing.assert_close(found, expected)


def test_masked_zero_and_negative_choices_mix_as_the_semantics_say():
    found, expected = both(torch.randn(8, 12), torch.randn(12) - 0.5, 4, 4, 2, ("sigmoid", "top2", 0.0, True))
    torch.testing.assert_close(found, expected)


def test_half_precision_logits_in_a_wider_tensor():
    found, expected = both(torch.randn(3, 20).half()[:, 4:16], torch.randn(12), 4, 4, 2, SIGMOID)
    torch.testing.assert_close(found, expected)


def test_experts_that_every_token_gets_are_listed_last_with_weight_one():
    arguments = (torch.randn(3, 12), None, "softmax", 3, 1, 1, "max", 0.0, True, 0.0, 2.5, 2)
    found, expected = route(*arguments), torch.ops.dsv3.route(*arguments)
    torch.testing.assert_close(found, expected)
    assert found[0][:, 3:].tolist() == [[12, 13]] * 3 and found[1][:, 3:].tolist() == [[1.0, 1.0]] * 3
