"""Random small checkpoints written by transformers, whose own forward pass is the oracle.

All widths of a head differ, so that a mix-up of axes cannot cancel; nothing is left at its initial value,
because norms of 1, biases of 0 and tiny matrices hide mistakes.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, Glm4MoeLiteConfig, YoutuConfig

VOCABULARY = 97
ORIGINAL_POSITIONS = 64
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=60,
    intermediate_size=44,
    moe_intermediate_size=18,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=3,
    num_key_value_heads=3,
    q_lora_rank=34,
    kv_lora_rank=26,
    qk_nope_head_dim=14,
    qk_rope_head_dim=8,
    v_head_dim=10,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    tie_word_embeddings=False,
)
V3 = dict(n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True)


def yarn(mscale: float, **changes: float) -> dict[str, Any]:
    settings = dict(rope_theta=1e4, factor=40.0, beta_fast=32.0, beta_slow=1.0)
    return dict(
        rope_type="yarn",
        mscale=mscale,
        mscale_all_dim=mscale,
        original_max_position_embeddings=ORIGINAL_POSITIONS,
        **settings | changes,
    )


CASES: dict[str, tuple[type, dict[str, Any], float]] = {
    # name: transformers' config class, what differs from SIZES, where the selection biases lie
    "v3": (DeepseekV3Config, V3 | dict(rope_parameters=yarn(1.0)), 0.0),
    # Below −1 every biased score is negative: a dropped group masked with 0 would win.
    "v3-negative-biases": (DeepseekV3Config, V3 | dict(rope_parameters=yarn(1.0)), -1.0),
    "v3-large-biases": (DeepseekV3Config, V3 | dict(rope_parameters=yarn(1.0)), 5.0),
    "v2-lite": (
        DeepseekV2Config,
        dict(
            q_lora_rank=None,
            topk_method="greedy",
            n_shared_experts=2,
            routed_scaling_factor=1.0,
            rope_parameters=yarn(0.707),
        ),
        0.0,
    ),
    "v2-grouped": (
        DeepseekV2Config,
        dict(
            topk_method="group_limited_greedy",
            n_group=8,
            topk_group=3,
            num_experts_per_tok=5,
            n_shared_experts=2,
            routed_scaling_factor=16.0,
            rope_parameters=yarn(0.707),
        ),
        0.0,
    ),
    "kimi": (
        DeepseekV3Config,
        dict(
            n_group=1,
            topk_group=1,
            n_routed_experts=24,
            routed_scaling_factor=2.827,
            norm_topk_prob=True,
            rope_parameters=yarn(1.0, rope_theta=5e4, factor=32.0, beta_fast=1.0),
        ),
        0.0,
    ),
    "glm-flash": (
        Glm4MoeLiteConfig,
        dict(
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.8,
            norm_topk_prob=True,
            rms_norm_eps=1e-5,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, partial_rotary_factor=1.0),
        ),
        0.0,
    ),
    "youtu": (YoutuConfig, dict(tie_word_embeddings=True, rope_parameters=yarn(1.0)), 0.0),
}


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """The oracle of one case, in float32, every parameter drawn anew."""
    config_class, changes, bias = CASES[name]
    known = {field.name for field in fields(config_class)}
    sizes = {field: size for field, size in (SIZES | changes).items() if field in known}
    positions = int(changes["rope_parameters"].get("factor", 4.0) * ORIGINAL_POSITIONS)
    config = config_class(**sizes, max_position_embeddings=positions)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, mean: float, deviation: float) -> None:
        tensor.copy_(mean + deviation * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                normal(parameter, 1.0, 0.2)
            else:
                read_only_once = "embed_tokens" in parameter_name and not config.tie_word_embeddings
                fan_in = 1 if read_only_once else parameter.shape[-1]
                normal(parameter, 0.0, fan_in**-0.5)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                normal(buffer, bias, 0.3)
    return model.eval()


def save(name: str, folder: Path, seed: int = 0) -> torch.nn.Module:
    """Write the case's checkpoint to `folder` and return the oracle that wrote it."""
    model = build(name, seed)
    model.save_pretrained(folder)
    return model


def logits(oracle: torch.nn.Module, row: Tensor) -> Tensor:
    """int64 [S] → float32 [S, V]: the oracle on one sequence alone, without a cache."""
    with torch.no_grad():
        return oracle(row[None], use_cache=False).logits[0]
