"""What depends on weights alone is computed once, and only what computes or copies is moved."""

import torch
from torch import nn

from dsv3_compile.tracing import Input
from passes.base import Role, placeholders
from passes.hoist_weights import HoistWeights
from tests.passes.capture import module_graph
from tests.passes.harness import apply

X = Input("x_BSD", Role.ACTIVATION, ("B", "S", 6), torch.float32)


class Folded(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return x @ (self.b @ self.a).T, x @ torch.cat([self.a, self.a * 2]).T


class Sliced(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        return torch.einsum("bsi,hoi->bsho", x, self.a.unflatten(0, (2, 4))[:, 1:3])


def bound(graph):
    return [n for n in placeholders(graph.graph, Role.WEIGHT) if n.meta.get("bind") is not None]


def test_products_and_copies_of_weights_are_bound():
    graph = module_graph(Folded(), X)
    outcome = apply(HoistWeights(), graph)
    assert len(outcome.matches) == len(bound(graph)) == 2
    assert {tuple(n.meta["val"].shape) for n in bound(graph)} == {(4, 6), (10, 6)}


def test_views_stay_in_the_graph():
    graph = module_graph(Sliced(), X)
    assert not apply(HoistWeights(), graph).matches
    assert [n.name for n in placeholders(graph.graph, Role.WEIGHT)] == ["a"]


def test_equal_recipes_get_equal_names_and_different_ones_do_not():
    first, second = module_graph(Folded(), X), module_graph(Folded(), X)
    for graph in (first, second):
        apply(HoistWeights(), graph)
    assert {n.name for n in bound(first)} == {n.name for n in bound(second)}
    assert len({n.name for n in bound(first)}) == 2
