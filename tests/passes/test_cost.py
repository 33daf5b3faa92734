"""Predicted FLOPs are those torch counts when the graph runs; predicted bytes are those one counts by hand."""

import pytest
import sympy
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from codegen.targets import target
from dsv3_compile.phases import fix_sizes
from dsv3_compile.tracing import Input
from model_def.config import ModelConfig
from model_def.presets import PRESETS
from passes.base import Context, Role, Workload, sweep
from passes.cost import B, S, T, cost
from passes.inputs import size_values
from passes.pipeline import DEFAULT_PIPELINE
from passes.verify import clone, run_float64
from tests.dsv3_compile.tiny import TINY
from tests.passes.capture import model_layer, module_graph, random_inputs, tensor

DENSE, MOE = 0, 1


def counted(graph, inputs) -> int:
    with FlopCounterMode(display=False) as counter:
        run_float64(graph, inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("layer", [DENSE, MOE])
def test_flops_before_and_after_every_pass_are_exactly_those_torch_counts(layer, phase):
    graph = model_layer(TINY, layer, torch.float32)
    if phase == "decode":
        graph = fix_sizes(graph, {"S": 1})
    sizes = size_values(graph)
    inputs = random_inputs(clone(graph), sizes, seed=0)
    batch, *queries, context = sizes.values()
    here = Workload(batch, *(queries or [1]), context)
    expected = {"captured": counted(graph, inputs)}
    found = {"captured": cost(graph.graph).at(here).flops}
    for one in DEFAULT_PIPELINE:
        one.run(graph, Context(phase, target("sm_90"), Workload(1, 1 if phase == "decode" else 4096, 4096)))
        sweep(graph)
        expected[one.name()] = counted(graph, inputs)
        found[one.name()] = cost(graph.graph).at(here).flops
    assert found == expected
    # Fusion multiplies nothing out anew.
    assert found["fuse-attention"] == found["fuse-routing"]
    assert found["lower"] == found["sparsify-experts"]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Parameter(torch.empty(64, 8, 6)), nn.Parameter(torch.empty(64, 6, 4))

    def forward(self, x, indices, weights):
        return torch.ops.dsv3.routed_swiglu(x, indices, weights, self.gate_up, self.down)


@pytest.mark.parametrize(("tokens", "share"), [(1, 6 / 64), (20, 1 - (58 / 64) ** 20), (20_000, 1.0)])
def test_experts_in_use_are_whole_bytes_whatever_the_number_of_tokens(tokens, share):
    chosen = Input("indices", Role.ACTIVATION, (tokens, 6), torch.int64, 64)
    graph = module_graph(Experts(), tensor("x", tokens, 6), chosen, tensor("weights", tokens, 6))
    moved = cost(graph.graph).bytes
    assert str(moved).isdigit() and len(str(moved)) < 12
    weights = 4 * 64 * (8 * 6 + 6 * 4)
    assert moved == round(weights * share) + tokens * (2 * 6 * 4 + 6 * 8 + 6 * 4)


class Fused(nn.Module):
    """Attention as torch itself fuses it, six query heads on three of keys."""

    def forward(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def test_torchs_own_attention_counts_as_its_two_products():
    shapes = {"q_BHSA": (6, 5, 8), "k_BGTA": (3, 7, 8), "v_BGTV": (3, 7, 4)}
    inputs = [Input(name, Role.ACTIVATION, ("B", *shape), torch.float32) for name, shape in shapes.items()]
    graph = module_graph(Fused(), *inputs)
    assert cost(graph.graph).at(Workload(2, 5, 7)).flops == 2 * 2 * 6 * 5 * 7 * (8 + 4)


def test_costs_are_symbolic_in_batch_queries_and_context():
    graph = model_layer(TINY, DENSE, torch.float32)
    assert sympy.sympify(cost(graph.graph).flops).free_symbols == {B, S, T}


def decode_bytes_by_hand(config: ModelConfig, layer: int, context: int) -> int:
    """Weights of the active experts once, the latent cache once; the rest is small change."""
    spec, hidden = config.layer(layer), config.hidden_size
    mla, rank = spec.attention, spec.attention.q_lora_rank
    queries = mla.heads * mla.qk_head_dim
    q = hidden * queries if rank is None else (hidden + queries) * rank
    down = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    up = mla.kv_lora_rank * mla.heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    out = mla.heads * mla.v_head_dim * hidden
    cache = context * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    width, router = config.intermediate_size, 0
    if layer >= config.first_k_dense_replace:
        width = (config.num_experts_per_tok + config.n_shared_experts) * config.moe_intermediate_size
        router = 4 * config.n_routed_experts * hidden  # float32
    return 2 * (q + down + up + out + 3 * hidden * width + cache) + router


@pytest.mark.parametrize(("preset", "layer"), [("deepseek-v2-lite", 1), ("deepseek-v3", 0), ("deepseek-v3", 60)])
def test_decode_bytes_are_those_of_a_hand_count(preset, layer):
    config = PRESETS[preset]
    graph = fix_sizes(model_layer(config, layer, torch.bfloat16), {"S": 1})
    for one in DEFAULT_PIPELINE:
        one.run(graph, Context("decode", target("sm_90"), Workload(8, 1, 4096)))
        sweep(graph)
    for context in (512, 4096, 32768):
        found = cost(graph.graph).at(Workload(1, 1, context)).bytes
        assert found == pytest.approx(decode_bytes_by_hand(config, layer, context), rel=0.05), context


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


class Products(nn.Module):
    """Products without an arrow and with an ellipsis, and one that broadcasts."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 7))

    def forward(self, x):
        return (
            torch.einsum("bsi,io", x, self.w),
            torch.einsum("...i,io->...o", x, self.w),
            torch.einsum("sb...i,...io->sb...o", x.transpose(0, 1)[:, :, None], self.w.expand(3, 6, 7)),
        )


def test_products_count_however_their_equation_is_written():
    graph = module_graph(Products(), Input("x_BSD", Role.ACTIVATION, ("B", "S", 6), torch.float32))
    assert cost(graph.graph).at(Workload(2, 5, 1)).flops == (1 + 1 + 3) * 2 * 2 * 5 * 6 * 7
