"""Products that share their input become one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.base import shape_of
from passes.merge_projections import MergeProjections
from passes.sparsify_experts import SparsifyExperts
from tests.passes.capture import CONTEXT, DENSE_LAYER, V2_GREEDY, graph_of, layer_graph, moe_layer, tensor
from tests.passes.harness import apply, certified, count, reasons, untouched

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

D = 6


class Products(nn.Module):
    def __init__(self, function, **shapes):
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x):
        return self.function(self, x)


def graph_with(function, **shapes):
    return graph_of(Products(function, **shapes), [tensor("x", "B", D)])


def test_a_dense_layer_merges_down_projections_and_gate_with_up():
    graph = layer_graph(DENSE_LAYER)
    outcome = certified(MergeProjections(), graph)
    assert len(outcome.matches) == 2 and not outcome.refusals
    assert count(graph, aten.linear) == 8 - 2


def test_gate_and_up_of_all_experts_become_one_grouped_product():
    graph = layer_graph(moe_layer(V2_GREEDY), 1)
    SparsifyExperts().run(graph, CONTEXT)
    certified(MergeProjections(), graph)
    assert count(graph, dsv3.grouped_linear) == 2


def test_widths_may_differ_and_order_stays():
    graph = graph_with(
        lambda m, x: (F.linear(x, m.a), F.linear(x, m.b), F.linear(x, m.c)), a=(3, D), b=(5, D), c=(2, D)
    )
    certified(MergeProjections(), graph)
    (linear,) = (n for n in graph.graph.nodes if n.target is aten.linear.default)
    assert shape_of(linear)[1] == 10
    assert [n.name for n in linear.args[1].args[0]] == ["a", "b", "c"]


def test_biases_are_merged_too():
    graph = graph_with(lambda m, x: (F.linear(x, m.a, m.s), F.linear(x, m.b, m.t)), a=(3, D), b=(5, D), s=(3,), t=(5,))
    certified(MergeProjections(), graph)
    assert count(graph, aten.linear) == 1


def test_einsums_with_other_letters_are_the_same_form():
    graph = graph_with(
        lambda m, x: (torch.einsum("nd,hdp->nhp", x, m.a), torch.einsum("brc,kr->bkc", x[:, None], x).sum(0),
                      torch.einsum("tk,akb->tab", x, m.b)),
        a=(3, D, 4), b=(3, D, 5),
    )  # fmt: skip
    certified(MergeProjections(), graph)
    assert count(graph, aten.einsum) == 2


def test_a_weight_computed_late_is_moved_up():
    def function(m, x):
        a = F.linear(x, m.a)
        return a, F.linear(x, m.b @ m.c)

    graph = graph_with(function, a=(3, D), b=(5, 2), c=(2, D))
    certified(MergeProjections(), graph)
    assert count(graph, aten.linear) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (F.linear(x, m.a), F.linear(x + 1, m.b)),
        lambda m, x: (F.linear(x, m.a), F.linear(x, m.b * x.sum())),
        lambda m, x: (F.linear(x, m.a), F.linear(x, m.b, m.b[:, 0])),
        lambda m, x: (torch.einsum("nd,hd->nh", x, m.a), torch.einsum("nd,hd->hn", x, m.b)),
        lambda m, x: (torch.einsum("nd,hd->nh", x, m.a), torch.einsum("nd,hd->n", x, m.b)),
        lambda m, x: (F.linear(x, m.a[0]), F.linear(x, m.b[0])),
    ],
    ids=[
        "other input",
        "weight from activations",
        "one has a bias",
        "other order of outputs",
        "outputs summed",
        "vectors",
    ],
)
def test_near_misses(function):
    assert untouched(MergeProjections(), graph_with(function, a=(3, D), b=(5, D))) == ""


ROUTING = (None, "softmax", 2, 1, 1, "max", 0.0, False, 0.0, 1.0)


def routed_beside_others(m, x, logits_too=False):
    tokens = x.unflatten(0, (1, -1))
    logits = F.linear(tokens, m.router).flatten(0, 1)
    shared = F.linear(tokens, m.a) * F.linear(tokens, m.b)
    return (*dsv3.route(logits, *ROUTING), shared, *((logits,) if logits_too else ()))


@pytest.mark.parametrize(
    ("on", "logits_too", "left"),
    [("sm_90", False, 2), ("gfx942", False, 2), ("cpu", False, 1), ("sm_90", True, 1)],
    ids=["sm_90", "gfx942", "cpu", "read by others"],
)
def test_a_product_that_only_routes_is_left_alone_on_a_gpu(on, logits_too, left):
    def function(m, x):
        return routed_beside_others(m, x, logits_too)

    graph = graph_with(function, router=(5, D), a=(3, D), b=(3, D))
    outcome = apply(MergeProjections(), graph, on=on)
    assert len(outcome.matches) == 1 and count(graph, aten.linear) == left
    assert reasons(outcome) == (
        "a router's product stays apart, so that shared experts can join the others" if left == 2 else ""
    )


def test_routers_and_nothing_else():
    def function(m, x):
        return *dsv3.route(F.linear(x, m.a), *ROUTING), *dsv3.route(F.linear(x, m.b), *ROUTING)

    graph = graph_with(function, a=(3, D), b=(5, D))
    assert not apply(MergeProjections(), graph).matches and count(graph, aten.linear) == 2
