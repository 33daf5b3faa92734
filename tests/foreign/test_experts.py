"""The MoE layers of transformers' models: routing is one op and the experts are another."""

from __future__ import annotations

import pytest
import torch

from codegen.targets import TARGETS
from passes.base import Context, Workload, calls
from passes.certify import RegionalSpecimen
from passes.pipeline import FOREIGN_PIPELINE, Pipeline
from tests.foreign.models import deepseek_v2, deepseek_v3, kimi_like
from tests.foreign.tracing import graphs_of

aten, dsv3 = torch.ops.aten, torch.ops.dsv3

MODELS = {
    "v3": deepseek_v3,
    "kimi": kimi_like,
    "v2-greedy": deepseek_v2,
    "v2-grouped": lambda **changes: deepseek_v2("group_limited_greedy", **changes),
}
CONTEXT = Context("any", TARGETS["cpu"], Workload(0, 0, 0))


def moe_graphs(build, implementation: str, dtype: torch.dtype = torch.float32):
    """Graphs of one MoE layer: of a prompt of two rows, of one token, and of any length."""
    model = build(num_hidden_layers=2).to(dtype)
    model.set_experts_implementation(implementation)

    def run(layer):
        for shape in ((2, 7), (1, 1), (3, 9)):
            layer(torch.randn(*shape, model.config.hidden_size, dtype=dtype))

    return [found.module for found in graphs_of(model.model.layers[1].mlp, run)]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("v3", "batched_mm"),
        ("v2-greedy", "batched_mm"),
        # with grouped products they are in test_backend.py as well
        *(pytest.param(name, "grouped_mm", marks=pytest.mark.slow) for name in ("v3", "kimi", "v2-grouped")),
    ],
)
def test_routing_and_experts_of_every_family_are_one_op_each(name, implementation):
    graphs = moe_graphs(MODELS[name], implementation)
    assert len(graphs) == 3
    for graph in graphs:
        # Certified after every pass: Pipeline.run raises CertificateError.
        Pipeline(FOREIGN_PIPELINE).run(graph, CONTEXT, specimen=RegionalSpecimen(graph))
        (routing,) = calls(graph.graph, dsv3.route)
        (experts,) = calls(graph.graph, dsv3.routed_swiglu)
        assert [node.args[1] for node in (experts.args[1], experts.args[2])] == [0, 1]
        assert {node.args[0] for node in (experts.args[1], experts.args[2])} == {routing}
        assert all(weight.op == "placeholder" for weight in experts.args[3:])
        assert not list(calls(graph.graph, aten.sort, aten.topk, aten.index, aten.bmm))


def test_experts_in_bfloat16_call_torchs_own_grouped_product():
    for graph in moe_graphs(deepseek_v3, "grouped_mm", torch.bfloat16):
        assert len(list(calls(graph.graph, aten._grouped_mm))) == 2
        Pipeline(FOREIGN_PIPELINE).run(graph, CONTEXT, specimen=RegionalSpecimen(graph))
        assert len(list(calls(graph.graph, dsv3.routed_swiglu))) == 1
