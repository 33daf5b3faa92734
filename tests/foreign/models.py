"""Small transformers models of the family: random weights of sensible sizes, all head widths different."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)

YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0,
}  # fmt: skip
SIZES: dict[str, Any] = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3,
    first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=48, kv_lora_rank=32,
    qk_nope_head_dim=20, qk_rope_head_dim=16, v_head_dim=24, n_routed_experts=16, n_shared_experts=1,
    num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True,
    max_position_embeddings=2560, rope_parameters=YARN,
)  # fmt: skip


def deepseek_v3(**changes: Any) -> PreTrainedModel:
    return randomised(DeepseekV3ForCausalLM(DeepseekV3Config(**{**SIZES, **changes})))


def kimi_like(**changes: Any) -> PreTrainedModel:
    """One group of experts, no mscale."""
    return deepseek_v3(n_group=1, topk_group=1, routed_scaling_factor=2.827, **changes)


def deepseek_v2(topk_method: str = "greedy", **changes: Any) -> PreTrainedModel:
    sizes = {**SIZES, "topk_method": topk_method, "norm_topk_prob": False, "q_lora_rank": None, **changes}
    return randomised(DeepseekV2ForCausalLM(DeepseekV2Config(**sizes)))


def randomised(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Matrices N(0, 1/fan-in), norms near one, selection biases that matter."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            vector = parameter.ndim < 2
            parameter.copy_(1 + 0.2 * noise if vector else noise * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn_like(buffer))
    return model.eval()
