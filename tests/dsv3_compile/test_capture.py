"""Blocks are captured with their weights and caches as inputs, without allocating either."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from dsv3_compile.capture import block_names, capture
from dsv3_compile.tracing import CaptureError, Input, capture_module
from model_def.presets import PRESETS
from passes.base import Role, is_mutable, source_line
from tests.dsv3_compile import tiny
from tests.dsv3_compile.tiny import TINY

aten = torch.ops.aten


@pytest.fixture(scope="module")
def blocks():
    return {name: block for (name, phase), block in tiny.blocks().items() if phase == "prefill"}


def test_equal_layers_are_captured_once(blocks):
    assert list(blocks) == ["embed", "dense", "moe", "head"]
    assert block_names(TINY) == ["dense", "moe", "moe", "moe"]


def test_kinds_with_several_specs_are_numbered():
    assert block_names(replace(TINY, kv_lora_rank=(22, 22, 24, 22))) == ["dense", "moe_0", "moe_1", "moe_0"]


def test_weights_come_first_under_their_own_names(blocks):
    dense = blocks["dense"].inputs()
    roles = [node.meta["role"] for node in dense]
    assert roles == sorted(roles, key=[Role.WEIGHT, Role.ACTIVATION, Role.CACHE].index)
    assert "self_attn_kv_b_proj_weight" in [node.name for node in dense]
    others = [node.name for node in dense if node.meta["role"] is not Role.WEIGHT]
    assert others == ["x_BSD", "cos_BSF", "sin_BSF", "positions_BS", "latent_BTC", "rope_key_BTR"]
    assert all(node.name == node.target for node in dense)


def test_free_sizes_are_symbols_with_letters(blocks):
    block = blocks["moe"]
    dims = block.module.meta["dims"]
    latent = block.inputs(Role.CACHE)[0].meta["val"]
    assert [size.node.expr for size in latent.shape[:2]] == [dims["B"], dims["T"]]
    assert latent.shape[2] == TINY.kv_lora_rank
    assert {
        node.name for node in block.module.graph.find_nodes(op="call_function", target=aten.sym_size.int)
    } <= dims.keys()


def test_decode_has_one_query_and_a_free_context():
    block = tiny.blocks()["dense", "decode"]
    x, *_, positions = block.inputs(Role.ACTIVATION)
    assert block.phase == "decode" and set(block.module.meta["dims"]) == {"B", "T"}
    assert x.meta["val"].shape[1] == 1 and positions.meta["val"].shape[1] == 1


def test_integers_know_their_range(blocks):
    tokens, positions = blocks["embed"].inputs(Role.ACTIVATION)
    assert (tokens.meta["upper"], positions.meta["upper"]) == (TINY.vocab_size, TINY.max_position_embeddings)
    (positions,) = [n for n in blocks["moe"].inputs() if n.name == "positions_BS"]
    assert positions.meta["upper"].node.expr == blocks["moe"].module.meta["dims"]["T"]


def test_every_node_knows_its_value_and_its_line_in_the_model(blocks):
    for node in blocks["moe"].module.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta
            assert node.target is aten.sym_size.int or source_line(node).split(":")[0] in (
                "attention.py",
                "moe.py",
                "decoder.py",
                "rope.py",
            )


def test_the_graph_is_functional_and_clean(blocks):
    nodes = [node for block in blocks.values() for node in block.module.graph.nodes]
    assert aten._assert_tensor_metadata.default not in {node.target for node in nodes}
    assert not any(is_mutable(node) for node in nodes)


@pytest.fixture(scope="module")
def largest():
    """The published model with one layer of each kind."""
    config = replace(PRESETS["deepseek-v3"], num_hidden_layers=4)
    return {name: block for (name, _), block in capture(config, torch.bfloat16).items()}


def test_the_largest_model_takes_no_memory(largest):
    weights = [node.meta["val"] for block in largest.values() for node in block.inputs(Role.WEIGHT)]
    assert all(isinstance(weight, FakeTensor) for weight in weights)
    assert sum(math.prod(weight.shape) for weight in weights) > 13e9


def test_the_precision_of_every_weight_is_kept(largest):
    weights = {node.name: node.meta["val"].dtype for node in largest["moe"].inputs(Role.WEIGHT)}
    assert weights.pop("mlp_gate_e_score_correction_bias") is torch.float32
    assert set(weights.values()) == {torch.bfloat16}


class WithConstant(nn.Module):
    def forward(self, x):
        return x + torch.tensor([1.0, 2.0])


def test_a_tensor_constant_is_refused():
    with pytest.raises(CaptureError, match="tensor constant .*; register it as a buffer"):
        capture_module(WithConstant(), [Input("x", Role.ACTIVATION, ("B", 2), torch.float32)])


class Overwrites(nn.Module):
    def forward(self, x):
        return x.mul_(2)


class Fixes(nn.Module):
    def forward(self, x):
        return x.view(3, 2) + 1 if x.shape[0] == 3 else x


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.shape[0] > 4 else 2 * x


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Overwrites(), "overwrites an input in place"),
        (Fixes(), r"another path unless Eq\(B, 3\)"),
        (Branches(), "another path unless B <= 4"),
    ],
)
def test_what_is_no_function_of_free_sizes_is_refused(module, why):
    with pytest.raises(CaptureError, match=why):
        capture_module(module, [Input("x", Role.ACTIVATION, ("B", 2), torch.float32)])


class Fills(nn.Module):
    def forward(self, x):
        rows = torch.empty(x.shape[0], 4)
        rows[:, :2], rows[:, 2:] = x, 2 * x
        return rows


def test_a_buffer_that_is_filled_in_place_becomes_a_new_value():
    graph = capture_module(Fills(), [Input("x", Role.ACTIVATION, ("B", 2), torch.float32)])
    assert not any(is_mutable(node) for node in graph.graph.nodes)
    x = torch.randn(7, 2)
    torch.testing.assert_close(graph(x)[0], Fills()(x))


def test_a_buffer_is_a_weight():
    module = nn.BatchNorm1d(3).eval()
    graph = capture_module(module, [Input("x", Role.ACTIVATION, ("B", 3), torch.float32)])
    weights = [n.name for n in graph.graph.nodes if n.op == "placeholder" and n.meta["role"] is Role.WEIGHT]
    assert weights[:4] == ["weight", "bias", "running_mean", "running_var"]


def test_no_installed_package_decides_how_an_einsum_is_captured():
    """opt_einsum would turn the free sizes of a product of three into numbers."""

    class Observed(nn.Module):
        def forward(self, x):
            seen.append(torch.backends.opt_einsum.enabled)
            return torch.einsum("bi,bj,bk->b", x, x, x)

    seen: list[bool] = []
    before = torch.backends.opt_einsum.enabled
    capture_module(Observed(), [Input("x", Role.ACTIVATION, ("B", 3), torch.float32)])
    assert seen and not any(seen)
    assert torch.backends.opt_einsum.enabled == before
