"""The published models of the family, and the toy model that ships with the project."""

from __future__ import annotations

from dataclasses import replace

from model_def.config import BlockQuantization, ModelConfig
from model_def.rope import RopeScaling

YARN_40 = RopeScaling(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)

V2_LITE = ModelConfig(
    model_type="deepseek_v2",
    hidden_size=2048,
    num_hidden_layers=27,
    num_attention_heads=16,
    num_key_value_heads=16,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    topk_method="greedy",
    scoring_func="softmax",
    norm_topk_prob=False,
    vocab_size=102400,
    max_position_embeddings=163840,
    rope_scaling=replace(YARN_40, mscale=0.707, mscale_all_dim=0.707),
    bos_token_id=100000,
    eos_token_id=100001,
)

V2 = replace(
    V2_LITE,
    hidden_size=5120,
    num_hidden_layers=60,
    num_attention_heads=128,
    num_key_value_heads=128,
    q_lora_rank=1536,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    n_routed_experts=160,
    n_group=8,
    topk_group=3,
    topk_method="group_limited_greedy",
    routed_scaling_factor=16.0,
)

V3 = ModelConfig(
    model_type="deepseek_v3",
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    num_key_value_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    first_k_dense_replace=3,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    vocab_size=129280,
    max_position_embeddings=163840,
    rope_scaling=YARN_40,
    bos_token_id=0,
    eos_token_id=1,
    quantization=BlockQuantization(),
)

V3_1 = replace(V3, quantization=BlockQuantization(scale_format="ue8m0"))

KIMI_K2 = replace(
    V3,
    model_type="kimi_k2",
    num_attention_heads=64,
    num_key_value_heads=64,
    n_routed_experts=384,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.827,
    num_nextn_predict_layers=0,
    vocab_size=163840,
    max_position_embeddings=131072,
    rope_theta=50000.0,
    rope_scaling=replace(YARN_40, factor=32.0, beta_fast=1.0),
    bos_token_id=163584,
    eos_token_id=163585,
)

MOONLIGHT = replace(
    V3,
    hidden_size=2048,
    num_hidden_layers=27,
    num_attention_heads=16,
    num_key_value_heads=16,
    q_lora_rank=None,
    intermediate_size=11264,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=2.446,
    num_nextn_predict_layers=0,
    vocab_size=163840,
    max_position_embeddings=8192,
    rope_theta=50000.0,
    rope_scaling=None,
    rms_norm_eps=1e-5,
    bos_token_id=163584,
    eos_token_id=163586,
    quantization=None,
)

# Adds numbers in text; trained by examples/train_toy.py, its checkpoint lies in model_def/toy.
TOY = ModelConfig(
    model_type="deepseek_v3",
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=6,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=24,
    intermediate_size=384,
    moe_intermediate_size=48,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    vocab_size=259,
    max_position_embeddings=1024,
    rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=256, mscale=1.0, mscale_all_dim=1.0),
    bos_token_id=256,
    eos_token_id=257,
    pad_token_id=258,
)

PRESETS: dict[str, ModelConfig] = {
    "deepseek-v2-lite": V2_LITE,
    "deepseek-v2": V2,
    "deepseek-v3": V3,
    "deepseek-v3.1": V3_1,
    "kimi-k2": KIMI_K2,
    "moonlight": MOONLIGHT,
    "toy": TOY,
}
