"""Gates summed over one-hot choices are scatters, however they are written; anything that is not quite one stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.canonicalise import Canonicalise
from passes.scatter_one_hots import ScatterOneHots
from passes.sparsify_experts import SparsifyExperts
from tests.passes.capture import module_graph, tensor
from tests.passes.harness import apply, count

aten, dsv3 = torch.ops.aten, torch.ops.dsv3
EXPERTS, CHOSEN, HIDDEN = 9, 3, 10


def multiplied(indices, weights):
    return (F.one_hot(indices, EXPERTS).to(weights.dtype) * weights[..., None]).sum(-2)


def contracted(indices, weights):
    return torch.einsum("...k,...ke->...e", weights, F.one_hot(indices, EXPERTS).float())


def compared(indices, weights):
    return (weights.unsqueeze(-1) * (torch.arange(EXPERTS) == indices.unsqueeze(-1))).sum(-2)


class Experts(nn.Module):
    """All experts of all tokens, summed with a gate."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, 7, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 7))

    def forward(self, x_ND):
        weights, indices = self.router(x_ND).softmax(-1).topk(CHOSEN, -1)
        hidden = torch.einsum("nd,efd->enf", x_ND, self.up).relu()
        return torch.einsum("end,ne->nd", hidden @ self.down.mT, self.gate(indices, weights))


@pytest.mark.parametrize("tokens", [1, 5, "B"])
@pytest.mark.parametrize("gate", [multiplied, contracted, compared])
def test_gates_of_one_hots_are_made_sparse(gate, tokens):
    graph = module_graph(Experts(gate), tensor("x_ND", tokens, HIDDEN))
    apply(Canonicalise(), graph)
    assert len(apply(ScatterOneHots(), graph).matches) == 1
    assert count(graph, aten.scatter_add) == 1 and count(graph, aten.one_hot, aten.eq) == 0
    assert len(apply(SparsifyExperts(), graph).matches) == 1
    assert count(graph, dsv3.grouped_linear) == 2


class Gate(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, indices, weights):
        return self.gate(indices, weights)


@pytest.mark.parametrize("shape", [(4, CHOSEN), ("B", 5, CHOSEN)])
def test_any_indices_may_be_scattered_by_one_hot(shape):
    """An expert may be chosen twice."""
    inputs = tensor("indices", *shape, dtype=torch.int64, upper=EXPERTS), tensor("weights", *shape)
    graph = module_graph(Gate(multiplied), *inputs)
    assert len(apply(ScatterOneHots(), graph).matches) == 1


class Groups(nn.Module):
    def forward(self, scores):
        return F.one_hot(scores.topk(CHOSEN, -1).indices, EXPERTS).sum(1)


def test_a_mask_of_what_was_chosen_is_a_scatter_too():
    graph = module_graph(Groups(), tensor("scores", "B", EXPERTS))
    apply(Canonicalise(), graph)
    assert len(apply(ScatterOneHots(), graph).matches) == 1
    assert count(graph, aten.scatter) == 1 and count(graph, aten.one_hot) == 0


def of_tokens(indices, weights):
    return (F.one_hot(indices, EXPERTS) * weights[:, :1, None]).sum(1)


def counted(indices, weights):
    return F.one_hot(indices, EXPERTS).sum(1)


def experts_summed(indices, weights):
    return F.one_hot(indices, EXPERTS).sum(-1) * weights


def compared_with_some(indices, weights):
    return ((indices.unsqueeze(-1) == torch.arange(1, EXPERTS + 1)) * weights.unsqueeze(-1)).sum(-2)


@pytest.mark.parametrize("gate", [of_tokens, counted, compared, compared_with_some, experts_summed])
def test_near_misses_stay(gate):
    """Weights of tokens, counts of any indices, comparisons of indices that no top-k gave, sums over experts."""
    inputs = tensor("indices", 4, CHOSEN, dtype=torch.int64, upper=EXPERTS), tensor("weights", 4, CHOSEN)
    graph = module_graph(Gate(gate), *inputs)
    assert not apply(ScatterOneHots(), graph).matches
    assert count(graph, aten.one_hot, aten.eq) == 1
