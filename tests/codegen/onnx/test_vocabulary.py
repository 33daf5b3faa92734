"""The op vocabulary in ONNX Runtime against its torch reference, over odd sizes."""

from __future__ import annotations

import math

import pytest
import torch

from codegen.onnx.contrib import CONTRIB
from codegen.onnx.vocabulary import one_token_experts
from tests.codegen.onnx.run import activation, check, graph_of, model_of, session

dsv3 = torch.ops.dsv3
B, S, T, H, C, R = 2, 3, 9, 3, 10, 6
POSITIONS = torch.tensor([[4, 5, 6], [0, 1, 2]])
positions = activation("positions", "B", "S", dtype=torch.int64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_norms_and_swiglu():
    def function(x, residual, weight):
        normed, total = dsv3.add_rms_norm(x, residual, weight, 1e-3)
        return normed, total, dsv3.rms_norm(x, weight, 1e-6), dsv3.swiglu(x), dsv3.swiglu(x, 0.5)

    shapes = [activation("x", "B", "S", 14), activation("residual", "B", "S", 14), activation("weight", 14)]
    check(function, shapes, torch.randn(B, S, 14), torch.randn(B, S, 14), torch.randn(14))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary(interleaved):
    shapes = [activation("x", "B", "S", H, R), activation("cos", "B", "S", R // 2), activation("sin", "B", "S", R // 2)]
    values = torch.randn(B, S, H, R), torch.randn(B, S, R // 2), torch.randn(B, S, R // 2)
    check(lambda x, cos, sin: dsv3.rotary(x, cos, sin, interleaved), shapes, *values)


@pytest.mark.parametrize("interleaved", [True, False])
def test_write_cache_at_ragged_positions(interleaved):
    shapes = [
        activation("kv", "B", "S", C + R),
        activation("weight", C),
        activation("cos", "B", "S", R // 2),
        activation("sin", "B", "S", R // 2),
        positions,
        activation("latent", "B", "T", C),
        activation("rope_key", "B", "T", R),
    ]
    tables = torch.randn(B, S, R // 2), torch.randn(B, S, R // 2)
    caches = torch.randn(B, T, C), torch.randn(B, T, R)
    values = (torch.randn(B, S, C + R), torch.randn(C), *tables, POSITIONS, *caches)
    check(lambda *given: dsv3.write_cache(*given, 1e-6, interleaved), shapes, *values)


def test_attention_in_the_latent_space_does_not_see_later_slots():
    shapes = [
        activation("q_latent", "B", "S", H, C),
        activation("q_rope", "B", "S", H, R),
        activation("latent", "B", "T", C),
        activation("rope_key", "B", "T", R),
        positions,
    ]
    latent, rope_key = torch.randn(B, T, C), torch.randn(B, T, R)
    latent[1, 3:], rope_key[1, 3:] = 1e3, 1e3  # poison behind the last position
    values = torch.randn(B, S, H, C), torch.randn(B, S, H, R), latent, rope_key, POSITIONS
    check(lambda *given: dsv3.mla_attention(*given, 0.3), shapes, *values)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_with_grouped_heads_and_narrow_values(groups):
    shapes = [
        activation("q", "B", "S", 4, 5),
        activation("k", "B", "T", groups, 5),
        activation("v", "B", "T", groups, 3),
        positions,
    ]
    k, v = torch.randn(B, T, groups, 5), torch.randn(B, T, groups, 3)
    k[1, 3:], v[1, 3:] = 1e3, 1e3
    check(lambda *given: dsv3.attention(*given, 0.4), shapes, torch.randn(B, S, 4, 5), k, v, POSITIONS)


ROUTING = {
    "v3": ("sigmoid", 3, 4, 2, "top2", -math.inf, True, 1e-20, 2.5),
    "v2": ("softmax", 4, 6, 3, "max", 0.0, False, 0.0, 16.0),
    "greedy": ("softmax", 5, 1, 1, "max", 0.0, False, 0.0, 1.0),
    "v4": ("sqrtsoftplus", 5, 1, 1, "max", 0.0, True, 1e-20, 1.5),
    "single-expert groups": ("sigmoid", 2, 12, 5, "top2", -math.inf, True, 1e-20, 1.0),
}


@pytest.mark.parametrize("name", ROUTING)
@pytest.mark.parametrize("bias", [None, 0.0, -3.0])
def test_routing(name, bias):
    shapes = [activation("logits", "B", 12)] + ([] if bias is None else [activation("bias", 12)])
    values = [torch.randn(17, 12)] + ([] if bias is None else [bias + 0.4 * torch.randn(12)])
    options = ROUTING[name]
    check(lambda logits, bias=None: dsv3.route(logits, bias, *options), shapes, *values)


@pytest.mark.parametrize("name", ROUTING)
def test_the_lowest_index_wins_ties(name):
    logits = torch.randint(0, 2, (40, 12)).float()
    check(lambda logits: dsv3.route(logits, None, *ROUTING[name]), [activation("logits", "B", 12)], logits)


EXPERTS, TOP_K, D, WIDTH = 7, 3, 10, 6
expert_inputs = [
    activation("x", "B", D),
    activation("indices", "B", TOP_K, dtype=torch.int64),
    activation("weights", "B", TOP_K),
    activation("gate_up", EXPERTS, 2 * WIDTH, D),
    activation("down", EXPERTS, D, WIDTH),
]


def expert_values(tokens):
    # Expert 2 is chosen by nobody; its weights would be seen in any sum.
    indices = torch.stack([torch.tensor([0, 1, 3, 4, 5, 6])[torch.randperm(6)[:TOP_K]] for _ in range(tokens)])
    gate_up, down = torch.randn(EXPERTS, 2 * WIDTH, D), torch.randn(EXPERTS, D, WIDTH)
    gate_up[2], down[2] = math.nan, math.nan
    return torch.randn(tokens, D), indices, torch.rand(tokens, TOP_K), gate_up, down


@pytest.mark.parametrize("tokens", [1, 2, 23])
@pytest.mark.parametrize("special", [{}, {dsv3.routed_swiglu.default: one_token_experts}], ids=["loop", "gather"])
def test_only_chosen_experts_are_computed(tokens, special):
    check(dsv3.routed_swiglu, expert_inputs, *expert_values(tokens), special=special)
    check(limited_experts, expert_inputs, *expert_values(tokens), special=special)


def limited_experts(*arguments):
    return dsv3.routed_swiglu(*arguments, None, 0, None, 0.5)


@pytest.mark.parametrize("experts", [dsv3.routed_swiglu, limited_experts])
def test_the_runtimes_own_experts(experts):
    x, indices, weights, gate_up, down = values = expert_values(5)
    running = session(model_of(graph_of(experts, *expert_inputs), special=CONTRIB))
    turns = gate_up.unflatten(1, (2, WIDTH)).transpose(1, 2).flatten(1, 2)
    given = (one.numpy() for one in (x, indices, weights, turns, down))
    (found,) = running.run(None, {one.name: value for one, value in zip(running.get_inputs(), given, strict=True)})
    torch.testing.assert_close(torch.from_numpy(found), experts(*values), rtol=1e-4, atol=1e-4)


def test_half_precision_routes_and_sums_in_float32():
    graph = graph_of(
        dsv3.routed_swiglu,
        *(
            one.__class__(one.name, one.role, one.shape, dtype)
            for one, dtype in zip(
                expert_inputs, (torch.float16, torch.int64, torch.float32, torch.float16, torch.float16), strict=True
            )
        ),
    )
    model = model_of(graph)
    (loop,) = [node for node in model.graph.node if node.op_type == "Loop"]
    assert [out.type.tensor_type.elem_type for out in loop.attribute[0].g.output][-1] == 1  # float32
