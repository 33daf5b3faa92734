"""A routed SwiGLU is one op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from passes.base import calls
from passes.fuse_experts import FuseExperts
from passes.fuse_swiglu import FuseSwiglu
from passes.merge_projections import MergeProjections
from passes.sparsify_experts import SparsifyExperts
from tests.passes.capture import (
    CONTEXT,
    V2_GREEDY,
    V3_ROUTING,
    certified,
    count,
    graph_of,
    layer_graph,
    moe_layer,
    tensor,
    untouched,
)

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

E, K, D, I = 5, 2, 6, 4  # noqa: E741


class Experts(nn.Module):
    def __init__(self, activation, leak: bool = False):
        super().__init__()
        self.activation, self.leak = activation, leak
        self.router = nn.Parameter(torch.empty(E, D))
        self.gate_up, self.down = nn.Parameter(torch.empty(E, 2 * I, D)), nn.Parameter(torch.empty(E, D, I))

    def forward(self, x):
        weights, indices = F.linear(x, self.router).softmax(-1).topk(K, -1)
        order, offsets = dsv3.sort_pairs(indices, E)
        first = dsv3.grouped_linear(x[order // K], self.gate_up, offsets)
        second = dsv3.grouped_linear(self.activation(first), self.down, offsets)
        y = dsv3.combine_pairs(second, order, weights)
        return (y, first.sum()) if self.leak else y


def graph_with(activation, leak: bool = False):
    return graph_of(Experts(activation, leak), [tensor("x", "B", D)])


def test_layers_of_the_family():
    for routing, queries in ((V3_ROUTING, "S"), (V2_GREEDY, 1)):
        graph = layer_graph(moe_layer(routing), queries)
        for rewrite in (SparsifyExperts(), MergeProjections(), FuseSwiglu()):
            rewrite.run(graph, CONTEXT)
        assert len(certified(FuseExperts(), graph).matches) == 1
        assert count(graph, dsv3.sort_pairs, dsv3.grouped_linear, dsv3.combine_pairs) == 0
        (node,) = calls(graph.graph, dsv3.routed_swiglu)
        assert node.args[3].target is aten.cat.default


def test_other_activations_keep_the_grouped_form():
    graph = graph_with(lambda h: F.gelu(h[:, :I]) * h[:, I:])
    assert untouched(FuseExperts(), graph) == "the experts are no SwiGLU: mul stands between their products"


def test_a_product_used_elsewhere_is_refused():
    graph = graph_with(torch.ops.dsv3.swiglu, leak=True)
    assert untouched(FuseExperts(), graph) == "grouped_linear is used by sum as well"
