"""Every tensor of a module has its source, under the published names."""

from dataclasses import replace

import pytest

from model_def import PRESETS, ModelConfig, blocks, build, sources
from tests.model_def.builders import GQA, RANKS, SMALL

CONFIGS = {"small": SMALL, "ranks": RANKS, "gqa": GQA} | {
    name: PRESETS[name] for name in ("deepseek-v2-lite", "deepseek-v3")
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_sources_cover_exactly_the_tensors_of_each_block(config: ModelConfig) -> None:
    for block in (*blocks(config), "mtp"):
        state = build(config, block, device="meta").state_dict()
        found = sources(config, block)
        assert found.keys() == state.keys()
        for name, targets in found.items():
            assert len(targets) in (1, state[name].shape[0])


def test_published_names() -> None:
    layer = sources(PRESETS["deepseek-v3"], 3)
    assert layer["self_attn.kv_a_proj_with_mqa.weight"] == ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight",)
    assert layer["mlp.gate.e_score_correction_bias"] == ("model.layers.3.mlp.gate.e_score_correction_bias",)
    assert layer["mlp.experts.up_proj"][255] == "model.layers.3.mlp.experts.255.up_proj.weight"
    assert len(layer["mlp.experts.up_proj"]) == 256


def test_mtp_lies_behind_the_last_layer_and_shares_the_tables() -> None:
    found = sources(PRESETS["deepseek-v3"], "mtp")
    assert found["eh_proj.weight"] == ("model.layers.61.eh_proj.weight",)
    assert found["block.self_attn.o_proj.weight"] == ("model.layers.61.self_attn.o_proj.weight",)
    assert found["embed_tokens.weight"] == ("model.embed_tokens.weight",)
    assert found["shared_head.head.weight"] == ("lm_head.weight",)


def test_tied_head_reads_the_embedding() -> None:
    tied = replace(SMALL, tie_word_embeddings=True)
    assert sources(tied, "head")["lm_head.weight"] == ("model.embed_tokens.weight",)
    assert sources(tied, "mtp")["shared_head.head.weight"] == ("model.embed_tokens.weight",)


@pytest.mark.parametrize("function", [sources, build])
def test_unknown_block_is_named(function: object) -> None:
    with pytest.raises(ValueError, match="block is 'tail'; accepted: 'embed', a layer's index, 'head', 'mtp'"):
        function(SMALL, "tail")  # type: ignore[operator]


def test_layer_out_of_range_is_named() -> None:
    with pytest.raises(IndexError, match="layer 3 of a model with 3 layers"):
        sources(SMALL, 3)
