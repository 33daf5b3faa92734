"""Sorting pairs, grouped products and the routed SwiGLU against a loop over tokens."""

import pytest
import torch
import torch.nn.functional as F

from codegen import ops  # noqa: F401  defines torch.ops.dsv3

dsv3 = torch.ops.dsv3


def draw(tokens, experts, top_k, hidden=6, width=5, choose_from=None):
    choose_from = choose_from or experts
    indices = torch.stack([torch.randperm(choose_from)[:top_k] for _ in range(tokens)])
    double = {"dtype": torch.float64}
    return (
        torch.randn(tokens, hidden, **double),
        indices,
        torch.rand(tokens, top_k, **double),
        torch.randn(experts, 2 * width, hidden, **double),
        torch.randn(experts, hidden, width, **double),
    )


def token_by_token(x, indices, weights, gate_up, down, limit=torch.inf):
    out = torch.zeros_like(x)
    for n, chosen in enumerate(indices.tolist()):
        for k, e in enumerate(chosen):
            gate, up = (gate_up[e] @ x[n]).chunk(2)
            gate, up = gate.minimum(torch.tensor(limit)), up.maximum(torch.tensor(-limit)).minimum(torch.tensor(limit))
            out[n] += weights[n, k] * (down[e] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("tokens, experts, top_k", [(1, 1, 1), (1, 7, 3), (13, 5, 2)])
def test_routed_swiglu_is_the_weighted_sum_over_chosen_experts(tokens, experts, top_k):
    arguments = draw(tokens, experts, top_k)
    torch.testing.assert_close(dsv3.routed_swiglu(*arguments), token_by_token(*arguments))


def test_the_four_steps_make_the_routed_swiglu():
    x, indices, weights, gate_up, down = arguments = draw(9, 7, 3)
    order, offsets = dsv3.sort_pairs(indices, 7)
    hidden = dsv3.swiglu(dsv3.grouped_linear(x[order // 3], gate_up, offsets))
    found = dsv3.combine_pairs(dsv3.grouped_linear(hidden, down, offsets), order, weights)
    torch.testing.assert_close(found, dsv3.routed_swiglu(*arguments))


def test_gates_and_ups_stay_within_a_limit():
    arguments = draw(9, 7, 3)
    found = dsv3.routed_swiglu(*arguments, limit=0.7)
    torch.testing.assert_close(found, token_by_token(*arguments, 0.7))
    assert not found.isclose(dsv3.routed_swiglu(*arguments)).any()
    gate_up = torch.tensor([-9.0, 9.0, 9.0, 0.5, torch.nan, 1.0, -9.0, 9.0, torch.nan, 0.5])
    silu = F.silu(torch.tensor([-9.0, 2.0, 2.0, 0.5, torch.nan]))
    expected = silu * torch.tensor([1.0, -2.0, 2.0, torch.nan, 0.5])
    torch.testing.assert_close(dsv3.swiglu(gate_up, 2.0), expected, equal_nan=True)


def test_gates_and_ups_may_be_two_stacks():
    x, indices, weights, gate_up, down = arguments = draw(9, 7, 3)
    gate, up = gate_up.chunk(2, 1)
    found = dsv3.routed_swiglu(x, indices, weights, gate, down, up=up)
    torch.testing.assert_close(found, token_by_token(*arguments))


def test_weights_of_experts_nobody_chose_are_not_read():
    x, indices, weights, gate_up, down = draw(4, 8, 2, choose_from=3)
    gate_up[3:], down[3:] = torch.nan, torch.nan
    assert dsv3.routed_swiglu(x, indices, weights, gate_up, down).isfinite().all()


def test_sort_pairs_is_stable_and_counts_empty_experts():
    order, offsets = dsv3.sort_pairs(torch.tensor([[3, 1], [1, 3], [0, 3]]), 5)
    assert order.tolist() == [4, 1, 2, 0, 3, 5]
    assert offsets.tolist() == [1, 3, 3, 6, 6] and offsets.dtype == torch.int32
