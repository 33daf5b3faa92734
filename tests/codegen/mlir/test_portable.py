"""The vocabulary in static ATen against its references."""

from __future__ import annotations

import math

import pytest
import torch

from codegen import ops
from codegen.mlir import portable

B, S, T, H, C, R = 2, 3, 9, 3, 10, 6
POSITIONS = torch.tensor([[4, 5, 6], [0, 1, 2]])
ROUTING = {
    "v3": ("sigmoid", 3, 4, 2, "top2", -math.inf, True, 1e-20, 2.5),
    "v2": ("softmax", 4, 6, 3, "max", 0.0, False, 0.0, 16.0),
    "greedy": ("softmax", 5, 1, 1, "max", 0.0, False, 0.0, 1.0),
    "v4": ("sqrtsoftplus", 5, 1, 1, "max", 0.0, True, 1e-20, 1.5),
    "single-expert groups": ("sigmoid", 2, 12, 5, "top2", -math.inf, True, 1e-20, 1.0),
    "as many as are left": ("sigmoid", 6, 4, 2, "top2", -math.inf, True, 1e-20, 1.0),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def poisoned(*widths):
    cache = torch.randn(B, T, *widths)
    cache[1, 3:] = 1e3
    return cache


def test_attention_in_the_latent_space():
    values = torch.randn(B, S, H, C), torch.randn(B, S, H, R), poisoned(C), poisoned(R), POSITIONS, 0.3
    torch.testing.assert_close(portable.mla_attention(*values), ops.attention.mla_attention(*values), rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_with_grouped_heads_and_narrow_values(groups):
    values = torch.randn(B, S, 4, 5), poisoned(groups, 5), poisoned(groups, 3), POSITIONS, 0.4
    torch.testing.assert_close(portable.attention(*values), ops.attention.attention(*values), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ROUTING)
@pytest.mark.parametrize("logits", [torch.randn(17, 12), torch.randint(0, 2, (40, 12)).float()], ids=["free", "ties"])
@pytest.mark.parametrize("bias", [None, -3.0])
def test_routing(name, logits, bias):
    given = None if bias is None else bias + torch.arange(12).remainder(3) / 4
    indices, weights = portable.route(logits, given, *ROUTING[name])
    expected_indices, expected_weights = ops.routing.route(logits, given, *ROUTING[name])
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("tokens", [1, 7])
def test_only_chosen_experts_are_computed(tokens):
    indices = torch.stack([torch.tensor([0, 1, 3, 4])[torch.randperm(4)[:3]] for _ in range(tokens)])
    gate_up, down = torch.randn(5, 12, 10), torch.randn(5, 10, 6)
    gate_up[2], down[2] = math.nan, math.nan
    values = torch.randn(tokens, 10), indices, torch.rand(tokens, 3), gate_up, down
    for more in ((), (None, 0, None, 0.5)):
        expected = ops.experts.routed_swiglu(*values, *more)
        torch.testing.assert_close(portable.routed_swiglu(*values, *more), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("interleaved", [True, False])
def test_writing_the_caches(interleaved):
    kv, weight, angles = torch.randn(B, S, C + R), torch.randn(C), torch.randn(B, S, R // 2)
    caches = poisoned(C), poisoned(R)
    values = kv, weight, angles.cos(), angles.sin(), POSITIONS, *caches, 1e-6, interleaved
    found, expected = portable.write_cache(*values), ops.cache.write_cache(*values)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(found[0], caches[0])


def test_the_aten_operators_behind_a_node():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 10, device="meta")
    node = graph.call_function(torch.ops.dsv3.swiglu.default, (x,))
    assert {"aten.silu", "aten.mul"} <= portable.applied(node)
    assert not {"aten.bmm", "aten.sort"} & portable.applied(node)
