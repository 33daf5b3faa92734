"""Predicted FLOPs are those torch counts when the graph runs; predicted bytes are those one counts by hand."""

import dataclasses

import pytest
import sympy
import torch
from torch.utils.flop_counter import FlopCounterMode

from codegen.targets import target
from dsv3_compile.driver import build
from dsv3_compile.options import options_from
from model_def.presets import PRESETS
from passes.base import Workload
from passes.cost import B, S, T, cost
from passes.verify import random_inputs, run_float64, size_values
from tests.passes.harness import layer_graph

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
    program = build(config, options_from({"target": "sm_90", "no_weights": True, "verify": False}))
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
        found = cost(program.blocks["moe", "decode"].module.graph).at(Workload(1, 1, context)).bytes
        assert abs(found / by_hand - 1) < 0.05, (context, found, by_hand)


def test_a_broadcast_dim_is_stored_once():
    graph = layer_graph(dataclasses.replace(TOY), 0, torch.float32)
    at = Workload(2, 1, 4096)
    expand = next(n for n in graph.graph.nodes if "expand" in n.name)
    assert expand.meta["val"].stride()[2] == 0
    assert cost(graph.graph).at(at).bytes > 0 and target("sm_90").balance > 100
