"""A scaled-down twin keeps the structure of its model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsv3_compile.capture import block_names
from dsv3_compile.proxy import needs_proxy, proxy
from model_def.decoder import Layer
from model_def.presets import PRESETS
from model_def.specs import MoeSpec
from tests.dsv3_compile import tiny


@pytest.mark.parametrize("name", PRESETS)
def test_structure_stays(name):
    config = PRESETS[name]
    small = proxy(config)
    assert block_names(small) == block_names(config)
    assert (small.q_lora_rank is None) == (config.q_lora_rank is None)
    for ours, theirs in zip(small.layers()[:4], config.layers()[:4], strict=True):
        assert type(ours.ffn) is type(theirs.ffn)
        if isinstance(ours.ffn, MoeSpec) and isinstance(theirs.ffn, MoeSpec):
            assert replace(ours.ffn.routing, experts=theirs.ffn.routing.experts) == theirs.ffn.routing
            assert bool(ours.ffn.shared_width) == bool(theirs.ffn.shared_width)
        assert ours.attention.scale != 0 and ours.attention.interleaved == theirs.attention.interleaved


@pytest.mark.parametrize("name", PRESETS)
def test_a_block_is_small(name):
    small = proxy(PRESETS[name])
    weights = sum(t.numel() for t in Layer(small.layers()[-1], device="meta").state_dict().values())
    assert weights < 100_000


@pytest.mark.parametrize("name", PRESETS)
def test_rows_of_experts_are_multiples_of_16_bytes(name):
    small = proxy(PRESETS[name])
    assert small.hidden_size % 8 == 0 and (small.moe_intermediate_size or 0) % 8 == 0


def test_widths_differ():
    small = proxy(PRESETS["deepseek-v3"])
    widths = [
        small.hidden_size,
        small.num_attention_heads,
        small.q_lora_rank,
        small.kv_lora_rank,
        small.qk_nope_head_dim,
        small.qk_rope_head_dim,
        small.v_head_dim,
        small.intermediate_size,
        small.moe_intermediate_size,
        small.vocab_size,
    ]
    assert len(widths) == len(set(widths))


def test_ranks_that_differ_still_do():
    config = replace(tiny.TINY, kv_lora_rank=(512, 256, 512, 128))
    ranks = proxy(config).kv_lora_rank
    assert isinstance(ranks, tuple)
    assert [[a == b for b in ranks] for a in ranks] == [
        [a == b for b in (512, 256, 512, 128)] for a in (512, 256, 512, 128)
    ]


def test_grouped_query_attention_keeps_its_sharing():
    config = replace(
        tiny.TINY, attention="gqa", model_type="custom", head_dim=16, num_attention_heads=8, num_key_value_heads=2
    )
    assert proxy(config).num_attention_heads > proxy(config).num_key_value_heads > 1
    whole = proxy(replace(config, num_key_value_heads=8))
    assert whole.num_attention_heads == whole.num_key_value_heads


def test_only_large_blocks_need_one():
    assert not any(needs_proxy(block) for block in tiny.blocks().values())
