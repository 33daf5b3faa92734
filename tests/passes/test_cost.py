"""Predicted FLOPs are those torch counts when the graph runs; predicted bytes are those one counts by hand."""

import pytest
import sympy
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from codegen.targets import target
from dsv3_compile.capture import Input
from dsv3_compile.phases import fix_sizes
from model_def.presets import PRESETS
from passes.base import Context, Role, Workload
from passes.cost import B, S, T, cost
from passes.inputs import random_inputs, size_values
from passes.pipeline import Pipeline
from passes.verify import run_float64
from tests.passes.harness import layer_graph, module_graph

TOY = PRESETS["toy"]


def counted(graph) -> int:
    sizes = size_values(graph)
    with FlopCounterMode(display=False) as counter:
        run_float64(graph, random_inputs(graph, sizes, seed=0))
    return counter.get_total_flops()


@pytest.mark.parametrize("layer", [0, 1])
def test_flops_of_a_captured_block_are_exactly_those_torch_counts(layer):
    graph = layer_graph(TOY, layer, torch.float32)
    batch, queries, context = size_values(graph).values()
    assert cost(graph.graph).at(Workload(batch, queries, context)).flops == counted(graph)


def test_costs_are_symbolic_in_batch_queries_and_context():
    graph = layer_graph(TOY, 0, torch.float32)
    assert sympy.sympify(cost(graph.graph).flops).free_symbols == {B, S, T}


@pytest.mark.parametrize("preset", ["deepseek-v2-lite"])
def test_decode_bytes_are_those_of_a_hand_count(preset):
    """Weights of the active experts once, the latent cache once; the rest is small change."""
    config = PRESETS[preset]
    graph = fix_sizes(layer_graph(config, config.first_k_dense_replace, torch.bfloat16), {"S": 1})
    Pipeline().run(graph, Context("decode", target("sm_90"), Workload(8, 1, 4096)))
    mla = config.layer(0).attention
    q = config.hidden_size * mla.heads * mla.qk_head_dim
    down = config.hidden_size * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    up = mla.kv_lora_rank * mla.heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    out = mla.heads * mla.v_head_dim * config.hidden_size
    experts = (
        (config.num_experts_per_tok + config.n_shared_experts) * 3 * config.hidden_size * config.moe_intermediate_size
    )
    router = 4 * config.n_routed_experts * config.hidden_size  # float32
    for context in (512, 4096, 32768):
        cache = context * (mla.kv_lora_rank + mla.qk_rope_head_dim)
        by_hand = 2 * (q + down + up + out + experts + cache) + router
        found = cost(graph.graph).at(Workload(1, 1, context)).bytes
        assert abs(found / by_hand - 1) < 0.05, (context, found, by_hand)


class Broadcast(nn.Module):
    """Seven heads share one key: x is expanded, not stored seven times."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(7, 5, 6))

    def forward(self, x):
        return torch.einsum("bshi,hoi->bsho", x[:, :, None].expand(-1, -1, 7, -1), self.w)


def test_a_broadcast_dim_is_stored_once():
    graph = module_graph(Broadcast(), Input("x_BSD", Role.ACTIVATION, ("B", "S", 6), torch.float32))
    key, weight, result = 6, 7 * 5 * 6, 7 * 5
    assert cost(graph.graph).at(Workload(1, 1, 1)).bytes == 4 * (key + weight + result)
