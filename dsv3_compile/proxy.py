"""A scaled-down twin of a model: the same structure at sizes that certificates can run in float64."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, prod
from typing import Any

from dsv3_compile.program import BlockGraph
from model_def.config import ModelConfig
from passes.base import Role

LARGEST_REAL = 4_000_000  # weights of a block that is certified as it is


def needs_proxy(graph: BlockGraph) -> bool:
    return sum(prod(node.meta["val"].shape) for node in graph.inputs(Role.WEIGHT)) > LARGEST_REAL


def proxy(config: ModelConfig) -> ModelConfig:
    """The config with every width made small and different from the others, those of experts multiples of 16 bytes in
    every dtype, without which transformers' own products of them do not run.

    What decides the structure of a block stays: layer kinds, which ranks differ from layer to layer, query
    compression, expert groups, experts per token, shared experts, rotary layout, scaling and epsilons.
    """
    own_keys = config.num_key_value_heads in (None, config.num_attention_heads)
    widths: dict[str, Any] = {
        "hidden_size": 40,
        "num_attention_heads": 7 if own_keys else 6,
        "num_key_value_heads": config.num_key_value_heads and (7 if own_keys else 2),
        "head_dim": config.head_dim and 8,
        "q_lora_rank": config.q_lora_rank and 18,
        "kv_lora_rank": _ranks(config.kv_lora_rank),
        "qk_nope_head_dim": config.qk_nope_head_dim and 12,
        "qk_rope_head_dim": config.qk_rope_head_dim and 8,
        "v_head_dim": config.v_head_dim and 14,
        "intermediate_size": 34,
        "moe_intermediate_size": config.moe_intermediate_size and 16,
        "n_routed_experts": config.n_routed_experts and _experts(config),
        "vocab_size": 97,
    }
    return replace(config, **widths, quantization=None, bos_token_id=None, eos_token_id=None, pad_token_id=None)


def _ranks(ranks: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
    if not isinstance(ranks, tuple):
        return ranks and 22
    order = sorted(set(ranks))
    return tuple(22 + 2 * order.index(rank) for rank in ranks)


def _experts(config: ModelConfig) -> int:
    """Groups of the fewest experts (three at least) that leave a choice inside the allowed groups."""
    chosen = config.num_experts_per_tok or 1
    return config.n_group * max(3, ceil((chosen + 1) / config.topk_group))
