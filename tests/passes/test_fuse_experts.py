"""A routed SwiGLU is one op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes.base import calls, is_call
from passes.fuse_experts import FuseExperts
from passes.fuse_swiglu import FuseSwiglu
from passes.merge_projections import MergeProjections
from passes.nodes import dtype_of
from passes.sparsify_experts import SparsifyExperts
from tests.passes.capture import CONTEXT, V2_GREEDY, V3_ROUTING, graph_of, layer_graph, moe_layer, tensor
from tests.passes.harness import certified, count, untouched

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

E, K, D, I = 5, 2, 6, 4  # noqa: E741


class Experts(nn.Module):
    def __init__(self, activation, leak: bool = False, apart: bool = False, wide: bool | str = False):
        super().__init__()
        self.activation, self.leak, self.apart, self.wide = activation, leak, apart, wide
        self.router = nn.Parameter(torch.empty(E, D))
        self.gate_up, self.down = nn.Parameter(torch.empty(E, 2 * I, D)), nn.Parameter(torch.empty(E, D, I))
        self.gate, self.up = nn.Parameter(torch.empty(E, I, D)), nn.Parameter(torch.empty(E, I, D))

    def forward(self, x):
        weights, indices = F.linear(x, self.router).softmax(-1).topk(K, -1)
        order, offsets = dsv3.sort_pairs(indices, E)
        stacks = [self.gate, self.up] if self.apart else [self.gate_up]
        rows = x[order // K].to(self.down.dtype)
        first = [dsv3.grouped_linear(rows, stack, offsets) for stack in stacks]
        second = dsv3.grouped_linear(self.activation(*first), self.down, offsets)
        y = dsv3.combine_pairs(second.float() if self.wide else second, order, weights)
        y = y if self.wide == "kept" else y.to(x.dtype)
        return (y, first[0].sum()) if self.leak else y


def graph_with(activation, leak: bool = False, apart: bool = False, wide: bool | str = False, dtype=torch.float32):
    return graph_of(Experts(activation, leak, apart, wide).to(dtype), [tensor("x", "B", D, dtype=dtype)])


def test_layers_of_the_family():
    for routing, queries in ((V3_ROUTING, "S"), (V2_GREEDY, 1)):
        graph = layer_graph(moe_layer(routing), queries)
        for rewrite in (SparsifyExperts(), MergeProjections(), FuseSwiglu()):
            rewrite.run(graph, CONTEXT)
        assert len(certified(FuseExperts(), graph).matches) == 1
        assert count(graph, dsv3.sort_pairs, dsv3.grouped_linear, dsv3.combine_pairs) == 0
        (node,) = calls(graph.graph, dsv3.routed_swiglu)
        assert node.args[3].target is aten.cat.default


GATED = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "up first": lambda gate, up: up * F.silu(gate),
    "sigmoid": lambda gate, up: gate * gate.sigmoid() * up,
    "in float": lambda gate, up: (F.silu(gate.float()) * up).to(gate.dtype),
}


@pytest.mark.parametrize("activation", GATED.values(), ids=GATED)
def test_gates_and_ups_may_be_stacks_of_their_own(activation):
    for dtype, wide in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        graph = graph_with(activation, apart=True, wide=wide, dtype=dtype)
        assert untouched(FuseSwiglu(), graph) == ""
        assert len(certified(FuseExperts(joined=False), graph).matches) == 1
        assert count(graph, dsv3.sort_pairs, dsv3.grouped_linear, dsv3.combine_pairs) == 0
        (node,) = calls(graph.graph, dsv3.routed_swiglu)
        stacks = {name: [n for n in graph.graph.nodes if n.target == name] for name in ("gate", "up", "down")}
        assert [node.args[3:]] == [(*stacks["gate"], *stacks["down"], None, 0, *stacks["up"])]


PARTS = {
    "up first": lambda h: h[:, :I] * F.silu(h[:, I:]),
    "chunks": lambda h: h.chunk(2, -1)[0] * F.silu(h.chunk(2, -1)[1]),
    "in turns": lambda h: F.silu(h[:, ::2]) * h[:, 1::2],
    "of one split": lambda h: torch.mul(*(f(x) for f, x in zip((lambda up: up, F.silu), h.split(I, -1), strict=True))),
}


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("activation", PARTS.values(), ids=PARTS)
def test_gates_and_ups_may_lie_in_any_order(activation, joined):
    graph = graph_with(activation)
    assert untouched(FuseSwiglu(), graph) == ""
    assert len(certified(FuseExperts(joined), graph).matches) == 1
    assert count(graph, dsv3.grouped_linear) == 0
    (node,) = calls(graph.graph, dsv3.routed_swiglu)
    assert is_call(node.args[3], aten.cat if joined else aten.slice) and len(node.args) == (5 if joined else 8)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("by_op", [True, False])
def test_gates_and_ups_within_a_limit(by_op, apart, joined):
    def limited(gate, up):
        return F.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)

    graph = graph_with(limited if apart else lambda h: limited(*h.chunk(2, -1)), apart=apart)
    if by_op:
        FuseSwiglu().run(graph, CONTEXT)
    one_stack = count(graph, dsv3.swiglu) == 1
    assert one_stack == (by_op and not apart)
    assert len(certified(FuseExperts(joined), graph).matches) == 1
    (node,) = calls(graph.graph, dsv3.routed_swiglu)
    assert (*node.args[5:7], node.args[8]) == (None, 0, 0.5)
    assert (node.args[7] is None) == (one_stack or joined)


def test_a_part_that_is_read_elsewhere_is_refused():
    graph = graph_with(lambda h: h[:, :I] * F.silu(h[:, I:]) + h[:, I:].sum(1, keepdim=True) * 0)
    assert untouched(FuseExperts(), graph) == "the experts are no SwiGLU: add stands between their products"
    graph = graph_with(PARTS["up first"], leak=True)
    assert untouched(FuseExperts(), graph) == "grouped_linear is used by sum as well"


def test_tokens_may_be_rounded_once_they_are_picked():
    module = Experts(GATED["silu"], apart=True, wide=True)
    for stack in (module.gate, module.up, module.down):
        stack.data = stack.data.bfloat16()

    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = module

        def forward(self, x):
            return self.experts(x).bfloat16()

    graph = graph_of(Rounded(), [tensor("x", "B", D)])
    assert len(certified(FuseExperts(joined=False), graph).matches) == 1
    (node,) = calls(graph.graph, dsv3.routed_swiglu)
    assert dtype_of(node.args[0]) == torch.bfloat16


def test_a_sum_that_is_wanted_in_float_stays_one():
    graph = graph_with(GATED["silu"], apart=True, wide="kept", dtype=torch.bfloat16)
    reason = "combine_pairs is not rounded to torch.bfloat16, in which its experts are"
    assert untouched(FuseExperts(), graph) == reason


def test_other_activations_keep_the_grouped_form():
    graph = graph_with(lambda h: F.gelu(h[:, :I]) * h[:, I:])
    assert untouched(FuseExperts(), graph) == "the experts are no SwiGLU: mul stands between their products"


def test_gates_of_other_rows_are_refused():
    graph = graph_with(lambda gate, up: F.silu(gate.flip(0)) * up, apart=True)
    assert untouched(FuseExperts(), graph) == "mul does not follow a grouped product of the sorted tokens"


def test_a_product_used_elsewhere_is_refused():
    graph = graph_with(torch.ops.dsv3.swiglu, leak=True)
    assert untouched(FuseExperts(), graph) == "grouped_linear is used by sum as well"
    graph = graph_with(GATED["sigmoid"], leak=True, apart=True)
    assert untouched(FuseExperts(), graph) == "grouped_linear is used by sum as well"
