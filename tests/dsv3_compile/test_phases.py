"""The decode graph computes what the prefill graph computes for one query."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dsv3_compile.phases import decode_of, fill_of, fix_sizes
from dsv3_compile.tracing import Input, capture_module
from passes.base import Role
from passes.bisection import relative_error
from passes.verify import run_float64
from tests.dsv3_compile import tiny
from tests.passes.capture import random_inputs


@pytest.fixture(scope="module")
def blocks():
    return {name: block for (name, phase), block in tiny.blocks().items() if phase == "prefill"}


@pytest.mark.parametrize("name", ["embed", "dense", "moe", "head"])
def test_one_query_gives_the_same(blocks, name):
    prefill = blocks[name].module
    dims = prefill.meta["dims"]
    sizes = {symbol: {"B": 3, "S": 1, "T": 11}[letter] for letter, symbol in dims.items()}
    inputs = random_inputs(prefill, sizes, 0)
    expected, _ = run_float64(prefill, inputs)
    found, _ = run_float64(decode_of(blocks[name]).module, inputs)
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert relative_error(one, other) <= 1e-14


def test_the_graph_it_came_from_is_left_alone(blocks):
    before = str(blocks["moe"].module.graph)
    decode_of(blocks["moe"])
    assert str(blocks["moe"].module.graph) == before


def test_fake_values_have_the_fixed_size(blocks):
    module = decode_of(blocks["moe"]).module
    queries = blocks["moe"].module.meta["dims"]["S"]
    for node in module.graph.nodes:
        for value in tree_leaves(node.meta.get("val")):
            if isinstance(value, torch.Tensor):
                assert not any(
                    queries in getattr(s, "node", s).expr.free_symbols for s in value.shape if not isinstance(s, int)
                )


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_what_fills_the_caches_is_a_part_of_prefill(blocks, name):
    prefill = blocks[name]
    before = str(prefill.module.graph)
    filling = fill_of(prefill)
    assert str(prefill.module.graph) == before
    inputs = random_inputs(prefill.module, {s: 5 for s in prefill.module.meta["dims"].values()}, 0)
    expected, _ = run_float64(prefill.module, inputs)
    found, _ = run_float64(filling.module, inputs)
    assert len(found) == len(expected) - 1
    for one, other in zip(found, expected[1:], strict=True):
        assert torch.equal(one, other)
    left = {node.name for node in prefill.inputs()} - {node.name for node in filling.inputs()}
    assert {"self_attn_o_proj_weight", "post_attention_layernorm_weight"} <= left
    assert not any("experts" in node.name or node.name.startswith("mlp") for node in filling.inputs())


class Flat(nn.Module):
    def forward(self, x):
        return x.flatten(0, 1) * x.shape[1]


def test_arithmetic_on_sizes_is_worked_out():
    graph = capture_module(Flat(), [Input("x", Role.ACTIVATION, ("B", "S", 4), torch.float32)])
    fixed = fix_sizes(graph, {"S": 1})
    assert fixed.meta["dims"].keys() == {"B"}
    (result,) = fixed.graph.output_node().args[0]
    assert result.meta["val"].shape[0].node.expr == fixed.meta["dims"]["B"]
    x = torch.randn(3, 1, 4)
    torch.testing.assert_close(fixed(x)[0], x.flatten(0, 1))
    torch.testing.assert_close(fix_sizes(graph, {"S": 5})(torch.ones(3, 5, 4))[0], torch.full((15, 4), 5.0))
