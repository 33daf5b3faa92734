"""Reading every dialect of config.json, deriving layer specs, refusing what cannot be."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model_def import (
    PRESETS,
    BlockQuantization,
    ConfigError,
    DenseSpec,
    GqaSpec,
    MlaSpec,
    ModelConfig,
    MoeSpec,
)
from model_def.config import EXPERT_FIELDS
from tests.model_def.builders import GQA, MHA, RANKS, SMALL

BASE: dict[str, Any] = SMALL.to_dict()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_being_written_and_read(name: str) -> None:
    document = json.loads(json.dumps(PRESETS[name].to_dict()))
    assert ModelConfig.from_dict(document) == PRESETS[name]


@pytest.mark.parametrize("config", [SMALL, RANKS, GQA, MHA], ids=["mla", "ranks", "gqa", "mha"])
def test_own_extensions_survive_being_written_and_read(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


READABLE = ["deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "moonlight", "glm-4.7-flash", "toy"]


@pytest.mark.parametrize("name", READABLE)
def test_transformers_reads_what_we_write(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    plain = replace(PRESETS[name], quantization=None)
    (tmp_path / "config.json").write_text(json.dumps(plain.to_dict()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    again = ModelConfig.from_file(tmp_path / "again")
    assert again.layers() == plain.layers()
    assert (again.rope_scaling, again.rope_theta) == (plain.rope_scaling, plain.rope_theta)
    assert again.num_nextn_predict_layers == plain.num_nextn_predict_layers


def test_old_and_new_rope_keys_are_the_same() -> None:
    yarn = dict(factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=1.0)
    old = BASE | {"rope_theta": 5e4, "rope_scaling": yarn | {"type": "yarn"}}
    new = BASE | {"rope_parameters": yarn | {"rope_type": "yarn", "rope_theta": 5e4}}
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)
    assert ModelConfig.from_dict(new).rope_theta == 5e4


@pytest.mark.parametrize("rope", [{"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}])
def test_no_scaling(rope: dict[str, Any]) -> None:
    document = {k: v for k, v in BASE.items() if k != "rope_scaling"} | rope
    assert ModelConfig.from_dict(document).rope_scaling is None


def test_v3_ignores_what_its_reference_ignores() -> None:
    config = ModelConfig.from_dict(BASE | {"scoring_func": "softmax", "topk_method": "greedy"})
    assert (config.scoring_func, config.topk_method) == ("sigmoid", "noaux_tc")


def test_v2_ignores_renormalisation_other_rotary_pairs_and_missing_groups() -> None:
    config = ModelConfig.from_dict(
        BASE
        | {"model_type": "deepseek_v2", "topk_method": "greedy", "norm_topk_prob": True, "rope_interleave": False}
        | {"n_group": None, "topk_group": None}
    )
    routing = config.layer(1).ffn
    assert isinstance(routing, MoeSpec)
    assert not routing.routing.normalise and routing.routing.scoring == "softmax"
    assert not routing.routing.bias and config.rope_interleave


GLM: dict[str, Any] = {name: value for name, value in BASE.items() if name != "first_k_dense_replace"}
GLM |= {"model_type": "glm4_moe_lite", "num_hidden_layers": 3}


@pytest.mark.parametrize("kinds", [["dense", "sparse", "sparse"], ["dense"] * 3, ["sparse"] * 3])
def test_dense_layers_by_the_kind_of_every_layer(kinds: list[str]) -> None:
    config = ModelConfig.from_dict(GLM | {"mlp_layer_types": kinds})
    assert ["sparse" if config.is_moe(i) else "dense" for i in range(3)] == kinds
    assert config.to_dict()["mlp_layer_types"] == kinds


def test_the_kind_of_every_layer_goes_before_the_number_of_dense_ones() -> None:
    document = GLM | {"mlp_layer_types": ["dense", "dense", "sparse"], "first_k_dense_replace": 1}
    assert ModelConfig.from_dict(document).first_k_dense_replace == 2


def test_a_kind_without_experts_needs_nothing_said_of_them() -> None:
    dense = {name: value for name, value in BASE.items() if "expert" not in name and name not in EXPERT_FIELDS}
    config = ModelConfig.from_dict(dense | {"model_type": "youtu"})
    assert all(isinstance(spec.ffn, DenseSpec) for spec in config.layers())
    assert not config.to_dict().keys() & EXPERT_FIELDS
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_head_dim_that_transformers_stores_is_not_the_heads_width() -> None:
    assert ModelConfig.from_dict(BASE | {"head_dim": 4}).layer(0) == SMALL.layer(0)


def test_quantization() -> None:
    given = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    config = ModelConfig.from_dict(BASE | {"quantization_config": given})
    assert config.quantization == BlockQuantization((128, 128), "ue8m0")


@pytest.mark.parametrize("dtype", [{"torch_dtype": "torch.float16"}, {"dtype": "float16"}])
def test_other_ways_to_write_the_dtype(dtype: dict[str, str]) -> None:
    document = {k: v for k, v in BASE.items() if k != "torch_dtype"} | dtype
    assert ModelConfig.from_dict(document).dtype == torch.float16


def test_layers_of_one_kind_share_one_spec() -> None:
    config = PRESETS["deepseek-v3"]
    assert len(set(config.layers())) == 2
    assert isinstance(config.layer(2).ffn, DenseSpec) and isinstance(config.layer(3).ffn, MoeSpec)


def test_every_layer_may_have_its_own_rank() -> None:
    ranks = [spec.attention.kv_lora_rank for spec in RANKS.layers() if isinstance(spec.attention, MlaSpec)]
    assert ranks == [10, 4, 7]
    assert len(set(RANKS.layers())) == 3


def test_gqa_and_mha_are_specs_too() -> None:
    assert isinstance(GQA.layer(0).attention, GqaSpec)
    assert MHA.layer(0).attention == replace(GQA.layer(0).attention, kv_heads=6)


def test_layer_frequency() -> None:
    config = replace(SMALL, num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2)
    assert [config.is_moe(i) for i in range(6)] == [False, False, True, False, True, False]


def test_model_without_experts() -> None:
    config = replace(SMALL, n_routed_experts=None)
    assert all(isinstance(spec.ffn, DenseSpec) for spec in config.layers())


def test_one_group_and_all_groups_mean_no_group_limit() -> None:
    specs = [replace(SMALL, n_group=n, topk_group=n).layer(1) for n in (1, 4)]
    assert specs[0] == specs[1] != SMALL.layer(1)


YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16}
IMPOSSIBLE = [
    (
        {"model_type": "llama"},
        "model_type is 'llama'; accepted: deepseek_v2, deepseek_v3, kimi_k2, glm4_moe_lite, youtu, custom",
    ),
    ({"mlp_layer_types": ["sparse", "dense"]}, "mlp_layer_types is ['sparse', 'dense']; accepted: 'dense'"),
    ({"mlp_layer_types": "sparse"}, "mlp_layer_types is 'sparse'; accepted"),
    ({"mlp_layer_types": ["dense"] * 9}, "mlp_layer_types names 9 layers of "),
    ({"mlp_layer_types": ["dense"] * 9, "num_hidden_layers": "many"}, "mlp_layer_types names 9 layers of many"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; accepted: 1"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; accepted: 1"),
    ({"model_type": ["deepseek_v3"]}, "model_type is ['deepseek_v3']; accepted"),
    ({"model_type": "deepseek_v32"}, "model_type is 'deepseek_v32'"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "20"}, "hidden_size is '20'; accepted: int"),
    ({"hidden_size": True}, "hidden_size is True; accepted: int"),
    ({"hidden_size": -4}, "hidden_size is -4; accepted: a positive number"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0; accepted: a positive number"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan; accepted: a finite number"),
    ({"rope_theta": math.inf}, "rope_theta is inf; accepted: a finite number"),
    ({"routed_scaling_factor": math.nan}, "routed_scaling_factor is nan; accepted: a finite number"),
    ({"routed_scaling_factor": -math.inf}, "routed_scaling_factor is -inf; accepted: a finite number"),
    ({"n_shared_experts": -1}, "n_shared_experts is -1; accepted: zero or more"),
    ({"kv_lora_rank": None}, "kv_lora_rank is missing, which attention 'mla' needs"),
    ({"kv_lora_rank": [10, 4]}, "kv_lora_rank has 2 entries; accepted: one number, or one per layer (3)"),
    ({"kv_lora_rank": [10, 4, 0]}, "kv_lora_rank is (10, 4, 0); accepted: positive numbers"),
    ({"kv_lora_rank": [10, 4, "7"]}, "kv_lora_rank is (10, 4, '7')"),
    ({"qk_rope_head_dim": 5}, "qk_rope_head_dim is 5; accepted: an even number"),
    ({"topk_group": 5}, "topk_group is 5; accepted: at most n_group 4"),
    ({"n_group": 5}, "n_group is 5; accepted: a divisor of n_routed_experts 12"),
    ({"n_group": 12, "topk_group": 4}, "n_group is 12; accepted: groups of two experts or more"),
    ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7; accepted: at most 6"),
    ({"num_experts_per_tok": 13}, "num_experts_per_tok is 13; accepted: at most n_routed_experts 12"),
    ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; accepted: 'silu'"),
    ({"attention_bias": True}, "attention_bias is True; accepted: False"),
    ({"mlp_bias": True}, "mlp_bias is true; accepted: false"),
    ({"torch_dtype": "int8"}, "torch_dtype is 'int8'; accepted: 'float64', 'float32', 'bfloat16', 'float16'"),
    ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2; accepted: 0, 1"),
    (
        {"rope_scaling": {"type": "longrope"}},
        "rope_scaling has the type 'longrope'; accepted: 'default', 'yarn'",
    ),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; accepted: an object or null"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        "rope_scaling.original_max_position_embeddings is missing",
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": "4", "original_max_position_embeddings": 16}},
        "rope_scaling.factor is '4'; accepted: float",
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 0, "original_max_position_embeddings": 16}},
        "rope_scaling.factor is 0.0; accepted: a positive number",
    ),
    ({"rope_scaling": YARN | {"factor": math.inf}}, "rope_scaling.factor is inf; accepted: a finite number"),
    ({"rope_scaling": YARN | {"mscale": math.nan}}, "rope_scaling.mscale is nan; accepted: a finite number"),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4, "ramp": 2}},
        "rope_parameters has ramp, which is not supported",
    ),
    ({"rope_theta": 0}, "rope_theta is 0.0; accepted: a positive number"),
    (
        {"quantization_config": {"quant_method": "awq"}},
        "quantization_config.quant_method is 'awq'; accepted: 'fp8'",
    ),
    (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
        "quantization_config.weight_block_size is [128]; accepted: two sizes",
    ),
    ({"attention": "linear"}, "attention is 'linear'; accepted: 'mla', 'gqa'"),
    ({"attention": "gqa"}, "head_dim is missing, which attention 'gqa' needs"),
    (
        {"attention": "gqa", "head_dim": 8, "num_key_value_heads": 2},
        "num_key_value_heads is 2; accepted: a divisor of num_attention_heads 3",
    ),
    ({"attention": "gqa", "head_dim": 7}, "head_dim is 7; accepted: an even number"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE, ids=[message[:40] for _, message in IMPOSSIBLE])
def test_impossible_configs_are_one_clear_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(BASE | changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vocab_size", "q_lora_rank", "n_routed_experts", "n_group", "norm_topk_prob"])
def test_absent_keys_are_named_rather_than_guessed(name: str) -> None:
    document = {key: value for key, value in BASE.items() if key != name}
    with pytest.raises(ConfigError, match=f"^{name} is missing$"):
        ModelConfig.from_dict(document)


def test_forced_fields_cannot_be_contradicted_in_code() -> None:
    with pytest.raises(ConfigError, match="scoring_func is 'softmax', but deepseek_v3 always has 'sigmoid'"):
        replace(SMALL, scoring_func="softmax")
    custom = replace(SMALL, scoring_func="softmax", model_type="custom").layer(1).ffn
    assert isinstance(custom, MoeSpec) and custom.routing.scoring == "softmax" and custom.routing.bias


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "is missing"),
    ],
)
def test_unreadable_files_are_named(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_file(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(("ends", "expected"), [(7, 7), ([7, 9], (7, 9)), (None, 5)])
def test_generation_config_says_where_text_ends(ends: Any, expected: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"eos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "do_sample": True}))
    assert ModelConfig.from_file(tmp_path).eos_token_id == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "expected a JSON object, got list"), ('{"eos_token_id": "end"}', "eos_token_id")],
)
def test_a_generation_config_that_cannot_be_used_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_file(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'generation_config.json'}: ")
    assert message in str(caught.value)
