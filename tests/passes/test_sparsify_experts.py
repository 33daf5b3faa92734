"""The sum over all experts becomes grouped products over the chosen ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.sparsify_experts import SparsifyExperts
from tests.passes.capture import V2_GREEDY, V3_ROUTING, graph_of, layer_graph, moe_layer, tensor
from tests.passes.harness import certified, count, untouched

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

E, K, D, I, O = 7, 3, 6, 5, 4  # noqa: E741


@pytest.mark.parametrize(("routing", "queries"), [(V3_ROUTING, "S"), (V2_GREEDY, 1)], ids=["v3", "v2-decode"])
def test_the_definition_becomes_grouped_products(routing, queries):
    graph = layer_graph(moe_layer(routing), queries)
    outcome = certified(SparsifyExperts(), graph)
    assert len(outcome.matches) == 1 and not outcome.refusals
    assert count(graph, dsv3.grouped_linear) == 3
    assert count(graph, dsv3.sort_pairs) == count(graph, dsv3.combine_pairs) == 1
    assert count(graph, aten.scatter) == (1 if routing.groups > 1 else 0)


class Experts(nn.Module):
    """A routed layer whose gate and sum are given as functions."""

    def __init__(self, total: Callable[..., Tensor], gate: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.total, self.gate = total, gate or top_k_gate
        self.router = nn.Parameter(torch.empty(E, D))
        self.w1, self.w2, self.w3 = (nn.Parameter(torch.empty(s)) for s in ((E, I, D), (E, O, I), (E, I, D)))
        self.b1, self.shared = nn.Parameter(torch.empty(E, I)), nn.Parameter(torch.empty(O, I))

    def forward(self, x: Tensor) -> Tensor:
        return self.total(self, x, self.gate(F.linear(x, self.router).sigmoid()))


def top_k_gate(scores: Tensor) -> Tensor:
    weights, indices = scores.topk(K, -1)
    return torch.zeros_like(scores).scatter(-1, indices, weights)


def hidden(m: Experts, x: Tensor) -> Tensor:
    return F.gelu(torch.einsum("nd,eid->nei", x, m.w1))


def one_product(m, x, g):
    return torch.einsum("ne,nei,eoi->no", g, hidden(m, x), m.w2)


def graph_with(total, gate=None, shape=("B", D)):
    return graph_of(Experts(total, gate), [tensor("x", *shape)])


def two_products(m, x, g):
    return torch.einsum("ne,neo->no", g, torch.einsum("nei,eoi->neo", hidden(m, x), m.w2))


def multiply_and_sum(m, x, g):
    return (torch.einsum("nei,eoi->neo", hidden(m, x), m.w2) * g[..., None]).sum(1)


def gate_before_down_projection(m, x, g):
    return torch.einsum("nei,eoi->no", hidden(m, x) * g.unsqueeze(-1), m.w2)


def experts_first(m, x, g):
    h = F.silu(torch.einsum("eid,nd->eni", m.w1, x)) * torch.einsum("eid,nd->eni", m.w3, x)
    return torch.einsum("eni,eoi,ne->on", h, m.w2, g).t()


def batched_matmul(m, x, g):
    y = torch.matmul(torch.matmul(x, m.w1.transpose(1, 2)).relu(), m.w2.transpose(1, 2))
    return (y * g.t()[:, :, None]).sum(0)


def transposed_weights(m, x, g):
    h = torch.einsum("nd,edi->nei", x, m.w1.transpose(1, 2)).tanh()
    return torch.einsum("ne,nei,eio->no", g, h, m.w2.transpose(1, 2))


def per_expert_bias(m, x, g):
    h = F.silu(torch.einsum("nd,eid->nei", x, m.w1) + m.b1)
    return torch.einsum("ne,nei,eoi->no", g, h, m.w2)


def scaled_gate(m, x, g):
    return torch.einsum("ne,nei,eoi->no", (2.5 * g).to(torch.float32) / 3.0, hidden(m, x), m.w2) * 0.5


def score_inside_activation(m, x, g):
    h = (torch.einsum("nd,eid->nei", x, m.w1) * F.linear(x, m.router)[:, :, None]).relu()
    return torch.einsum("ne,nei,eoi->no", g, h, m.w2)


def halves_of_one_product(m, x, g):
    gate, up = torch.einsum("nd,eid->nei", x, torch.cat([m.w1, m.w3], 1)).chunk(2, -1)
    return torch.einsum("ne,nei,eoi->no", g, F.silu(gate) * up, m.w2)


@pytest.mark.parametrize(
    "total",
    [one_product, two_products, multiply_and_sum, gate_before_down_projection, experts_first, batched_matmul,
     transposed_weights, per_expert_bias, scaled_gate, score_inside_activation, halves_of_one_product],
)  # fmt: skip
def test_every_way_to_write_the_sum(total):
    graph = graph_with(total)
    outcome = certified(SparsifyExperts(), graph)
    assert len(outcome.matches) == 1 and not outcome.refusals
    assert count(graph, dsv3.grouped_linear) >= 2 and count(graph, dsv3.combine_pairs) == 1
    assert count(graph, aten.scatter, aten.einsum, aten.matmul) == 0


def sorted_gate(scores):
    weights, indices = scores.sort(-1, descending=True)
    return torch.zeros_like(scores).scatter(-1, indices[:, :K], weights[:, :K])


def stably_sorted_gate(scores):
    indices = torch.sort(scores, stable=True, dim=-1, descending=True).indices[:, 1 : K + 1]
    return torch.zeros_like(scores).scatter(-1, indices, scores.gather(-1, indices))


def argsorted_gate(scores):
    indices = scores.argsort(-1)[:, -K:]
    return torch.zeros_like(scores).scatter(-1, indices, scores.gather(-1, indices))


def largest_gate(scores):
    weights, indices = scores.max(-1, keepdim=True)
    return torch.zeros_like(scores).scatter(-1, indices, weights)


def gate_of_the_first(scores):
    indices = scores.argmax(-1).unsqueeze(-1)
    return torch.zeros_like(scores).scatter(-1, indices, scores.gather(-1, indices))


@pytest.mark.parametrize("gate", [sorted_gate, stably_sorted_gate, argsorted_gate, largest_gate, gate_of_the_first])
def test_choices_that_are_no_top_k(gate):
    graph = graph_with(one_product, gate)
    outcome = certified(SparsifyExperts(), graph)
    assert len(outcome.matches) == 1 and not outcome.refusals
    assert count(graph, dsv3.grouped_linear) == 2 and count(graph, aten.scatter) == 0


def test_two_token_axes():
    def total(m, x, g):
        h = F.silu(torch.einsum("bsd,eid->bsei", x, m.w1))
        return torch.einsum("bse,bsei,eoi->bos", g, h, m.w2)

    graph = graph_with(total, shape=("B", "S", D))
    assert len(certified(SparsifyExperts(), graph).matches) == 1


@pytest.mark.parametrize("shape", [(), ("B", 2, 1, 1, 2, D)], ids=["none", "five"])
def test_more_token_axes_than_letters_and_none(shape):
    graph = graph_of(Scattered(), [tensor("x", *shape)])
    assert untouched(SparsifyExperts(), graph) == ""


class Scattered(nn.Module):
    def forward(self, x):
        values, indices = x.topk(1, -1)
        return torch.zeros_like(x).scatter(-1, indices, values) * 2


def test_gate_may_be_renormalised_after_the_scatter():
    def gate(scores):
        g = top_k_gate(scores)
        return g / (g.sum(-1, keepdim=True) + 1e-20)

    graph = graph_with(one_product, gate)
    assert len(certified(SparsifyExperts(), graph).matches) == 1
    assert count(graph, dsv3.grouped_linear) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_gate_may_be_a_mask_times_the_scores(dtype):
    def gate(scores):
        chosen = scores.topk(K, -1).indices
        return scores * torch.zeros_like(scores, dtype=dtype).scatter(-1, chosen, 1)

    graph = graph_with(one_product, gate)
    assert len(certified(SparsifyExperts(), graph).matches) == 1
    assert count(graph, aten.scatter) == 0


def test_indices_and_weights_may_be_used_elsewhere():
    def total(m, x, g):
        return one_product(m, x, g) + g.sum(-1, keepdim=True)

    graph = graph_with(total)
    assert len(certified(SparsifyExperts(), graph).matches) == 1


# ---- near misses


def softmax_over_experts(m, x, g):
    return torch.einsum("ne,nei,eoi->no", g, torch.einsum("nd,eid->nei", x, m.w1).softmax(1), m.w2)


def hidden_used_elsewhere(m, x, g):
    h = hidden(m, x)
    return torch.einsum("ne,nei,eoi->no", g, h, m.w2) + h.sum((1, 2))[:, None]


def shared_down_projection(m, x, g):
    return torch.einsum("ne,nei,oi->no", g, hidden(m, x), m.shared)


def sum_over_tokens(m, x, g):
    return torch.einsum("ne,nei,eoi->o", g, hidden(m, x), m.w2)


def rounded(m, x, g):
    return torch.div(g[..., None] * torch.einsum("nei,eoi->neo", hidden(m, x), m.w2), 0.1, rounding_mode="floor").sum(1)


def whole_numbers(m, x, g):
    return (g[..., None] * torch.einsum("nei,eoi->neo", hidden(m, x), m.w2)).to(torch.int64).sum(1)


@pytest.mark.parametrize(
    ("total", "reason"),
    [
        (rounded, ""),
        (whole_numbers, ""),
        (softmax_over_experts, "softmax may look at several experts at once"),
        (hidden_used_elsewhere, "gelu is used by sum as well"),
        (shared_down_projection, "shared in einsum has no expert axis"),
        (sum_over_tokens, "einsum sums over tokens as well as experts"),
    ],
)
def test_near_misses_of_the_sum(total, reason):
    assert untouched(SparsifyExperts(), graph_with(total)) == reason


def gate_into_ones(scores):
    weights, indices = scores.topk(K, -1)
    return torch.ones_like(scores).scatter(-1, indices, weights)


def gate_that_adds(scores):
    weights, indices = scores.topk(K, -1)
    return torch.zeros_like(scores).scatter_add(-1, indices % 2, weights)


def gate_sorted_across_tokens(scores):
    indices = scores.sort(0).indices[:, :K]
    return torch.zeros_like(scores).scatter(-1, indices, scores.gather(-1, indices))


def gate_of_repeated_experts(scores):
    weights, indices = scores.topk(K, -1)
    return torch.zeros_like(scores).scatter(-1, indices // 2, weights)


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        (gate_into_ones, "scatter scatters into ones_like, which is not all zeros"),
        (gate_that_adds, "remainder is neither a top-k nor sorted: a token may have one expert twice"),
        (gate_sorted_across_tokens, "slice is neither a top-k nor sorted: a token may have one expert twice"),
        (gate_of_repeated_experts, "floor_divide is neither a top-k nor sorted: a token may have one expert twice"),
    ],
)
def test_near_misses_of_the_gate(gate, reason):
    assert untouched(SparsifyExperts(), graph_with(one_product, gate)) == reason


def test_two_gates_of_different_tokens_are_no_gate():
    def total(m, x, g):
        return torch.einsum("ne,me,eoi->noi", g, g, m.w2)

    assert untouched(SparsifyExperts(), graph_with(total)) == ""


def test_a_gate_may_be_read_by_what_has_two_results():
    def total(m, x, g):
        return one_product(m, x, g) * g.max(-1, keepdim=True).values

    assert len(certified(SparsifyExperts(), graph_with(total)).matches) == 1


def test_a_gate_behind_a_nonlinearity_is_no_gate():
    def total(m, x, g):
        return torch.einsum("ne,nei,eoi->no", g.exp(), hidden(m, x), m.w2)

    assert untouched(SparsifyExperts(), graph_with(total)) == ""
